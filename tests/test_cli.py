import gzip
import json

import pytest
import torch
from peft import get_peft_model

from hf_longlora import LongLoraConfig, S2AttentionConfig, perplexity_by_length, s2_attention_mode, set_s2_attention
from hf_longlora.cli import main, read_documents
from hf_longlora.evaluation import compare
from hf_longlora.evaluation.compare import compare_attention

TEXT = "The quick brown fox jumps over the lazy dog, and a long book has many chapters. "


@pytest.fixture
def adapter(tiny_llama, tiny_tokenizer, tmp_path):
    """A saved adapter on a saved base, and a file of documents."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LongLoraConfig(r=4, target_length=256))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.active_peft_config.schedule = {"group_sizes": [16, 32], "attention": {"shift": "all"}}
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
    documents = [document for file in files for document in read_documents(type(folder)(file))]
    assert len(documents) == 4
    options = dict(tokenizer=tiny_tokenizer, progress=False)
    set_s2_attention(model, S2AttentionConfig(group_size=32, shift="all"))  # as the last stage ended
    assert results["perplexity"]["dense"] == perplexity_by_length(model, documents, [64, 256], **options)
    with s2_attention_mode(model, "s2"):
        assert results["perplexity"]["as trained"] == perplexity_by_length(model, documents, [64, 256], **options)
    assert results["perplexity"]["dense"] != results["perplexity"]["as trained"]
    printed = capsys.readouterr().out
    assert f"{results['perplexity']['dense'][1]['perplexity']:.2f}" in printed and "as trained" in printed


def test_evaluate_a_plain_model_with_passkeys(adapter, capsys):
    _, folder = adapter
    arguments = ["evaluate", str(folder / "base"), "--documents", str(folder / "one.txt"), "--lengths", "450"]
    assert main([*arguments, "--passkey", "1", "--output-dir", str(folder / "out"), "--device", "cpu"]) == 0
    passkey = json.loads((folder / "out" / "evaluation.json").read_text())["passkey"]
    assert [row["depth"] for row in passkey] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert "450 tokens" in capsys.readouterr().out
    assert (folder / "out" / "passkey.png").stat().st_size > 5_000


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--documents", "one.txt"], "nowhere"),
        (["base", "--documents", "missing.txt"], "missing.txt does not exist"),
        (["base", "--documents", "base/model.safetensors"], "not UTF-8"),
        (["base", "--documents", "bad.jsonl"], "bad.jsonl, line 2"),
        (["base", "--documents", "one.txt", "--lengths", "100000"], "no document has 100000 tokens"),
        (["base", "--documents", "one.txt", "--group-size", "1"], "at least 2"),
    ],
)
def test_errors_are_one_message(adapter, monkeypatch, capsys, arguments, message):
    _, folder = adapter
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
