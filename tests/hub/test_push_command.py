"""`hf-longlora push` to a Hub on the loopback interface."""

import json

import pytest

from hf_longlora import LongLoraConfig
from hf_longlora.cli import main
from tests.tuner.helpers import llama, perturbed

REPO = "user/long"


@pytest.fixture
def folder(tmp_path):
    """An adapter with what a run leaves beside it, without a card."""
    folder = tmp_path / "out"
    base = llama()
    base.name_or_path = "someone/llama"
    perturbed(base, LongLoraConfig(target_length=256)).save_pretrained(folder)
    (folder / "README.md").unlink()
    for kept_out in ("checkpoint-3/optimizer.pt", "last-good/adapter_model.safetensors", "runs/events", ".hidden"):
        (folder / kept_out).parent.mkdir(exist_ok=True)
        (folder / kept_out).write_text("stays here")
    return folder


def test_an_adapter_and_its_card_go_to_a_private_repository(folder, hub, token, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(folder), REPO, "--private", "--message", "First"]) == 0
    repo = hub.repos[REPO]
    assert repo.private and repo.commits[-1][0] == "First"
    assert set(repo.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert repo.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    card = repo.files["README.md"].decode()
    assert "64 to 256 tokens" in card and f'PeftModel.from_pretrained(base, "{REPO}")' in card
    printed = capsys.readouterr()
    assert "is on the Hub" in printed.out and token not in printed.out + printed.err

    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")  # a card that is there is sent as it is
    assert main(["push", str(folder), REPO]) == 0
    assert hub.repos[REPO].files["README.md"].endswith(b"mine\n")


def test_nothing_that_is_to_be_private_goes_to_a_public_repository(folder, hub, token, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(folder), REPO]) == 0 and not hub.repos[REPO].private
    commits = len(hub.repos[REPO].commits)
    assert main(["push", str(folder), REPO, "--private"]) == 1
    assert f"{REPO} is there already and public" in capsys.readouterr().err
    assert len(hub.repos[REPO].commits) == commits
    hub.repos[REPO].private = True
    for options in (["--private"], []):
        assert main(["push", str(folder), REPO, *options]) == 0


@pytest.mark.parametrize(("text", "kept"), [("# Mine\n", True), ("", False)])
def test_a_card_that_was_edited_on_the_hub_stays(folder, hub, token, monkeypatch, capsys, text, kept):
    """Metadata alone is what the Hub writes into a new repository."""
    metadata = "---\nlicense: mit\n---\n"
    there = metadata + text
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(folder), REPO]) == 0
    hub.repos[REPO].commits.append(("Edited on the Hub", hub.repos[REPO].files | {"README.md": there.encode()}))
    (folder / "new.txt").write_text("new")
    assert main(["push", str(folder), REPO]) == 0
    files = hub.repos[REPO].files
    assert files["new.txt"] == b"new" and (files["README.md"].decode() == there) == kept
    assert ("has a card of its own, which stays as it is" in capsys.readouterr().out) == kept
    (folder / "README.md").write_text(f"{metadata}mine, too")  # and so does one that was edited here
    assert main(["push", str(folder), REPO]) == 0
    assert hub.repos[REPO].files["README.md"].endswith(b"mine, too")


def test_a_base_that_others_have_not_is_told_of(folder, hub, token, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", token)
    file = folder / "adapter_config.json"
    for base, told in (("someone/llama", False), (str(tmp_path), True)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
        assert main(["push", str(folder), REPO]) == 0
        assert ("a folder that others have not" in capsys.readouterr().err) == told


@pytest.mark.parametrize("trouble", [503, 403, "drop"])
def test_trouble_is_one_message_and_nothing_is_lost(folder, hub, token, monkeypatch, capsys, trouble):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.trouble = lambda method, path: trouble if "commit" in path else None
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["push", str(folder), REPO]) == 1
    printed = capsys.readouterr().err
    assert printed.count("hf-longlora: error:") == 1 and "Traceback" not in printed and token not in printed
    assert "complete here, and the same command tries again" in printed
    assert all(path.read_bytes() == content for path, content in before.items())
    hub.trouble = lambda method, path: None
    assert main(["push", str(folder), REPO]) == 0


def test_what_can_not_be_pushed(folder, hub, monkeypatch, tmp_path, capsys):
    assert main(["push", str(folder), REPO]) == 1
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(folder), REPO]) == 1
    assert "could not be pushed" in capsys.readouterr().err
    assert main(["push", str(tmp_path), REPO]) == 1
    assert "no adapter_config.json" in capsys.readouterr().err
    assert not hub.repos
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/llama"
