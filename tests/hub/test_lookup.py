"""What is asked of a Hub and not given: one message that says why, and what to do."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from hf_longlora import LongLoraConfig, perplexity_by_length
from hf_longlora.cli import main
from hf_longlora.lookup import reason
from tests.tuner.helpers import llama, perturbed

PRIVATE, MISSING = "user/private", "user/missing"
COMMANDS = {
    "evaluate": ["evaluate", "NAME", "--documents", "book.txt", "--lengths", "64"],
    "merge": ["merge", "NAME", "merged"],
    "export": ["export", "NAME", "plain", "--form", "lora"],
    "check": ["check", "NAME"],
    "plan": ["plan", "NAME"],
    "train": [
        *("train", "--model_name_or_path", "NAME", "--dataset_name", "book.txt", "--output_dir", "out"),
        *("--stages", '[{"max_length": 128, "max_steps": 1}]', "--use_cpu", "true", "--bf16", "false"),
    ],
}
NO_RIGHT = "there is no such repository, or your token is not valid or may not read it (`hf auth login`, or HF_TOKEN)"
NO_TOKEN = "or it is private and you are not logged in (`hf auth login`, or HF_TOKEN)"


@pytest.fixture
def private(hub, token, tmp_path, monkeypatch):
    """A private adapter, in a folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text("It was a bright day. " * 50)
    perturbed(llama(), LongLoraConfig(target_length=256)).save_pretrained(tmp_path / "adapter")
    api = HfApi(endpoint=hub.url, token=token)
    api.create_repo(PRIVATE, private=True)
    api.upload_folder(repo_id=PRIVATE, folder_path=tmp_path / "adapter")
    return hub


def name_base(folder, base):
    """Write into the adapter's config what its base is called."""
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


def said(capsys, command, name):
    """What a command that fails says."""
    arguments = [name if argument == "NAME" else argument for argument in COMMANDS[command]]
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.count("hf-longlora: error: ") == 1 and "Traceback" not in printed and "hf_" not in printed
    message = printed[printed.index("hf-longlora: error: ") :]
    assert message.count("\n") == 1 and name in message
    return message


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_the_hub_does_not_give(private, token, monkeypatch, capsys, command):
    assert f"the Hub answers 401: there is no such repository, {NO_TOKEN}" in said(capsys, command, PRIVATE)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"the Hub answers 401: {NO_RIGHT}" in said(capsys, command, PRIVATE)
    monkeypatch.setenv("HF_TOKEN", token)
    assert f"the Hub answers 404: {NO_RIGHT}" in said(capsys, command, MISSING)


def test_the_base_of_an_adapter_is_another_s(private, token, monkeypatch, capsys, tmp_path):
    name_base(tmp_path, MISSING)
    monkeypatch.setenv("HF_TOKEN", token)
    assert f"the base of adapter, {MISSING}, can't be had: the Hub answers 404" in said(capsys, "evaluate", "adapter")
    assert f"the base of adapter, {MISSING}, can't be had: the Hub answers 404" in said(capsys, "merge", "adapter")


@pytest.mark.parametrize("command", ["evaluate", "merge"])
def test_a_base_that_was_moved_or_never_named_is_told_of(private, capsys, tmp_path, command):
    """The Hub's rules for names are no help, nor is an option that a command has not."""
    name_base(tmp_path, "/nowhere/base")
    assert "the base of adapter, /nowhere/base, can't be had: there is no such folder" in said(
        capsys, command, "adapter"
    )
    name_base(tmp_path, "")
    assert "doesn't name its base model: write it into its adapter_config.json" in said(capsys, command, "adapter")


def test_an_adapter_that_one_may_read(private, token, monkeypatch, capsys, tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["merge", PRIVATE, "merged", "--base", "base"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.max_position_embeddings == 256


def test_an_adapter_evaluated_by_its_name_is_that_of_the_folder(private, token, monkeypatch, tmp_path, tiny_tokenizer):
    llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    name_base(tmp_path, tmp_path / "base")
    (tmp_path / "adapter" / "README.md").unlink()  # PEFT's
    HfApi(endpoint=private.url, token=token).upload_folder(repo_id=PRIVATE, folder_path=tmp_path / "adapter")
    monkeypatch.setenv("HF_TOKEN", token)
    arguments = [PRIVATE if part == "NAME" else part for part in COMMANDS["evaluate"]]
    assert main([*arguments, "--dense-only", "--output-dir", "adapter"]) == 0
    assert "| dense |" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_adapter_is_evaluated_with_its_own_tokenizer(private, token, monkeypatch, tmp_path, tiny_tokenizer):
    """It may have tokens that the base's lacks; here the base has none."""
    llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path, tmp_path / "base")
    HfApi(endpoint=private.url, token=token).upload_folder(repo_id=PRIVATE, folder_path=tmp_path / "adapter")
    monkeypatch.setenv("HF_TOKEN", token)
    arguments = [PRIVATE if part == "NAME" else part for part in COMMANDS["evaluate"]]
    assert main([*arguments, "--dense-only", "--output-dir", "results"]) == 0


def test_an_adapter_s_name_is_no_model_s(private, token, monkeypatch, capsys, tmp_path):
    name_base(tmp_path, tmp_path / "base")
    HfApi(endpoint=private.url, token=token).upload_folder(repo_id=PRIVATE, folder_path=tmp_path / "adapter")
    llama().config.save_pretrained(tmp_path / "base")
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["check", PRIVATE]) == 0
    assert f"{PRIVATE}, an adapter of {tmp_path / 'base'}: LlamaForCausalLM" in capsys.readouterr().out
    assert f"{PRIVATE} is an adapter and no model: give its base, {tmp_path / 'base'}" in said(capsys, "plan", PRIVATE)
    assert f"{PRIVATE} is an adapter, and training starts from a model" in said(capsys, "train", PRIVATE)


def test_the_base_is_had_at_the_adapter_s_revision(
    private, token, make, monkeypatch, tmp_path, tiny_llama, tiny_tokenizer
):
    """On the main branch lie another config, weights that don't fit and a damaged tokenizer."""
    base, api = tiny_llama(), HfApi(endpoint=private.url, token=token)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    api.create_repo("user/base")
    revision = api.upload_folder(repo_id="user/base", folder_path=tmp_path / "base").oid
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "newer")
    (tmp_path / "newer" / "tokenizer_config.json").write_text("{")
    api.upload_folder(repo_id="user/base", folder_path=tmp_path / "newer")
    base.name_or_path = "user/base"
    config = LongLoraConfig(target_length=256, revision=revision, train_norms=False, train_embeddings=False)
    model = perturbed(base, config)
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("HF_TOKEN", token)

    assert main([*(part.replace("NAME", "adapter") for part in COMMANDS["evaluate"]), "--output-dir", "results"]) == 0
    results = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    book = [(tmp_path / "book.txt").read_text()]
    expected = perplexity_by_length(model, book, [64], tokenizer=tiny_tokenizer, progress=False)
    assert results["perplexity"]["dense"][0]["perplexity"] == pytest.approx(expected[0]["perplexity"])
    assert main(["check", "adapter"]) == 0
    assert main(["merge", "adapter", "merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    torch.testing.assert_close(merged, model.merge_and_unload().state_dict())
    assert main(["export", "adapter", "plain", "--form", "lora"]) == 0
    assert json.loads((tmp_path / "plain" / "base" / "config.json").read_text())["num_hidden_layers"] == 2
    readme = (tmp_path / "plain" / "README.md").read_text()
    assert f'"user/base", config=config, revision="{revision}")' in readme and f"--revision {revision} " in readme
    for folder in ("merged", "plain/base"):
        assert (tmp_path / folder / "tokenizer_config.json").is_file()
    trainer = make(model="user/base", model_init_kwargs={"revision": revision})
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == revision


@pytest.mark.parametrize("trouble", [500, 403])
def test_another_answer(private, token, monkeypatch, capsys, trouble):
    monkeypatch.setenv("HF_TOKEN", token)
    private.trouble = lambda method, path: trouble
    expected = "the Hub answers 500; try again later" if trouble == 500 else f"the Hub answers 403: {NO_RIGHT}"
    assert expected in said(capsys, "merge", PRIVATE)


def test_what_is_no_answer_of_the_hub_is_said_as_it_is():
    assert reason(OSError("no route to host")) == "no route to host"
    assert reason(TimeoutError()) == "TimeoutError"
