"""PoSE steps: windows of a stage's rows."""

import copy
import json
import pickle
import random
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_longlora import ContextStage, LongLoraSFTTrainer, S2AttentionConfig
from hf_longlora.attention import interface
from hf_longlora.attention.reference import reference_kernel
from hf_longlora.evaluation import compare_attention
from hf_longlora.trainer.pose import SEED, PoseCollator, Served, piece, pieces, windows
from hf_longlora.trainer.report import write_report
from hf_longlora.trainer.stages import Schedule

from ..test_families import build
from .helpers import STAGES, TEXT, Spy, Stop, texts, weights

WINDOW = 64  # what the tiny Llama is trained at


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@given(st.integers(1, 400), st.integers(1, 70), st.integers())
def test_windows_use_each_token_once(length, size, seed):
    found = windows(length, size, random.Random(seed))
    assert sorted(at for chunks in found for chunk in chunks for at in range(*chunk)) == list(range(length))
    sizes = [sum(end - start for start, end in chunks) for chunks in found]
    assert all(tokens == size for tokens in sizes[:-1]) and sizes[-1] <= size
    assert all(len(chunks) <= 2 and chunks == sorted(chunks) for chunks in found)
    if length <= size:
        assert found == [[(0, length)]]
    assert found == windows(length, size, random.Random(seed))


def test_windows_reach_over_the_whole_document():
    draws = [windows(256, WINDOW, random.Random(seed)) for seed in range(200)]
    reached = [chunks[-1][1] - chunks[0][0] for found in draws for chunks in found]
    assert max(reached) > 250 and sum(reached) / len(reached) > 1.5 * WINDOW
    first = [chunks[0][1] - chunks[0][0] for found in draws for chunks in found]
    assert min(first) < 5 and max(first) > WINDOW - 5


@given(
    st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(2, 50),
    st.integers(0, 9),
)
def test_a_batch_of_windows(rows, size, seed):
    """Tokens with their own positions and labels, each once; boundaries where windows end, and there alone."""
    examples, start = [], 1000
    for number, lengths in enumerate(rows):
        ids = list(range(start, start + sum(lengths)))
        start += 1000
        labels = [-100 if token % 7 == 0 else token for token in ids]
        examples.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths, SEED: f"{seed}/{number}"})
    batch = PoseCollator(None, size)(examples)
    assert set(batch) == {
        *("input_ids", "labels", "position_ids"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
    places = {
        token: (number, document, at)
        for number, (example, lengths) in enumerate(zip(examples, rows, strict=True))
        for document, length in enumerate(lengths)
        for at, token in enumerate(example["input_ids"][sum(lengths[:document]) :][:length])
    }
    ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    assert sorted(ids) == sorted(places)
    assert positions == [places[token][2] for token in ids]
    ends = batch["cu_seq_lens_q"].tolist()
    assert ends == batch["cu_seq_lens_k"].tolist() and batch["cu_seq_lens_q"].dtype == torch.int32
    sizes = [b - a for a, b in pairwise(ends)]
    assert batch["max_length_q"] == batch["max_length_k"] == max(sizes) <= size
    for begin, end in pairwise(ends):
        assert len({places[token][:2] for token in ids[begin:end]}) == 1  # one document
        assert positions[begin:end] == sorted(positions[begin:end])
        follows = [
            False,
            *(after - before == 1 for before, after in zip(ids[begin:], ids[begin + 1 : end], strict=False)),
        ]
        assert labels[begin:end] == [
            token if after and token % 7 else -100 for token, after in zip(ids[begin:end], follows, strict=True)
        ]


def test_other_examples_go_to_the_collator_that_is_wrapped():
    inner = DataCollatorForLanguageModeling(pad_token_id=0)
    examples = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    got, expected = PoseCollator(inner, 2)(examples), inner(examples)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


def test_windows_follow_from_the_place_alone():
    schedule = Schedule((ContextStage(128, 4),), S2AttentionConfig(), dense_every=2, native_window=64, sparse="pose")
    rows = Dataset.from_dict({"input_ids": [[i] for i in range(8)]})
    served = pickle.loads(pickle.dumps(Served(rows, 3, schedule, batch=2)))  # as a worker gets it
    assert len(served) == 8 and served.__getitems__([4, 5]) == [served[4], served[5]]
    assert served[4] == {"input_ids": [4], SEED: "3/4"}
    assert [SEED in served[place] for place in range(8)] == [True, True, False, False] * 2
    assert len({served[place][SEED] for place in (0, 1, 4, 5)}) == 4


@given(st.lists(st.integers(1, 64), min_size=1, max_size=12), st.integers(1, 64), st.integers(1, 16))
def test_pieces_hold_each_window_once(sizes, most, count):
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    found = pieces(ends, most, count)
    assert [window for span in found for window in range(*span)] == list(range(len(sizes)))
    assert all(b - a == 1 or ends[b] - ends[a] <= most for a, b in found)
    assert len(found) >= min(count, len(sizes))
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
    """Each step sees the tokens that it would see by the pattern: sparse ones in windows, dense ones as whole rows."""
    tokens, modes = {}, {}
    for sparse in ("s2", "pose"):
        seen.clear()
        dataset = texts(40, repeat=2) if options.get("packing_strategy") else texts()
        trainer = make(output=sparse, sparse=sparse, dense_every=3, dataset=dataset, **options)
        before = weights(trainer)
        trainer.train()
        moved = sum(int((p != before[name]).sum()) for name, p in weights(trainer).items())
        assert moved > 0.9 * sum(p.numel() for p in before.values()) - 128 * 32  # of embeddings, those of tokens seen
        tokens[sparse] = [sorted(batch["input_ids"][batch["input_ids"] > 0].tolist()) for _, batch in seen]
        modes[sparse] = [mode for mode, _ in seen]
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [log["num_tokens"] for log in logs] == [sum(map(len, tokens[sparse][: i + 1])) for i in range(6)]
        assert all(log["tokens_per_second"] > 0 for log in logs)
    assert tokens["pose"] == tokens["s2"]
    assert modes["pose"] == ["pose", "pose", "dense"] * 2 == [log["attention"] for log in logs]
    for mode, batch in seen:
        if mode == "pose":
            assert "attention_mask" not in batch and batch["max_length_q"] <= WINDOW
            skips = (batch["position_ids"].diff() > 1).sum()
            assert skips > 0 and (batch["input_ids"] > 0).all()
        elif options.get("packing", True) is False:
            assert batch["input_ids"].shape[0] == 2 and batch["attention_mask"].sum() > 2 * WINDOW
        else:
            assert (batch["labels"] == batch["input_ids"]).float().mean() > 0.9
            assert "position_ids" not in batch or (batch["position_ids"].diff() <= 1).all()


def test_the_attention_of_a_run_is_the_one_of_its_windows(make, monkeypatch):
    """What each layer computes in a PoSE step, against the dense mask of windows written out."""
    select, checked = interface.select_kernel, []

    def compared(*args, **kwargs):
        kernel = select(*args, **kwargs)

        def run(query, key, value, parts, **options):
            plan = trainer.schedule.step(trainer.state.global_step)
            out = kernel(query, key, value, parts, **options)
            if plan.mode == "pose":
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


def test_a_step_that_does_not_add_up_runs_whole(make):
    """A balance of experts is of a forward, dynamic RoPE by its longest position; dense steps need the room anyway."""
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
        "beside dense steps": {"stages": [ContextStage(256, 2)], "dense_every": 2},
    }.items():
        trainer, forwards = make(output=name, sparse="pose", **options), []
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda module, args, kwargs, _into=forwards: _into.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        trainer.train()
        assert len(forwards) == trainer.state.global_step and min(forwards) >= 256, name


@pytest.mark.parametrize("stop", [2, 3], ids=["in stage 1", "at the boundary"])
def test_a_resumed_run_is_the_unbroken_run(make, stop):
    options = dict(
        sparse="pose",
        dense_every=3,
        packing_strategy="bfd",
        dataset=texts(40, repeat=2),
        save_strategy="steps",
        save_steps=100,
        gradient_accumulation_steps=2,
    )
    unbroken = make(output="unbroken", **options)
    unbroken.train()
    broken = make(output="broken", callbacks=[Stop(stop)], **options)
    broken.train()
    with pytest.raises(ValueError, match="sparse was pose, is s2"):
        make(output="broken", **options | {"sparse": "s2"}).train(resume_from_checkpoint=True)
    resumed = make(output="broken", **options)
    resumed.train(resume_from_checkpoint=True)
    expected, got = weights(unbroken), weights(resumed)
    assert expected.keys() == got.keys() and len(got) > 10
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert any(not torch.equal(got[name], p) for name, p in weights(broken).items())
    for log, other in zip(resumed.state.log_history, unbroken.state.log_history, strict=True):
        for key in ("step", "loss", "stage", "attention", "num_tokens"):
            assert log.get(key) == other.get(key), key


def test_a_stage_says_for_itself(make):
    """And one that is no longer than a window is dense."""
    spy = Spy()
    stages = [
        ContextStage(64, 1, rope_type=None, sparse="pose"),
        ContextStage(128, 2, sparse="pose"),
        ContextStage(256, 2, dense_every=2),
    ]
    trainer = make(stages=stages, callbacks=[spy], model=yarned(make))
    trainer.train()
    assert [step[2] for step in spy.steps] == ["dense", "pose", "pose", "dense", "auto"]
    assert trainer.schedule.to_dict()["windows"] == [None, 64, None]
    logs = [log["attention"] for log in trainer.state.log_history if "stage" in log]
    assert logs == ["dense", "pose", "pose", "dense", "s2attn"]


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


def test_what_a_run_leaves(make, tmp_path):
    trainer = make(sparse="pose", dense_every=3)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 1 | 128 | 3 | PoSE | windows of 64 | - | 3 |" in card and "2309.10400" in card and "zhu2024pose" in card
    report = (tmp_path / "out" / "report.html").read_text()
    assert "PoSE in windows of 64, one step in 3 dense" in report
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["schedule"]
    assert (stored["sparse"], stored["windows"], stored["native_window"]) == ("pose", [64, 64], 64)
    assert list(compare_attention(trainer.model, [[5 + i % 90 for i in range(300)]], [64, 256])) == ["dense"]
    write_report(tmp_path / "out", trainer.state.log_history, trainer.schedule)

    other = make(output="other")
    other.train()
    other.save_model()
    card = (tmp_path / "other" / "README.md").read_text()
    assert "PoSE" not in card and card.rstrip().endswith("```")


def test_an_adapter_goes_on_in_windows_of_its_base(make):
    first = make(stages=STAGES[:1])
    first.train()
    second = make(model=first.model, peft_config=None, output="second", sparse="pose", stages=STAGES[1:])
    assert second.schedule.native_window == WINDOW
    second.train()
    assert [log["attention"] for log in second.state.log_history if "stage" in log] == ["pose"] * 3


CHATS = Dataset.from_dict(
    {"messages": [[{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": TEXT * 6}]] * 8}
)
PAIRS = Dataset.from_dict({"prompt": ["What time? "] * 8, "completion": [TEXT * 6] * 8})
MASKED = Dataset.from_dict({"input_ids": [[5] * 300] * 8, "labels": [[-100] * 100 + [5] * 200] * 8})


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
def test_what_can_not_be_cut_is_refused(make, options, message):
    before = copy.deepcopy(options.get("model"))
    with pytest.raises(ValueError, match=message):
        make(sparse="pose", **options)
    if before is not None:
        assert options["model"].config._attn_implementation == before.config._attn_implementation


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
        ({"sparse": "pose", "group_size": 16}, "windows and no groups: leave out group_size"),
        ({"sparse": "pose", "group_size_ratio": 0.25}, "windows and no groups: leave out group_size_ratio"),
        ({"sparse": "pose", "sink_tokens": 0}, "windows and no groups: leave out sink_tokens"),
    ],
)
def test_bad_stages_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ContextStage(128, 1, **fields)


def test_a_piece_is_a_row_of_its_own():
    examples = [{"input_ids": list(range(200)), SEED: "0/0"}]
    batch = PoseCollator(None, WINDOW)(examples)
    ends = batch["cu_seq_lens_q"].tolist()
    parts = [piece(batch, ends, span) for span in pieces(ends, 2 * WINDOW)]
    assert len(parts) == 2
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), batch[name])
    assert [part["cu_seq_lens_q"].tolist() for part in parts] == [[0, 64, 128], [0, 64, 72]]
    assert [part["max_length_k"] for part in parts] == [64, 64]
