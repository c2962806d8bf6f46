import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import datasets  # noqa: F401 (here, so that its log goes to none of a test's captured streams)
import pytest
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from hf_longlora import (
    LongLoraConfig,
    S2AttentionConfig,
    long_perplexity,
    perplexity_by_length,
    s2_attention_mode,
    set_s2_attention,
)
from hf_longlora.attention import get_s2_attention
from hf_longlora.attention.interface import S2State
from hf_longlora.cli import main
from hf_longlora.cli.data import load_documents, texts_of
from hf_longlora.cli.evaluate import _pattern
from hf_longlora.cli.train import _adapter, parse
from hf_longlora.evaluation import compare
from hf_longlora.evaluation.compare import compare_attention
from hf_longlora.hub import refresh_card
from hf_longlora.planning import find_gpu, plan_run
from hf_longlora.schedule import ContextStage, Schedule

from .tuner.helpers import nudge

TEXT = "The quick brown fox jumps over the lazy dog, and a long book has many chapters. "


@pytest.fixture
def adapter(tiny_llama, tiny_tokenizer, tmp_path):
    """A saved adapter on a saved base, and a file of documents."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LongLoraConfig(r=4, target_length=256))
    nudge(model)
    stages = (ContextStage(128, 1, group_size=16), ContextStage(256, 1, group_size=32))
    attention = S2AttentionConfig(sink_tokens=0, kernel="reference")
    model.active_peft_config.schedule = Schedule(stages, attention, 0).to_dict()
    model.save_pretrained(tmp_path / "adapter")
    lines = [json.dumps({"text": f"{i} " + TEXT * 12, "title": "kept out"}) for i in range(3)]
    (tmp_path / "documents.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "one.txt").write_text(TEXT * 12)
    return model, tmp_path


def test_evaluate(adapter, tiny_tokenizer, capsys):
    model, folder = adapter
    files = [str(folder / "documents.jsonl.gz"), str(folder / "one.txt")]
    arguments = ["evaluate", str(folder / "adapter"), "--documents", *files, "--lengths", "64", "256"]
    assert main([*arguments, "--passkey", "0", "--output-dir", str(folder / "out"), "--device", "cpu"]) == 0
    results = json.loads((folder / "out" / "evaluation.json").read_text())
    assert (folder / "out" / "perplexity.png").stat().st_size > 5_000
    documents = texts_of(load_documents(files), tiny_tokenizer)
    assert len(documents) == 4
    options = dict(tokenizer=tiny_tokenizer, progress=False)
    set_s2_attention(model, S2AttentionConfig(group_size=32, sink_tokens=0))  # as the last stage ended
    assert results["perplexity"]["dense"] == perplexity_by_length(model, documents, [64, 256], **options)
    with s2_attention_mode(model, "s2"):
        assert results["perplexity"]["as trained"] == perplexity_by_length(model, documents, [64, 256], **options)
    assert results["perplexity"]["dense"] != results["perplexity"]["as trained"]
    assert results["documents"] == ["documents.jsonl.gz", "one.txt"]
    assert [row["end"] for row in results["positions"]] == [4, 8, 16, 32, 64, 128, 256]
    assert (folder / "out" / "positions.png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert "Context beyond 128 tokens" in results["far_context"]
    assert " ".join(results["far_context"].split()) in " ".join(printed.split())
    assert f"{results['perplexity']['dense'][1]['perplexity']:.2f}" in printed and "as trained" in printed


def test_evaluate_says_what_its_numbers_do_not_rest_on(adapter, capsys, caplog):
    """Documents too short for the longest length, and lengths that the model, with its adapter, doesn't reach."""
    _, folder = adapter
    (folder / "short.jsonl").write_text("\n".join(json.dumps({"text": TEXT * n}) for n in (1, 2, 12, 12)))
    arguments = ["--documents", str(folder / "short.jsonl"), "--device", "cpu", "--max-windows", "1"]

    def said(name, *lengths):
        out = ["--output-dir", str(folder / f"out-{name}")]
        assert main(["evaluate", str(folder / name), "--lengths", *map(str, lengths), *arguments, *out]) == 0
        short = [record.getMessage() for record in caplog.records if "documents have" in record.getMessage()]
        return [line for line in capsys.readouterr().out.splitlines() if " reaches " in line], short

    assert said("adapter", 16) == ([], [])
    reach, short = said("adapter", 64, 256, 300)
    assert reach == [f"{folder / 'adapter'} reaches 256 tokens: at 300 it is measured beyond that"]
    assert short == ["2 of 4 documents have fewer than 300 tokens: left out."]
    longest = AutoConfig.from_pretrained(folder / "base").max_position_embeddings
    reach, _ = said("base", longest, longest + 1, longest + 2)
    assert len(reach) == 1 and f"reaches {longest:,} tokens: at {longest + 1:,}, {longest + 2:,} it" in reach[0]
    assert said("base", longest)[0] == []


def test_evaluate_long_ppl(adapter, tiny_tokenizer, capsys):
    """At the lengths above the short context, by the model itself or by another."""
    model, folder = adapter
    texts = texts_of(load_documents([str(folder / "one.txt")]), tiny_tokenizer)
    arguments = ["evaluate", str(folder / "adapter"), "--documents", str(folder / "one.txt"), "--dense-only"]
    arguments += ["--lengths", "64", "128", "256", "--device", "cpu", "--output-dir", str(folder / "out")]
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    for name, options, evaluator in ((None, [], None), ("base", ["--evaluator", str(folder / "base")], base)):
        assert main([*arguments, "--long-ppl", "64", *options]) == 0
        results = json.loads((folder / "out" / "evaluation.json").read_text())
        how = dict(evaluator=evaluator, short=64, tokenizer=tiny_tokenizer, progress=False)
        expected = long_perplexity(model, texts, [128, 256], **how)
        assert results["long_ppl"] == [record | {"evaluator": name} for record in expected]
        assert "LongPPL" in capsys.readouterr().out
    for wrong in (["--long-ppl", "300"], ["--long-ppl"], ["--evaluator", "base"]):
        assert main([*arguments, *wrong]) == 1 and "--long-ppl" in capsys.readouterr().err


def test_a_base_with_an_adapter_of_its_own_is_not_evaluated(adapter, capsys):
    """transformers loads it with the base: the numbers would be of both."""
    _, folder = adapter
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "adapter" / name, folder / "base")
    out = folder / "out"
    files = ["--documents", str(folder / "one.txt"), "--lengths", "64"]
    assert main(["evaluate", str(folder / "adapter"), *files, "--output-dir", str(out)]) == 1
    assert "holds an adapter itself" in capsys.readouterr().err and not out.exists()


def test_only_the_pattern_of_training_is_called_that(adapter, tiny_llama):
    model, _ = adapter
    names = [
        _pattern(S2AttentionConfig(group_size=size, sink_tokens=sinks), on)
        for size, sinks, on in ((32, 0, model), (16, 0, model), (32, 4, model), (32, 0, tiny_llama()))
    ]
    others = ["groups of 16, 0 sink tokens", "groups of 32, 4 sink tokens", "groups of 32, 0 sink tokens"]
    assert names == ["as trained", *others]


def test_an_adapter_trained_in_windows_is_evaluated_densely(adapter, capsys):
    """Unless groups are asked for: within its windows, attention was dense."""
    model, folder = adapter
    schedule = Schedule((ContextStage(256, 1),), S2AttentionConfig(), 0, native_window=64, sparse="pose")
    model.active_peft_config.schedule = schedule.to_dict()
    model.save_pretrained(folder / "adapter")
    arguments = ["evaluate", str(folder / "adapter"), "--documents", str(folder / "one.txt"), "--lengths", "256"]
    for options, columns in (([], ["dense"]), (["--group-size", "32"], ["dense", "groups of 32, 4 sink tokens"])):
        assert main([*arguments, *options, "--output-dir", str(folder / "out"), "--device", "cpu"]) == 0
        assert list(json.loads((folder / "out" / "evaluation.json").read_text())["perplexity"]) == columns
        said = "was trained in windows of 64 tokens: dense is as it was trained"
        assert (said in " ".join(capsys.readouterr().out.split())) == (not options)


def test_a_card_has_the_numbers_of_its_adapter_alone(adapter, capsys, caplog):
    model, folder = adapter
    out = folder / "adapter"
    model.active_peft_config.schedule = None
    model.save_pretrained(out)

    def evaluate(model, output_dir):
        arguments = ["evaluate", str(folder / model), "--documents", str(folder / "one.txt"), "--lengths", "64"]
        return main([*arguments, "--dense-only", "--output-dir", str(folder / output_dir), "--device", "cpu"])

    (out / "README.md").unlink()  # PEFT's
    assert evaluate("adapter", "adapter") == 0
    results = json.loads((out / "evaluation.json").read_text())
    shown = f"| dense | {results['perplexity']['dense'][0]['perplexity']:.2f} |"
    card = (out / "README.md").read_text()
    assert shown in card

    assert evaluate("base", "adapter") == 1  # before anything is measured
    assert f"{out} holds a model or a run" in capsys.readouterr().err
    assert json.loads((out / "evaluation.json").read_text()) == results and (out / "README.md").read_text() == card

    assert evaluate("base", "elsewhere") == 0
    shutil.copytree(out, folder / "moved")
    assert refresh_card(folder / "moved") and shown in (folder / "moved" / "README.md").read_text()
    shutil.copy(folder / "elsewhere" / "evaluation.json", folder / "moved")
    assert refresh_card(folder / "moved")
    card = (folder / "moved" / "README.md").read_text()
    assert "has not been evaluated" in card and "| dense |" not in card and "perplexity.png" not in card
    assert "is of other weights (base) than lie beside it" in caplog.text


@pytest.mark.parametrize("held", ["config.json", "trainer_state.json"])
def test_no_folder_of_another_model_or_run_is_evaluated_into(adapter, capsys, held):
    """A report takes what lies beside it, too."""
    _, folder = adapter
    shutil.copytree(folder / "base", folder / "another")
    if held == "trainer_state.json":  # a run whose model was not saved
        (folder / "another" / "config.json").rename(folder / "another" / held)
    arguments = ["evaluate", "--documents", str(folder / "one.txt"), "--lengths", "64", "--device", "cpu"]
    for name in ("base", "adapter"):
        assert main([*arguments, str(folder / name), "--output-dir", str(folder / "another")]) == 1
        assert f"{folder / 'another'} holds a model or a run" in capsys.readouterr().err
    assert not (folder / "another" / "evaluation.json").exists()
    assert main([*arguments, str(folder / "base"), "--output-dir", str(folder / "base")]) == 0


def test_no_evaluation_is_written_over_by_another(adapter, capsys):
    """By default all go into one folder."""
    _, folder = adapter
    out, file = folder / "out", folder / "out" / "evaluation.json"

    def evaluate(name, *options, documents="one.txt"):
        arguments = ["--lengths", "64", "--output-dir", str(out), "--device", "cpu"]
        documents = ["--documents", str(folder / documents), "--max-windows", "1"] if documents else []
        return main(["evaluate", str(folder / name), *documents, *arguments, *options])

    def refused(words, name, *options, **kept):
        before = file.read_text()
        assert evaluate(name, *options, **kept) == 1 and file.read_text() == before
        assert words in capsys.readouterr().err

    passkey = ["--passkey", "1", "--depths", "0", "--retrieval-lengths", "600"]
    assert evaluate("base") == 0
    assert evaluate("base") == 0
    refused(f"{file} is of other weights (base): give another --output-dir", "adapter")
    refused(
        f"has documents, perplexity, positions, far_context of {folder / 'base'}", "base", *passkey, documents=None
    )
    assert evaluate("base", *passkey) == 0
    refused("has passkey of", "base")

    file.unlink()
    assert evaluate("adapter", "--long-ppl", "32") == 0
    assert evaluate("adapter", *passkey, documents=None) == 0
    assert {"perplexity", "long_ppl", "passkey"} < json.loads(file.read_text()).keys()
    # LongPPL is of the documents that were named with it, and these are others.
    assert evaluate("adapter", documents="documents.jsonl.gz") == 0
    assert {"perplexity", "passkey"} < (kept := json.loads(file.read_text())).keys() and "long_ppl" not in kept
    shutil.copytree(folder / "adapter", folder / "deeper" / "adapter")
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    weights = {key: 2 * weight for key, weight in weights.items()}
    save_file(weights, folder / "deeper" / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    refused(f"{file} is of other weights (adapter)", "deeper/adapter")
    for damaged in ('{"model": "adapter", ', "[1]"):
        file.write_text(damaged)
        refused(f"{file} is damaged", "adapter")


def test_what_was_measured_before_a_failure_is_written(adapter, capsys, monkeypatch):
    _, folder = adapter

    def accuracy(*args, progress=True, **options):
        if progress:  # not while it is only tried
            raise KeyboardInterrupt

    monkeypatch.setattr("hf_longlora.evaluation.passkey_accuracy", accuracy)
    arguments = ["evaluate", str(folder / "adapter"), "--documents", str(folder / "one.txt"), "--lengths", "64"]
    arguments += ["--passkey", "1", "--output-dir", str(folder / "out"), "--device", "cpu"]
    assert main(arguments) == 130
    printed = capsys.readouterr()
    assert "What had been measured whole is written." in printed.err and "Written to" in printed.out
    results = json.loads((folder / "out" / "evaluation.json").read_text())
    assert results["perplexity"] and "passkey" not in results and (folder / "out" / "perplexity.png").is_file()


def test_a_full_disk_takes_neither_what_is_there_nor_what_is_shown(adapter, capsys, monkeypatch):
    _, folder = adapter
    file = folder / "out" / "evaluation.json"
    arguments = ["evaluate", str(folder / "adapter"), "--documents", str(folder / "one.txt"), "--lengths", "64"]
    arguments += ["--output-dir", str(folder / "out"), "--device", "cpu"]
    assert main(arguments) == 0
    before, write = file.read_text(), Path.write_text

    def full(path, text, *args, **kwargs):
        if path.parent == folder / "out":
            write(path, text[:10])
            raise OSError(28, "No space left on device")
        return write(path, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    assert main([*arguments, "--batch-size", "2"]) == 1
    printed = capsys.readouterr()
    assert "No space left" in printed.err and printed.out.count("Perplexity on one.txt") == 2
    assert file.read_text() == before


def test_evaluate_without_matplotlib(adapter, capsys, monkeypatch):
    """It is an extra: what is measured is written all the same, and said before it is measured."""
    _, folder = adapter
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["evaluate", str(folder / "base"), "--documents", str(folder / "one.txt"), "--lengths", "64"]
    arguments += ["--dense-only", "--passkey", "1", "--retrieval-lengths", "600", "--depths", "0", "--device", "cpu"]
    assert main([*arguments, "--output-dir", str(folder / "out")]) == 0
    printed = capsys.readouterr()
    assert "Tables alone: plots need matplotlib: pip install 'hf-longlora[plot]'" in printed.err
    assert "Written to" in printed.out and [path.name for path in (folder / "out").iterdir()] == ["evaluation.json"]


def test_evaluate_a_plain_model_with_passkeys(adapter, capsys, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("a folder here is nothing to ask the Hub for")

    monkeypatch.setattr("peft.config.hf_hub_download", asked)
    _, folder = adapter
    arguments = ["evaluate", str(folder / "base"), "--documents", str(folder / "one.txt"), "--lengths", "450"]
    arguments += ["--passkey", "1", "--needles", "1", "--retrieval-lengths", "600", "--depths", "0", "1"]
    assert main([*arguments, "--dense-only", "--output-dir", str(folder / "out"), "--device", "cpu"]) == 0
    results = json.loads((folder / "out" / "evaluation.json").read_text())
    assert list(results["perplexity"]) == ["dense"]
    printed = capsys.readouterr().out
    assert "│ 600 " in printed and "Passkeys found among several" in printed
    for kind in ("passkey", "needles"):
        assert [(row["length"], row["depth"]) for row in results[kind]] == [(600, 0.0), (600, 1.0)]
        assert (folder / "out" / f"{kind}.png").stat().st_size > 5_000


def test_evaluate_a_model_without_the_interface(adapter, capsys):
    _, folder = adapter
    config = FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(folder / "falcon")
    shutil.copy(folder / "base" / "tokenizer.json", folder / "falcon")
    shutil.copy(folder / "base" / "tokenizer_config.json", folder / "falcon")
    arguments = ["evaluate", str(folder / "falcon"), "--documents", str(folder / "one.txt"), "--lengths", "64"]
    arguments += ["--device", "cpu", "--output-dir", str(folder / "out")]
    assert main([*arguments, "--group-size", "32"]) == 1
    assert "With --dense-only" in capsys.readouterr().err
    for options in ([], ["--dense-only"]):
        assert main([*arguments, *options]) == 0
        printed = capsys.readouterr().out
        assert ("falcon doesn't say how it was trained: dense alone" in printed) == (not options)
        assert list(json.loads((folder / "out" / "evaluation.json").read_text())["perplexity"]) == ["dense"]


@pytest.mark.parametrize(("dense", "warned"), [(2.0, True), (0.5, False), (1.005, False)])
def test_a_warning_where_dense_is_worse(tiny_llama, monkeypatch, dense, warned):
    records = iter([[{"length": 64, "perplexity": dense}], [{"length": 64, "perplexity": 1.0}]])
    monkeypatch.setattr(compare, "perplexity_by_length", lambda *args, **kwargs: next(records))
    warnings = []
    monkeypatch.setattr(compare.logger, "warning", warnings.append)
    compare_attention(tiny_llama(), [], [64])
    assert [("dense_every" in warning and "2.00 against 1.00 at 64" in warning) for warning in warnings] == [
        True
    ] * warned


def test_what_is_compared(tiny_llama, monkeypatch):
    """By the active adapter's last stage; windows are dense, and compared with nothing unless a pattern is given."""
    seen, warnings = [], []

    def perplexities(model, *args, **kwargs):
        state = get_s2_attention(model)
        seen.append(state.config.group_size if state is not None and state.mode == "s2" else None)
        return [{"length": 64, "perplexity": 1.0 if seen[-1] else 2.0}]

    def schedule(*stages):
        return Schedule(stages, S2AttentionConfig(), 0, native_window=64).to_dict()

    monkeypatch.setattr(compare, "perplexity_by_length", perplexities)
    monkeypatch.setattr(compare.logger, "warning", warnings.append)
    model = get_peft_model(tiny_llama(), LongLoraConfig(r=4, target_length=256))
    set_s2_attention(model, S2AttentionConfig(group_size=24))
    config = model.peft_config["default"]

    def compared(**options):
        seen.clear()
        warnings.clear()
        return list(compare_attention(model, [], [64], **options)), seen[:], bool(warnings)

    given = S2AttentionConfig(group_size=8)
    assert compared() == (["dense", "as trained"], [None, 24], True)
    config.schedule = schedule(ContextStage(256, 1, group_size=16), ContextStage(256, 1, group_size=32))
    assert compare.trained_window(model) is None
    assert compared() == (["dense", "as trained"], [None, 32], True)
    assert compared(attention=given, name="groups of 8") == (["dense", "groups of 8"], [None, 8], False)
    config.schedule = schedule(ContextStage(256, 1), ContextStage(256, 1, sparse="pose"))
    assert compare.trained_window(model) == 64
    assert compared() == (["dense"], [None], False)
    assert compared(attention=given) == (["dense", "as trained"], [None, 8], True)
    config.schedule = None
    assert compare.trained_window(model) is None and compared()[1] == [None, 24]


def test_a_comparison_leaves_attention_as_it_was(tiny_llama, tmp_path, monkeypatch):
    seen = []

    def perplexities(model, *args, **kwargs):
        state = get_s2_attention(model)
        seen.append((state.config.group_size, state.mode))
        return [{"length": 64, "perplexity": 1.0}]

    monkeypatch.setattr(compare, "perplexity_by_length", perplexities)
    model = tiny_llama()
    compare_attention(model, [], [64])
    assert model.config._attn_implementation == "sdpa"
    set_s2_attention(model, S2AttentionConfig(group_size=24, kernel="reference"))
    compare_attention(model, [], [64])
    compare_attention(model, [], [64], attention=S2AttentionConfig(group_size=8))
    monkeypatch.setattr(compare, "perplexity_by_length", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare_attention(model, [], [64], attention=S2AttentionConfig(group_size=8))
    assert get_s2_attention(model) == S2State(S2AttentionConfig(group_size=24, kernel="reference"), "auto", 64)
    assert seen == [(size, mode) for size in (16, 24, 8) for mode in ("auto", "s2")]


def test_the_active_adapter_says_how_it_was_trained(tiny_llama):
    model = get_peft_model(tiny_llama(), LongLoraConfig(r=4, target_length=256))
    model.add_adapter("other", LongLoraConfig(r=2, target_length=256))
    for name, size in (("default", 32), ("other", 16)):
        stage = ContextStage(256, 1, group_size=size, sink_tokens=size // 2)
        model.peft_config[name].schedule = Schedule((stage,), S2AttentionConfig(), 0).to_dict()
    assert compare.trained_attention(model) == S2AttentionConfig(group_size=32, sink_tokens=16)
    model.set_adapter("other")
    assert compare.trained_attention(model) == S2AttentionConfig(group_size=16, sink_tokens=8)
    assert compare.trained_attention(tiny_llama()) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--documents", "one.txt"], "nowhere"),
        (["base", "--documents", "missing.txt"], "missing.txt does not exist"),
        (["base", "--documents", "base/model.safetensors"], "of no known kind; known are .jsonl, .json"),
        (["base", "--documents", "latin.txt"], "not UTF-8"),
        (["base", "--documents", "bad.jsonl"], "bad.jsonl: The column 'text' of the dataset has no text in 1 of 2"),
        (["base", "--documents", "null.jsonl"], "null.jsonl: The column 'text' of the dataset holds Value('null')"),
        (["base", "--documents", "one.txt", "--lengths", "100000"], "no document has 100000 tokens"),
        (["base", "--documents", "one.txt", "--group-size", "1"], "at least 2"),
        (["base", "--documents", "one.txt", "--output-dir", "one.txt"], "one.txt is no folder"),
        (["nowhere", "--documents", "one.txt", "--output-dir", "one.txt/new"], "one.txt/new can't be written to"),
        (["base", "--documents", "one.txt", "--output-dir", "/proc/new"], "/proc/new can't be written to"),
        (["base", "--documents", "one.txt", "--passkey", "1"], "a passkey text has at least"),
        (["base", "--documents", "one.txt", "--passkey", "-1"], "`trials` must be a whole number of at least 1"),
        (["base", "--documents", "one.txt", "--lengths", "450", "--passkey", "1", "--depths", "2"], "depth must lie"),
        (["base", "--documents", "one.txt", "--needles", "1"], "a passkey text has at least"),
    ],
)
def test_errors_are_one_message(adapter, monkeypatch, capsys, arguments, message):
    _, folder = adapter
    (folder / "null.jsonl").write_text('{"text": null}')
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 99)
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    monkeypatch.chdir(folder)
    lengths = [] if "--lengths" in arguments else ["--lengths", "64"]
    assert main(["evaluate", *arguments, *lengths, "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    assert message in printed[printed.index("hf-longlora: error:") :] and "Traceback" not in printed
    assert not (folder / "longlora-evaluation").exists()


def test_interruption_and_help(monkeypatch, capsys):
    from hf_longlora import demo

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert main(["demo"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    for arguments in ([], ["no-such-command"], ["evaluate"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and "hf-longlora 0" in capsys.readouterr().out


def test_a_damaged_adapter_is_not_taken_for_a_model(adapter, capsys):
    _, folder = adapter
    (folder / "adapter" / "adapter_config.json").write_text("{")
    arguments = ["evaluate", str(folder / "adapter"), "--documents", str(folder / "one.txt"), "--lengths", "64"]
    assert main([*arguments, "--device", "cpu"]) == 1
    assert "hf-longlora: error:" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# train


@pytest.fixture
def run(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    """A folder with a base, data and a run's YAML, to stand in."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    (tmp_path / "data").mkdir()
    for split, rows in (("train", 6), ("test", 2)):
        lines = [json.dumps({"text": f"{i} " + TEXT * 12}) for i in range(rows)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "notes.txt").write_text(TEXT)
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: base\n"
        "dataset_name: data\n"
        "output_dir: out\n"
        "stages:\n"
        "  - {max_length: 128, max_steps: 1}\n"
        "  - {max_length: 256, max_steps: 2, dense_every: 2}\n"
        "per_device_train_batch_size: 1\n"
        "use_cpu: true\n"
        "bf16: false\n"
        "report_to: none\n"
        "report: false\n"
        "lora_r: 4\n"
        "learning_rate: 1.0e-3\n"
    )
    return tmp_path


def test_train_from_yaml_and_resume(run, capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    evaluating = ["--eval_strategy", "steps", "--eval_steps", "3"]
    assert main(["train", "--config", "run.yaml", "--resume", "--lora_r", "2", *evaluating]) == 0
    printed = capsys.readouterr()
    assert "No whole checkpoint in out: starting afresh." in printed.err and "Saved in" in printed.out
    assert re.search(r"^data of stage 1: \d+ of \d+ examples.*tokens \(\d+%\), \S+ passes$", printed.err, re.M)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "out")
    config = model.active_peft_config
    assert (config.r, config.target_length) == (2, 256)  # the command line wins over the file
    assert [stage["max_steps"] for stage in config.schedule["stages"]] == [1, 2]
    state = json.loads((run / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry for entry in state["log_history"] if "eval_loss" in entry]

    shutil.rmtree(run / "out" / "checkpoint-3")
    before = (run / "out" / "adapter_model.safetensors").read_bytes()
    (run / "out" / "adapter_model.safetensors").unlink()
    assert main(["train", "--config=run.yaml", "--resume", "--lora_r", "2"]) == 0
    assert "Resuming from out/checkpoint-1." in capsys.readouterr().err
    assert (run / "out" / "adapter_model.safetensors").read_bytes() == before

    assert "nothing is left to train" not in caplog.text

    must_resume = ["train", "--config=run.yaml", "--lora_r", "2", "--resume_from_checkpoint", "true"]
    assert main(must_resume) == 0
    assert "checkpoint-3 is of the run's last step, 3: nothing is left to train. To train further" in caplog.text
    assert (run / "out" / "adapter_model.safetensors").read_bytes() == before
    assert "Starting afresh" not in capsys.readouterr().err
    assert main([*must_resume, "--output_dir", "new"]) == 1
    assert "There is no whole checkpoint in new" in capsys.readouterr().err
    assert main(["train", "--config=run.yaml", "--lora_r", "2"]) == 0
    said = "Starting afresh beside out/checkpoint-3, whose place others will take: --resume goes on from it."
    assert said in capsys.readouterr().err


def test_train_with_the_adapters_own_options_and_without_an_adapter(run):
    stages = '[{"max_length": 128, "max_steps": 1}]'
    assert main(["train", "--config", "run.yaml", "--embedding_rank", "2", "--output_dir", "low-rank"]) == 0
    config = json.loads((run / "low-rank" / "adapter_config.json").read_text())
    assert config["embedding_rank"] == 2

    arguments = ["--no_use_peft", "--stages", stages, "--dataset_name", "data/test.jsonl", "--report", "false"]
    assert main(["train", "--config", "run.yaml", *arguments]) == 0
    assert (run / "out" / "model.safetensors").is_file() and not (run / "out" / "adapter_config.json").exists()


@pytest.mark.slow
def test_train_under_accelerate_launch(run):
    """Two processes, by the module, as the help says."""
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "hf_longlora"]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launch, "train", "--config", "run.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Saved in") == 1
    state = json.loads((run / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and (run / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", None),
        ("nonsense: 1", "unknown options: nonsense"),
        ("lerning_rate: 1.0e-3", "unknown options: lerning_rate (did you mean learning_rate?)"),
        ("rope_type: yarn", "unknown options: rope_type (each stage has its own"),
        ("eval_strategy: steps\neval_steps: 0", "`eval_steps=0` would evaluate as often as `logging_steps`"),
        (
            "per_device_train_batch_size: 0",
            "`per_device_train_batch_size` must be a whole number of at least 1, got 0",
        ),
        ("stages: [", "not YAML"),
        ("lora_r:\nmodel_revision: null\nhub_model_id: null", "has no value for lora_r, model_revision: give one"),
        ("lora_r: 4\nlora_alpha: 8\nlora_r: 8", "has lora_r more than once"),
        ("lora_r: 8.0", "`r` must be a whole number of at least 1, got 8.0"),
        ("dataset_name: [data, data]", "has more than a single value for dataset_name."),
        ("learning_rate: {a: 1}", "has more than a single value for learning_rate."),
        ("chat_template_path: chat.jinja", "chat.jinja does not exist (chat_template_path)"),
        ("lora_modules_to_save: lm_head", "modules_to_save must be a list of names, got 'lm_head'"),
        ("stages: sometimes", "`stages` must be"),
        ("stages: [{max_length: 128}]", "missing ['max_steps']"),
        ("model_name_or_path: null", "model_name_or_path"),
        ("model_name_or_path: ./nothing", "the model ./nothing is no folder here, and can't be had"),
        ("dataset_name: null", "dataset_name"),
        ("dataset_name: mixed", "data files of one kind"),
        ("dataset_name: unlike", "files with the same columns: "),
        ("dataset_name: run.yaml", "no known kind"),
        ("dataset_name: nobody/nothing", "no local file or folder"),
        ("dataset_train_split: validation", "no split 'validation' (dataset_train_split); it has 'train', 'test'"),
        ("dataset_name: numbers.jsonl\ndataset_streaming: true", "not text alone"),
        ("dataset_name: gaps.jsonl\ndataset_streaming: true", "'text' of the stream has nothing in row 1"),
        ("dataset_streaming: true\neval_strategy: steps", "say by `max_eval_examples` how many"),
        ("output_dir: notes.txt", "notes.txt is no folder"),
        ("dataset_name: empty.jsonl", "empty.jsonl holds no data"),
        ("dataset_name: gaps.jsonl", "has no text in 1 of 2 rows, such as row 1"),
        ("dataset_name: numbers.jsonl", "not text alone"),
        ("model_name_or_path: adapter", "adapter is an adapter, and training starts from a model"),
        ("stages: [{max_length: 128, max_steps: 1, group_size_ratio: 1/16}]", "got '1/16'"),
    ],
)
def test_mistakes_in_a_runs_file_are_one_message(run, capsys, line, message):
    lines = (run / "run.yaml").read_text().splitlines()
    key = line.partition(":")[0]
    kept = [old for old in lines if not (key and (old.startswith(f"{key}:") or (key == "stages" and old[0] == " ")))]
    for name, second in (("gaps", "null"), ("numbers", "7")):
        (run / f"{name}.jsonl").write_text(f'{{"text": {json.dumps(TEXT)}}}\n{{"text": {second}}}\n')
    (run / "empty.jsonl").write_text("")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "mixed").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (run / "mixed" / name).write_text("{}")
    (run / "unlike").mkdir()
    for name in ("text", "messages"):
        (run / "unlike" / f"{name}.jsonl").write_text(json.dumps({name: "words"}))
    (run / "wrong.yaml").write_text("\n".join([*kept, line]) if message else "just text")
    assert main(["train", "--config", "wrong.yaml"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("hf-longlora: error:") == 1 and "Traceback" not in printed
    assert (message or "must contain a YAML mapping") in printed
    assert not (run / "out").exists()


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("q_proj", {"q_proj"}),
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("all-linear", "all-linear"),
        (r".*\.0\..*q_proj", r".*\.0\..*q_proj"),
    ],
)
def test_targets_of_lora_are_names_one_alone_too(run, given, targets):
    """Of a list of one TRL makes a string, which PEFT takes for a pattern of the whole name."""
    text = (run / "run.yaml").read_text() + f"lora_target_modules: {json.dumps(given)}\n"
    (run / "targets.yaml").write_text(text)
    _, model, _ = parse(["--config", "targets.yaml"])
    assert _adapter(model).target_modules == targets


def test_trains_usage(run, capsys, monkeypatch):
    (run / "wrong.yaml").write_text((run / "run.yaml").read_text().replace("1.0e-3", "many"))
    for arguments in (["--bogus", "1"], ["--config"], ["word"], ["--lora_r", "two"], ["--config", "wrong.yaml"]):
        with pytest.raises(SystemExit) as stopped:
            main(["train", *arguments])
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main(["train", "--lerning_rate", "1"])
    assert "unknown: --lerning_rate (did you mean --learning_rate?)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "accelerate launch -m hf_longlora train" in printed
    assert all(option in printed for option in ("--stages", "--train_norms", "--resume", "--learning_rate"))
    assert "--sparse {auto,s2,windows,pose}" in printed
    assert main(["train", "--config", "missing.yaml"]) == 1
    monkeypatch.setenv("HF_LONGLORA_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", "--config", "missing.yaml"])


def test_a_kernel_that_no_command_takes_is_not_missed(tmp_path, caplog):
    assert main(["check", str(tmp_path)]) == 1
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    assert "gemm_4bit_forward" not in caplog.text


def test_the_very_run_is_planned(run, capsys):
    arguments = ["plan", "--config", "run.yaml", "--gpu", "h100", "--gpus", "4"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(stage["steps"], stage["sequences"]) for stage in found["stages"]] == [(1, 4), (2, 8)]
    config = AutoConfig.from_pretrained("base")
    for stage, length in zip(found["stages"], (128, 256), strict=True):
        settings = {"adapter": LongLoraConfig(r=4), "dtype": "float32", "sparse": "windows", "dense_every": 2}
        expected = plan_run(config, [length], gpu="H100", **settings).lengths[0]
        assert stage["step"] == asdict(expected) and stage["hours"] == stage["steps"] * expected.seconds / 3600
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("base: 0.00 B parameters") and "on 4 H100 (79.2 GiB)" in printed
    assert "stage 2, 256 tokens: 0.0 GiB" in printed and "2 steps (8 sequences, 0.0 M tokens)" in printed

    text = (run / "run.yaml").read_text()
    text = text[: text.index("stages:")] + text[text.index("per_device") :].replace("lora_r: 4\n", "use_peft: false\n")
    (run / "auto.yaml").write_text(text + "stages: auto\nmax_length: 512\nmax_steps: 10\n")
    assert main(["plan", "--config", "auto.yaml", "--gpu", "H100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(stage["step"]["length"], stage["steps"]) for stage in found["stages"]] == [(128, 2), (512, 8)]
    assert found["trainable"] == found["parameters"]

    assert "planned in windows of 64 tokens, as plain text is trained" in printed
    on_a_card = (run / "run.yaml").read_text().replace("use_cpu: true\nbf16: false\n", "tf32: true\n")
    (run / "card.yaml").write_text(on_a_card)
    assert main([*arguments[:2], "card.yaml", *arguments[3:]]) == 0  # on a machine that has none
    assert capsys.readouterr().out == printed

    for wrong in (["plan"], ["plan", "base", "--config", "run.yaml"]):
        assert main(wrong) == 1
        assert "plan takes a model, or a run's file by --config" in capsys.readouterr().err
    assert main(["plan", "base", "--gpus", "0"]) == 1
    assert "--gpus must be at least 1" in capsys.readouterr().err


def test_a_run_says_its_plan_before_its_weights_are_loaded(run, capsys, monkeypatch):
    monkeypatch.setattr("hf_longlora.planning.local_gpu", lambda: find_gpu("H100"))
    (run / "base" / "model.safetensors").unlink()
    assert main(["train", "--config", "run.yaml"]) == 1  # for want of weights
    printed = capsys.readouterr().err
    assert re.search(
        r"Planned on one H100 \(79.2 GiB\): \d+\.\d GiB at most, \S+ h in all\n  stage 1, 128 tok", printed
    )
    assert printed.index("stage 2, 256 tokens") < printed.index("hf-longlora: error:")

    def refuse(*args, **kwargs):
        raise ValueError("a decoder without attention")

    monkeypatch.setattr("hf_longlora.trainer.plan_stages", refuse)
    assert main(["train", "--config", "run.yaml"]) == 1
    printed = capsys.readouterr().err
    assert "The run can't be planned: a decoder without attention" in printed and "base" in printed.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------------------
# Options that can't be, or would be passed over


TEXTS = "evaluate base --documents one.txt --lengths 64"
KEYS = "evaluate base --passkey 1 --lengths 400"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "plan --config run.yaml --lengths 64 --no-train-embeddings",
            "--lengths, --no-train-embeddings: with --config it is r",
        ),
        ("plan base --gpus 8", "--gpus: the cards of a run; give its file by --config"),
        (f"{KEYS} --stride 8 --group-size 2", "--stride, --group-size: for --documents, which aren't given"),
        (f"{TEXTS} --depths 0 --retrieval-lengths 400", "--depths, --retrieval-lengths: for --passkey or --needles"),
        (f"{TEXTS} --trials 3 --no-chat-template", "--trials, --chat-template: for --tasks, which aren't given"),
        (
            f"{TEXTS} --dense-only --group-size 16",
            "--group-size: the pattern of training, which --dense-only leaves out",
        ),
        (f"{KEYS} --batch-size 2", "--batch-size: for --documents or --tasks, which aren't given"),
        ("check base --rope-type yarn", "--rope-type: of a longer RoPE; give its --target-length"),
        (
            "plan base --no-use-peft --no-train-embeddings --base-length 32",
            "--no-train-embeddings, --base-length: of an adapter, and",
        ),
        (f"{TEXTS} --device gpu", "--device gpu: Expected one of cpu, cuda"),
        ("merge adapter out --device gpu", "--device gpu: Expected one of cpu, cuda"),
        ("export adapter out --form lora --dtype float32", "--dtype: for a merged model"),
        (
            "train --config run.yaml --use_peft false --train_norms false",
            "train_norms: of an adapter, and use_peft=false",
        ),
    ],
)
def test_options_that_say_nothing_are_refused(adapter, capsys, monkeypatch, arguments, message):
    _, folder = adapter
    monkeypatch.chdir(folder)
    run = "model_name_or_path: base\ndataset_name: documents.jsonl.gz\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
    (folder / "run.yaml").write_text(run + "stages: [{max_length: 128, max_steps: 1}]\n")
    assert main(arguments.split()) == 1
    assert f"hf-longlora: error: {message}" in capsys.readouterr().err
    assert not (folder / "out").exists() and not (folder / "longlora-evaluation").exists()


# --------------------------------------------------------------------------------------------------------------------
# merge, export


def test_merge_and_export(adapter, capsys):
    _, folder = adapter
    assert main(["merge", str(folder / "adapter"), str(folder / "merged")]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder / "merged").config.max_position_embeddings == 256
    assert main(["export", str(folder / "adapter"), str(folder / "plain"), "--form", "lora"]) == 0
    assert json.loads((folder / "plain" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "carries no RoPE" in capsys.readouterr().out
    for output, message in (("merged", "not empty"), ("one.txt", "one.txt exists and is not empty")):
        assert main(["merge", str(folder / "adapter"), str(folder / output)]) == 1
        assert message in capsys.readouterr().err
