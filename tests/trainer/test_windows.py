"""Steps in windows of a stage's rows."""

import copy
import json
import pickle
import random
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_longlora import ContextStage, LongLoraSFTConfig, LongLoraSFTTrainer, S2AttentionConfig
from hf_longlora.attention import interface
from hf_longlora.attention.reference import reference_kernel
from hf_longlora.evaluation import compare_attention
from hf_longlora.hub.run import ATTENTION
from hf_longlora.schedule import Schedule
from hf_longlora.trainer.pieces import FILLER, filler, piece, pieces
from hf_longlora.trainer.report import write_report
from hf_longlora.trainer.windows import Served, WindowCollator, cut, slots

from ..test_families import build
from .helpers import STAGES, TEXT, Spy, check_same, texts, weights

WINDOW = 64  # what the tiny Llama is trained at


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 70), st.none() | st.integers())
@example([3] * 8, 2, 0)  # windows of a single token
def test_a_row_is_cut_into_each_token_once(lengths, size, seed):
    found = cut(lengths, size, None if seed is None else random.Random(seed))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert [window.start for window in found] == [
        start for start, length in zip(starts, lengths, strict=True) for _ in range(-(-length // size))
    ]
    for start, length in zip(starts, lengths, strict=True):
        own = [window for window in found if window.start == start]
        assert sorted(at for window in own for chunk in window.chunks for at in range(*chunk)) == list(range(length))
        assert all(window.tokens == size for window in own[:-1]) and own[-1].tokens <= size
        assert all(len(w.chunks) <= (1 if seed is None else 2) and w.chunks == sorted(w.chunks) for w in own)
        if seed is None:  # in the order of the text
            assert [window.chunks[0] for window in own] == sorted(window.chunks[0] for window in own)
        if length <= size:
            assert [window.chunks for window in own] == [[(0, length)]]
    assert found == cut(lengths, size, None if seed is None else random.Random(seed))


@pytest.mark.parametrize("windows", [2, 4])
def test_chunks_reach_over_the_whole_document(windows):
    length = windows * WINDOW
    draws = [[w.chunks for w in cut([length], WINDOW, random.Random(seed))] for seed in range(200)]
    reached = [chunks[-1][1] - chunks[0][0] for found in draws for chunks in found]
    assert max(reached) > length - 6 and sum(reached) / len(reached) > 0.4 * length
    first = [chunks[0][1] - chunks[0][0] for found in draws for chunks in found]
    assert min(first) < 5 and max(first) > WINDOW - 5


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 8))
def test_slots_are_level(lengths, count):
    windows = cut(lengths, 60)
    found = slots(windows, count)
    assert len(found) == count and sorted(w for slot in found for w in slot) == sorted(windows)
    tokens = [sum(window.tokens for window in slot) for slot in found]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert all(slot == sorted(slot) for slot in found)
    if len(windows) <= count:  # the first windows in the first slots, where they are of one size
        assert all(len(slot) <= 1 for slot in found)
        longest = [[window] for window in windows if window.tokens == max(lengths)]
        assert found[: len(longest)] == longest


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=4)


def served(rows, window, sparse, *, most=None, every=0, batch=1, stages=1, seed=3):
    """Rows of documents of such lengths, with a token for each place, as a trainer serves them in stages."""
    tokens, examples = 0, []
    for lengths in rows:
        ids = list(range(tokens, tokens + sum(lengths)))
        tokens += len(ids)
        labels = [-100 if token % 7 == 0 else token for token in ids]
        examples.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    most = most or max(sum(lengths) for lengths in rows)
    steps = len(rows) // batch // stages
    stage = [ContextStage(most, steps) for _ in range(stages)]
    schedule = Schedule(tuple(stage), S2AttentionConfig(), every, window, sparse)
    return Served(Dataset.from_list(examples), seed, schedule, batch)


@given(
    st.lists(LENGTHS, min_size=1, max_size=8), st.integers(2, 50), st.sampled_from(["windows", "pose"]),
    st.integers(0, 90),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_stage_in_windows_has_each_token_once(rows, window, sparse, beyond):
    """With its position and its label, beside those of its document alone; however few rows there are."""
    most = max(sum(lengths) for lengths in rows) + beyond
    data = served(rows, window, sparse, most=max(most, window + 1))
    places = {}
    for row, lengths in zip(data.rows, rows, strict=True):
        ids = iter(row["input_ids"])
        places |= {next(ids): (number, at) for number, n in enumerate(lengths) for at in range(n)}
    found = [data[place] for place in range(len(data))]
    assert sorted(token for each in found for token in each.input_ids.tolist()) == sorted(places)
    for each in found:
        assert each.input_ids.dtype == each.labels.dtype == each.position_ids.dtype == "int64"
        ends = list(accumulate(each.lengths, initial=0))
        assert ends[-1] == len(each.input_ids) == len(each.labels)
        assert each.position_ids.tolist() == [places[token][1] for token in each.input_ids.tolist()]
        for begin, end in pairwise(ends):
            ids = each.input_ids[begin:end].tolist()
            own = [token - at for token, (_, at) in zip(ids, map(places.get, ids), strict=True)]
            assert len(set(own)) == 1 and ids == sorted(ids) and len(ids) <= window  # of one document
            follows = [False, *(after - before == 1 for before, after in pairwise(ids))]
            assert sparse == "pose" or all(follows[1:])
            assert each.labels[begin:end].tolist() == [
                token if after and token % 7 else -100 for token, after in zip(ids, follows, strict=True)
            ]


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.sampled_from(["windows", "pose"]))
@settings(deadline=None, max_examples=30)
def test_a_stage_s_dense_steps_and_other_stages_have_rows_of_their_own(batch, every, stages, sparse):
    """Each token of a run once; dense steps' places as they are, others of rows of their stage's sparse steps."""
    steps = 3
    rows = [[100]] * (batch * steps * stages)
    data = served(rows, 20, sparse, every=every, batch=batch, stages=stages)
    found = [data[place] for place in range(len(data))]
    tokens = [each["input_ids"] if isinstance(each, dict) else each.input_ids.tolist() for each in found]
    assert sorted(token for each in tokens for token in each) == list(range(100 * len(rows)))
    for place, (each, ids) in enumerate(zip(found, tokens, strict=True)):
        step = place // batch
        plan = data.schedule.step(step)
        taken = {token // 100 for token in ids}
        assert len(ids) == 100 and {data.schedule.step(row // batch).stage for row in taken} == {plan.stage}
        if isinstance(each, dict):
            assert plan.mode == "dense" and taken == {place} and each == data.rows[place]
        else:
            assert plan.mode == "windows" == data.schedule.step(min(taken) // batch).mode
            own = sum(
                data.schedule.step(s).mode == "windows" for s in range(steps * plan.stage, steps * plan.stage + 3)
            )
            assert len(taken) == min(5, own * batch)  # of as many rows as a row has windows, if there are such many
    if every == 1:
        assert all(isinstance(each, dict) for each in found)


def test_neighbours_share_all_rows_but_one():
    data = served([[100]] * 12, 20, "windows")
    taken = [[token // 100 for token in data[place].input_ids[::20].tolist()] for place in range(12)]
    assert taken[5] == [5, 4, 3, 2, 1] and taken[6] == [6, 5, 4, 3, 2] and taken[0] == [0, 11, 10, 9, 8]
    assert data[5].position_ids[::20].tolist() == [0, 20, 40, 60, 80]  # of each row another window


def test_an_example_follows_from_its_place_alone():
    """Whatever was read before it, and by whom."""
    data = served([[100], [40, 60], [100], [100], [7, 93]] * 2, 20, "pose", every=3, batch=2)
    other = pickle.loads(pickle.dumps(data))  # as a worker gets it
    in_order = [data[place] for place in range(10)]
    for place in (9, 3, 3, 0, 8):
        got, expected = other[place], in_order[place]
        if isinstance(expected, dict):
            assert got == expected
        else:
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    seeded = served([[100]] * 4, 20, "pose", seed=4)
    assert not np.array_equal(seeded[0].position_ids, served([[100]] * 4, 20, "pose")[0].position_ids)


def test_a_row_is_cut_alike_for_all_who_read_it():
    """Its windows, which several places share, are those that it is cut into by its own place."""
    data = served([[100]] * 6, 20, "pose")
    found = {}
    for each in (data[place] for place in range(6)):
        for begin, end in pairwise(accumulate(each.lengths, initial=0)):
            own = each.position_ids[begin:end].tolist()
            found.setdefault(int(each.input_ids[begin]) // 100, []).append(own)
    for row, windows in found.items():
        expected = cut([100], 20, random.Random(f"3/{row}"))
        assert sorted(windows) == sorted([at for chunk in w.chunks for at in range(*chunk)] for w in expected)
    assert len({str(sorted(windows)) for windows in found.values()}) == 6


def test_a_step_of_many_lengths_is_not_longer_than_rows_are():
    """Rows packed of documents of all lengths: a place has about the tokens of a row."""
    draw = random.Random(0)
    rows = []
    for _ in range(64):
        lengths = []
        while sum(lengths) < 1024:
            lengths.append(min(draw.choice([3, 20, 50, 60, 64, 100, 300]), 1024 - sum(lengths)))
        rows.append(draw.sample(lengths, len(lengths)))
    data = served(rows, 64, "windows")
    tokens = [len(data[place].input_ids) for place in range(64)]
    assert sum(tokens) == 64 * 1024 and max(tokens) < 1.05 * 1024 and min(tokens) > 0.95 * 1024


@pytest.mark.parametrize("labels", [True, False])
def test_a_batch_of_windows(labels):
    data = served([[100]] * 4, 20, "windows")
    if not labels:
        data = Served(data.rows.remove_columns(["labels", "seq_lengths"]), 3, data.schedule, 1)
    examples = [data[0], data[1]]
    batch = WindowCollator(None)(examples)
    for name in ("input_ids", "labels", "position_ids"):
        expected = np.concatenate([getattr(each, name) for each in examples])
        assert batch[name].shape == (1, 200) and batch[name].dtype == torch.int64
        assert batch[name][0].tolist() == expected.tolist()
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == list(range(0, 201, 20))
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 20
    assert set(batch) == {
        *("input_ids", "labels", "position_ids"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
    learned = [
        at % 20 > 0 and (not labels or token % 7 > 0) for at, token in enumerate(batch["input_ids"][0].tolist())
    ]
    assert torch.equal(batch["labels"], batch["input_ids"].where(torch.tensor([learned]), -100))


def test_other_examples_go_to_the_collator_that_is_wrapped():
    inner = DataCollatorForLanguageModeling(pad_token_id=0)
    examples = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    got, expected = WindowCollator(inner)(examples), inner(examples)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=12), st.integers(1, 64), st.integers(1, 16))
def test_pieces_hold_each_window_once(sizes, most, count):
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    found = pieces(ends, most, count)
    assert [window for span in found for window in range(*span)] == list(range(len(sizes)))
    assert all(b - a == 1 or ends[b] - ends[a] <= most for a, b in found)
    assert all(a < b for a, b in found) and len(found) >= min(count, len(sizes))
    if count == 1:  # as few as there can be in order
        assert all(ends[d] - ends[a] > most for (a, _), (_, d) in pairwise(found))


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def seen(monkeypatch):
    """Of each call of attention in training: the mode's step, documents, positions and tokens."""
    batches = []
    real = LongLoraSFTTrainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        mode = self.schedule.step(self.state.global_step).mode
        batches.append((mode, {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}))
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LongLoraSFTTrainer, "training_step", record)
    return batches


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": False}, {"packing_strategy": "bfd"}, {"packing_strategy": "bfd_split"}],
    ids=["wrapped", "no packing", "bfd", "bfd_split"],
)
def test_steps_of_a_run(make, seen, options):
    """A stage's sparse steps see the tokens that they would see by the pattern, in windows; dense steps as ever."""
    tokens, logged = {}, {}
    for sparse in ("s2", "windows", "pose"):
        seen.clear()
        dataset = texts(40, repeat=2) if options.get("packing_strategy") else texts()
        trainer = make(output=sparse, sparse=sparse, dense_every=3, dataset=dataset, **options)
        before = weights(trainer)
        trainer.train()
        moved = sum(int((p != before[name]).sum()) for name, p in weights(trainer).items())
        assert moved > 0.9 * sum(p.numel() for p in before.values()) - 128 * 32  # of embeddings, those of tokens seen
        found = [sorted(batch["input_ids"][batch["input_ids"] > 0].tolist()) for _, batch in seen]
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [log["num_tokens"] for log in logs] == [sum(map(len, found[: i + 1])) for i in range(6)]
        assert all(log["tokens_per_second"] > 0 for log in logs)
        logged[sparse] = [log["attention"] for log in logs]
        tokens[sparse] = [found[2], found[5], sorted(found[0] + found[1]), sorted(found[3] + found[4])]
        for mode, batch in seen:
            if mode == "windows":
                assert "attention_mask" not in batch and batch["max_length_q"] <= WINDOW
                inside = torch.ones(batch["input_ids"].shape[1], dtype=torch.bool)
                inside[batch["cu_seq_lens_q"][:-1].long()] = False
                steps = batch["position_ids"][0].diff()[inside[1:]]
                assert (steps > 1).any() if sparse == "pose" else (steps == 1).all()
                assert (batch["input_ids"] > 0).all() and batch["position_ids"].max() > WINDOW
            elif mode == "dense" and options.get("packing") is False:
                assert batch["input_ids"].shape[0] == 2 and batch["attention_mask"].sum() > 2 * WINDOW
            elif mode == "dense":
                assert (batch["labels"] == batch["input_ids"]).float().mean() > 0.9
                assert "position_ids" not in batch or (batch["position_ids"].diff() <= 1).all()
    assert tokens["pose"] == tokens["windows"] == tokens["s2"]
    assert logged == {kind: [kind, kind, "dense"] * 2 for kind in ("windows", "pose")} | {
        "s2": ["s2attn", "s2attn", "dense"] * 2
    }


def test_the_attention_of_a_run_is_the_one_of_its_windows(make, monkeypatch):
    """What each layer computes in a PoSE step, against the dense mask of windows written out."""
    select, checked = interface.select_kernel, []

    def compared(*args, **kwargs):
        kernel = select(*args, **kwargs)

        def run(query, key, value, parts, **options):
            plan = trainer.schedule.step(trainer.state.global_step)
            out = kernel(query, key, value, parts, **options)
            if plan.mode == "windows":
                (part,) = parts
                (cut,) = part.rows
                # A part of the batch: its windows are runs of up to `WINDOW` tokens, whatever the positions in them.
                assert all(each.end - each.start <= WINDOW and not each.seen for each in cut)
                assert cut[-1].end == query.shape[2]
                positions = trainer._last_batch["position_ids"]
                checked.append(int((positions.diff() > 1).sum()))
                expected = reference_kernel(query, key, value, parts, **options)
                assert torch.allclose(out, expected, atol=1e-5)
            return out

        return run

    monkeypatch.setattr(interface, "select_kernel", compared)
    trainer = make(sparse="pose", stages=STAGES[1:])
    trainer.train()
    assert len(checked) >= 3 * 2 * 4 and all(checked)


@pytest.mark.parametrize(
    ("accumulation", "options"),
    [(1, {}), (3, {"packing_strategy": "bfd", "dataset": texts(40, repeat=2)})],
    ids=["wrapped", "bfd, accumulated"],
)
def test_parts_add_up_to_the_whole(make, monkeypatch, accumulation, options):
    """Loss and gradient of each parameter, of a step run in parts and whole."""
    found = {}
    for whole in (False, True):
        gradients, forwards = {}, []
        if whole:
            monkeypatch.setattr(LongLoraSFTTrainer, "_adds_up", False)

        class Gradients(Spy):
            def on_pre_optimizer_step(self, args, state, control, model=None, _into=gradients, **kwargs):
                _into.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        trainer = make(
            output=f"whole-{whole}",
            sparse="pose",
            stages=[ContextStage(256, 1)],
            max_grad_norm=0,
            gradient_accumulation_steps=accumulation,
            callbacks=[Gradients()],
            **options,
        )
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda module, args, kwargs, _into=forwards: _into.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        trainer.train()
        (log,) = (log for log in trainer.state.log_history if "loss" in log)
        found[whole] = gradients, log, forwards
    (parts, log, forwards), (whole, other, rows) = found[False], found[True]
    assert max(forwards) <= WINDOW and len(forwards) > len(rows) == accumulation and sum(forwards) == sum(rows)
    assert log["loss"] == pytest.approx(other["loss"], abs=1e-6) and log["num_tokens"] == other["num_tokens"]
    assert parts.keys() == whole.keys() and len(parts) > 10
    assert max(float((parts[name] - whole[name]).abs().max()) for name in parts) < 1e-6
    assert max(float(p.abs().max()) for p in parts.values()) > 1e-3


class MeanLoss(LongLoraSFTTrainer):
    """As people write it."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_step_that_does_not_add_up_runs_whole(make):
    """A balance of experts is of a forward, dynamic RoPE by its longest position, NEFTune's noise by its tokens; dense
    steps need the room anyway."""
    torch.manual_seed(0)
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, sliding_window=None,
        )
    )  # fmt: skip
    dynamic = [ContextStage(256, 1, rope_type="dynamic")]
    for name, options in {
        "experts": {"model": experts, "stages": [ContextStage(256, 1)], "router_aux_loss_coef": 0.01},
        "dynamic": {"stages": dynamic},
        "noise": {"stages": [ContextStage(256, 1)], "neftune_noise_alpha": 5},
        "a loss of one's own": {"stages": [ContextStage(256, 1)], "kind": MeanLoss},
        "beside dense steps": {"stages": [ContextStage(256, 2)], "dense_every": 2},
    }.items():
        trainer, forwards = make(output=name, sparse="pose", **options), []
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda module, args, kwargs, _into=forwards: _into.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        trainer.train()
        assert len(forwards) == trainer.state.global_step and min(forwards) >= 256, name


@pytest.mark.parametrize(("sparse", "stops"), [("pose", [2]), ("windows", [3, 4])])
def test_a_resumed_run_is_the_unbroken_run(make, sparse, stops, tmp_path):
    """In stage 1 (2), at the boundary (3), in stage 2 (4)."""
    options = dict(
        sparse=sparse,
        dense_every=3,
        packing_strategy="bfd",
        dataset=texts(40, repeat=2),
        gradient_accumulation_steps=2,
    )
    unbroken = make(output="unbroken", save_strategy="steps", save_steps=1, **options)
    unbroken.train()
    checkpoints = [str(tmp_path / "unbroken" / f"checkpoint-{stop}") for stop in stops]
    with pytest.raises(ValueError, match=f"sparse was {sparse}, is s2"):
        make(**options | {"sparse": "s2"}).train(resume_from_checkpoint=checkpoints[0])
    for checkpoint in checkpoints:
        resumed = make(**options)
        resumed.train(resume_from_checkpoint=checkpoint)
        check_same(resumed, unbroken, checkpoint, ("step", "loss", "stage", "attention", "num_tokens"))


def test_a_stage_says_for_itself(make):
    """And one that is no longer than a window is dense."""
    spy = Spy()
    stages = [
        ContextStage(64, 1, rope_type=None, sparse="pose"),
        ContextStage(128, 2, sparse="pose"),
        ContextStage(128, 1, sparse="windows"),
        ContextStage(256, 2, dense_every=5, sparse="s2"),
    ]
    trainer = make(stages=stages, callbacks=[spy], model=yarned(make))
    trainer.train()
    assert [step[2] for step in spy.steps] == ["dense", "windows", "windows", "windows", "dense", "auto"]
    assert trainer.schedule.to_dict()["windows"] == [None, 64, 64, None]
    logs = [log["attention"] for log in trainer.state.log_history if "stage" in log]
    assert logs == ["dense", "pose", "pose", "windows", "dense", "s2attn"]


def yarned(make):
    """A model whose RoPE says the length that it was trained at, and goes beyond it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1.5, "original_max_position_embeddings": 64}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96, rope_parameters=rope,
        )
    )  # fmt: skip


def test_evaluation_is_of_whole_rows(make, monkeypatch):
    """In a run of PoSE steps, and of the very dataset that is trained on."""
    lengths = []
    real = LongLoraSFTTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        if not model.training:
            lengths.append((inputs["input_ids"].shape[1], "cu_seq_lens_q" in inputs))
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LongLoraSFTTrainer, "compute_loss", record)
    trainer = make(sparse="pose", eval_strategy="steps", eval_steps=3, eval_dataset=texts(2))
    trainer.train()
    assert lengths and set(lengths) == {(256, False)}
    lengths.clear()
    trainer.evaluate(trainer.train_dataset)
    assert len(trainer.train_dataset) == 12 and max(lengths) == (256, False) and min(lengths)[0] > WINDOW


@pytest.mark.parametrize("sparse", ["windows", "pose"])
def test_what_a_run_leaves(make, tmp_path, sparse):
    trainer = make(sparse=sparse, dense_every=3, report=True)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| 1 | 128 | 3 | {ATTENTION[sparse]} | windows of 64 | - | 3 |" in card
    assert "which are of several rows" in card
    assert ("2309.10400" in card and "zhu2024pose" in card) == ("PoSE" in card) == (sparse == "pose")
    report = (tmp_path / "out" / "report.html").read_text()
    assert f"<td>{ATTENTION[sparse]}</td><td>windows of 64</td><td>-</td><td>3</td>" in report
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["schedule"]
    assert (stored["sparse"], stored["windows"], stored["native_window"]) == (sparse, [64, 64], 64)
    again = Schedule.from_dict(stored)
    assert [again.step(step) for step in range(6)] == [trainer.schedule.step(step) for step in range(6)]
    assert list(compare_attention(trainer.model, [[5 + i % 90 for i in range(300)]], [64, 256])) == ["dense"]
    write_report(tmp_path / "out", trainer.state.log_history, trainer.schedule)

    other = make(output="other", sparse="s2")
    other.train()
    other.save_model()
    card = (tmp_path / "other" / "README.md").read_text()
    assert "PoSE" not in card and "in windows" not in card and card.rstrip().endswith("```")


def test_an_adapter_goes_on_in_windows_of_its_base(make):
    stages = [ContextStage(length, 3, rope_type="abf") for length in (128, 256)]  # of which a config doesn't tell
    first = make(stages=stages[:1])
    first.train()
    second = make(model=first.model, peft_config=None, output="second", sparse="pose", stages=stages[1:])
    assert second.schedule.native_window == WINDOW
    second.train()
    assert [log["attention"] for log in second.state.log_history if "stage" in log] == ["pose"] * 3


CHATS = Dataset.from_dict(
    {"messages": [[{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": TEXT * 6}]] * 8}
)
PAIRS = Dataset.from_dict({"prompt": ["What time? "] * 8, "completion": [TEXT * 6] * 8})
MASKED = Dataset.from_dict({"input_ids": [[5] * 300] * 8, "labels": [[-100] * 100 + [5] * 200] * 8})
TOKENS = Dataset.from_dict({"input_ids": [[5] * 300] * 8})
HALF = [[0, 1] * 150] * 8  # of the tokens are of answers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": CHATS, "assistant_only_loss": True}, "would lose what they answer"),
        ({"dataset": PAIRS}, 'Set sparse="s2"'),
        ({"dataset": PAIRS, "completion_only_loss": True}, "would lose what they answer"),
        ({"dataset": MASKED, "packing": False}, "would lose what they answer"),
        ({"model": GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4, n_positions=512)),
          "stages": [ContextStage(1024, 1, rope_type=None)]}, "GPT2LMHeadModel has no RoPE"),
        ({"model": build("lfm2")}, "can't tell where positions skip"),
    ],
    ids=["assistant", "pairs", "completion", "labels", "no RoPE", "state"],
)  # fmt: skip
@pytest.mark.parametrize("sparse", ["windows", "pose"])
def test_what_can_not_be_cut_is_refused(make, monkeypatch, options, message, sparse):
    if options.get("dataset") is not MASKED:  # before anything is tokenized
        monkeypatch.setattr("hf_longlora.trainer.rows.check_unmasked", None)
    before = copy.deepcopy(options.get("model"))
    with pytest.raises(ValueError, match=message):
        make(sparse=sparse, **options)
    if before is not None:
        assert options["model"].config._attn_implementation == before.config._attn_implementation


def test_batches_are_not_dealt_out(make):
    """accelerate cuts all that a batch has at the number of its rows, in one process, too."""
    options = {"accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError, match="would tear windows apart"):
        make(sparse="windows", **options)
    for strategy in ("bfd", "bfd_split"):
        with pytest.raises(ValueError, match=r'cuts off where the documents of a packed row end.*"wrapped"'):
            make(packing_strategy=strategy, **options)
    make(**options).train()


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({}, "windows"),
        ({"dataset": TOKENS}, "windows"),
        ({"dataset": CHATS, "packing": False}, "s2"),
        ({"dataset": PAIRS, "packing": False}, "s2"),
        ({"dataset": MASKED, "packing": False}, "s2"),
        ({"dataset": TOKENS.add_column("assistant_masks", HALF)}, "s2"),
        ({"dataset": TOKENS.add_column("completion_mask", HALF), "completion_only_loss": True}, "s2"),
        ({"group_size": 32}, "s2"),
        ({"group_size_ratio": 0.5}, "s2"),
        ({"sink_tokens": 0}, "s2"),
        ({"stages": [ContextStage(128, 1), ContextStage(256, 1, group_size=64)]}, "s2"),
        ({"model": build("lfm2")}, "s2"),
    ],
    ids=[
        *("text", "tokens", "chats", "pairs", "labels", "answers", "completions"),
        *("size", "share", "sinks", "of a stage", "state"),
    ],
)
def test_what_the_data_and_the_model_are_settles_auto(make, options, sparse):
    trainer = make(sparse="auto", **options)
    assert trainer.schedule.sparse == trainer.args.sparse == sparse
    trainer.train()
    attention = {log["attention"] for log in trainer.state.log_history if "stage" in log}
    assert attention == {"windows" if sparse == "windows" else "s2attn"}


def test_a_recipe_told_nothing_but_lengths(make, monkeypatch):
    """Each 2nd step dense, the others in windows of plain text; answers are said to be the reason where they are."""
    args = LongLoraSFTConfig(output_dir="unused", use_cpu=True, bf16=False, stages=[ContextStage(128, 4)])
    assert (args.sparse, args.dense_every) == ("auto", 2)
    trainer = make(sparse="auto", dense_every=2)
    assert [trainer.schedule.step(step).mode for step in range(4)] == ["windows", "dense"] * 2
    said = []
    monkeypatch.setattr("hf_longlora.trainer.sparse.logger.warning", said.append)
    make(sparse="auto", dataset=PAIRS, packing=False)
    assert 'sparse="s2"' in said[0] and "(completion, prompt)" in said[0]
    make(sparse="auto", dataset=PAIRS, packing=False, dense_every=1)  # nothing is sparse
    assert len(said) == 1


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_are_cut_where_all_of_them_is_learned(make, packing):
    trainer = make(sparse="pose", dataset=PAIRS, completion_only_loss=False, packing=packing)
    trainer.train()
    assert [log["attention"] for log in trainer.state.log_history if "stage" in log] == ["pose"] * 6


def test_answers_are_learned_where_no_step_is_cut(make):
    make(sparse="pose", dataset=PAIRS, packing=False, dense_every=1).train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparse": "POSE"}, "`sparse` must be one of"),
        ({"sparse": "pose", "attention": "dense"}, "has no sparse steps"),
        ({"sparse": "windows", "attention": "dense"}, "has no sparse steps"),
        ({"sparse": "windows", "group_size": 16}, "windows and no groups: leave out group_size"),
        ({"sparse": "pose", "group_size": 16}, "windows and no groups: leave out group_size"),
        ({"sparse": "pose", "group_size_ratio": 0.25}, "windows and no groups: leave out group_size_ratio"),
        ({"sparse": "pose", "sink_tokens": 0}, "windows and no groups: leave out sink_tokens"),
    ],
)
def test_bad_stages_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ContextStage(128, 1, **fields)


def test_of_a_filler_nothing_is_learned():
    """A process that has fewer pieces than others runs it beside them: no loss, no token of another number."""
    batch = WindowCollator(None)([served([[200]], WINDOW, "windows")[0]])
    row = filler(batch)
    assert row.keys() == piece(batch, batch["cu_seq_lens_q"].tolist(), (0, 1)).keys()
    assert row["input_ids"].shape == row["labels"].shape == row["position_ids"].shape == (1, FILLER)
    assert set(row["labels"].flatten().tolist()) == {-100}
    assert row["position_ids"].tolist() == [[*range(FILLER)]]
    assert row["cu_seq_lens_q"].tolist() == [0, FILLER] and row["max_length_q"] == FILLER


def test_a_piece_is_a_row_of_its_own():
    batch = WindowCollator(None)([served([[200]], WINDOW, "windows")[0]])
    ends = batch["cu_seq_lens_q"].tolist()
    parts = [piece(batch, ends, span) for span in pieces(ends, 2 * WINDOW)]
    assert len(parts) == 2
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), batch[name])
    assert [part["cu_seq_lens_q"].tolist() for part in parts] == [[0, 64, 128], [0, 64, 72]]
    assert [part["max_length_k"] for part in parts] == [64, 64]
