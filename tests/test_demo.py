import json
from types import SimpleNamespace

import pytest
import torch

from hf_longlora import demo, demo_base
from hf_longlora.evaluation import perplexity_by_length


@pytest.fixture(scope="module")
def documents():
    return demo.stdlib_documents()


def test_stdlib_documents_are_split_by_file(documents):
    train, test = documents
    assert not train.keys() & test.keys()
    assert len(test) > 20
    assert 0.03 < len(test) / len(train) < 0.25
    assert not any(set(name.split("/")[:-1]) & demo_base.EXCLUDED_FOLDERS for name in [*train, *test])
    assert sum(len(text) > 16384 for text in test.values()) > 10  # more than 2,048 tokens of any vocabulary
    assert demo.stdlib_documents() == (train, test)


def test_tokenizer_round_trips_any_text():
    tokenizer = demo.train_tokenizer(["def f(x):\n    return x\n"] * 3, 300)
    text = "naïve = 'ÿ€😀'\n\tdef  f( x )"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert max(tokenizer(text)["input_ids"]) < len(tokenizer) <= 300


def test_model_config():
    config = demo.demo_model_config(512)
    assert config.vocab_size == 512
    assert config.max_position_embeddings == 256
    assert config.num_key_value_heads < config.num_attention_heads


def test_pretrain_learns_and_is_reproducible():
    config = demo.demo_model_config(64)
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 32})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16})
    documents = [[2 + (start + index) % 7 for index in range(90)] for start in range(20)]
    model = demo.pretrain(config, documents, steps=60, batch_size=4, progress=False)
    again = demo.pretrain(config, documents, steps=60, batch_size=4, progress=False)
    (record,) = perplexity_by_length(model, documents, 32, progress=False)
    assert record["perplexity"] < 2.5  # 7 where nothing was learnt
    assert not model.training
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture
def small(documents, monkeypatch):
    """The demo with its numbers cut down; every line of it runs."""
    train, test = documents
    few = dict(list(train.items())[:12]), dict(sorted(test.items(), key=lambda item: -len(item[1]))[:3])
    config = demo.demo_model_config(300)
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 32})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16})
    pretrain = demo.pretrain
    monkeypatch.setattr(demo, "stdlib_documents", lambda: few)
    monkeypatch.setattr(demo, "train_tokenizer", lambda texts, train=demo.train_tokenizer: train(texts, 300))
    monkeypatch.setattr(demo, "demo_model_config", lambda vocab_size: config)
    monkeypatch.setattr(demo, "pretrain", lambda *args, **kwargs: pretrain(*args, **kwargs, batch_size=2))
    monkeypatch.setattr(demo, "FULL", demo.Plan(120, 26, tuple(demo.RUNS), 4))
    monkeypatch.setattr(demo, "LEAST", demo.Plan(60, 10, (demo.RESULT,), 4))
    monkeypatch.setattr(demo, "seconds_of_a_step", lambda *args: 0.1)
    monkeypatch.setattr(demo, "BASE_LENGTH", 32)
    monkeypatch.setattr(demo, "TARGET_LENGTH", 128)
    monkeypatch.setattr(demo, "LENGTHS", (32, 128))
    monkeypatch.setattr(demo, "EVALUATION", {"lengths": (32, 128), "stride": 16})


@pytest.mark.parametrize(
    ("by_threads", "taken"), [({1: 3.5, 2: 34.0}, 1), ({1: 0.4, 2: 0.25}, 2), ({1: 0.3, 2: 0.4}, 1)]
)
def test_threads_are_those_that_are_faster(monkeypatch, by_threads, taken):
    """On a busy machine two take ten times as long as one, and finding that out takes one step."""
    clock = [0.0]

    def pretrain(config, documents, steps, progress):
        clock[0] += steps * by_threads[torch.get_num_threads()]

    threads = torch.get_num_threads()
    monkeypatch.setattr(demo, "pretrain", pretrain)
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    torch.set_num_threads(2)
    try:
        assert demo.seconds_of_a_step(None, []) == pytest.approx(by_threads[taken])
        assert torch.get_num_threads() == taken
        given_up = by_threads[2] > 2 * by_threads[1]
        assert clock[0] == pytest.approx(8 * by_threads[1] + (1 if given_up else 7) * by_threads[2])
    finally:
        torch.set_num_threads(threads)


class Interrupt(Exception):
    """Stands for Ctrl-C, which pytest keeps for itself."""


@pytest.mark.slow
def test_demo_runs_and_goes_on_after_interruptions(small, tmp_path, monkeypatch, capsys):
    whole = demo.run_demo(tmp_path / "whole", full=True)
    printed = capsys.readouterr().out
    assert list(whole) == ["base", "base + RoPE scaling", *demo.RUNS]
    assert len({record["perplexity"] for records in whole.values() for record in records}) == 10
    assert f"{whole[demo.RESULT][-1]['perplexity']:.2f}" in printed and "LongLoraSFTTrainer(" in printed
    assert (tmp_path / "whole" / "perplexity.png").stat().st_size > 10_000

    def interrupt_after(calls, owner, name):
        original, left = getattr(owner, name), [calls]

        def method(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Interrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, method)
        return lambda: monkeypatch.setattr(owner, name, original)

    out = tmp_path / "broken"
    for calls, owner, name in (
        (110, torch.optim.Muon, "step"),  # the base, after its checkpoint
        (23, demo.LongLoraSFTTrainer, "training_step"),  # the first extension, after its checkpoint
        (3, demo, "perplexity_by_length"),
    ):
        undo = interrupt_after(calls, owner, name)
        with pytest.raises(Interrupt):
            demo.run_demo(out, full=True)
        undo()
    assert demo.run_demo(out, full=True) == whole
    with pytest.raises(ValueError, match="begun with --full: give another --output-dir"):
        demo.run_demo(out)


def test_a_demo_in_a_given_time_is_one_extension(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_clock", lambda seconds: f"<{seconds > 0}>")
    records = demo.run_demo(tmp_path, minutes=0.1)
    printed = " ".join(capsys.readouterr().out.split())
    assert list(records) == ["base", "base + RoPE scaling", demo.RESULT]
    assert "60 steps at 32 tokens, 0.1 s each (<True> of about <True> min)" in printed
    assert "less than 60 steps" in printed
    config = json.loads((demo._adapter(tmp_path, demo.RESULT) / "adapter_config.json").read_text())
    assert [(s["max_length"], s["max_steps"]) for s in config["schedule"]["stages"]] == [(64, 3), (128, 10)]
    monkeypatch.setattr(demo, "seconds_of_a_step", lambda *args: 1e-6)  # a faster machine goes on with what was begun
    assert demo.run_demo(tmp_path, minutes=0.1) == records


def test_the_estimate_follows_a_machine_that_becomes_busy(small, tmp_path, monkeypatch, capsys):
    clock = [0.0]

    def base(*args):
        clock[0] += 120  # for 60 steps that were thought to take 0.1 s each
        return "base"

    def extend(*args):
        raise Interrupt

    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(demo, "_base", base)
    monkeypatch.setattr(demo, "_extend", extend)
    with pytest.raises(Interrupt):
        demo.run_demo(tmp_path, minutes=0.1)
    plan = demo.plan_demo(0.1, 0.1)
    left = 2 * (plan.cost - plan.base_steps)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"steps: LongLoRA (2:00 of about {demo._clock(120 + left)} min)" in printed


def test_a_demo_is_as_long_as_the_machine_can_do():
    steps = [demo.plan_demo(4, seconds).base_steps for seconds in (0.01, 0.2, 0.4, 0.8, 10)]
    assert steps[0] == demo.FULL.base_steps and steps[-1] == demo.LEAST.base_steps
    assert steps == sorted(steps, reverse=True) and len(set(steps)) > 3
    for seconds in (0.2, 0.4):
        plan = demo.plan_demo(4, seconds)
        assert 0.95 * 240 < plan.cost * seconds <= 240
        assert plan.runs == (demo.RESULT,)
    assert demo.FULL.cost > demo.plan_demo(1e6, 1).cost
    assert [(s.max_length, s.max_steps) for s in demo.FULL.stages] == [(1024, 30), (2048, 70)]
