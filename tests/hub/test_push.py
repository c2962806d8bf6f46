"""Pushing an adapter to a Hub, one with a bad day too. The Hub is `server.py`'s."""

import copy
import json
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback
from trl import SFTConfig

from hf_longlora import PushAdapterCallback
from hf_longlora.cli import main
from hf_longlora.hub import push
from hf_longlora.hub.card import MARK, weights_sha256

from ..trainer.helpers import Stop, texts
from .server import Repo

REPO = "user/adapter"
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def said(monkeypatch, caplog):
    """What the pushes log."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)

    def messages():
        return [record.getMessage() for record in caplog.records if record.name == push.logger.name]

    monkeypatch.setattr(push.logger, "propagate", True)
    return messages


def callback(token, **options):
    return PushAdapterCallback(REPO, token=token, **dict(backoff=0.05, patience=60) | options)


def wait_until(happened):
    """For long, if need be: the machine may have much else to do."""
    until = time.monotonic() + 240
    while not happened() and time.monotonic() < until:
        time.sleep(0.01)


class Clock:
    """What pushes measure their patience by: it goes on where a request stalls, and nowhere else."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def stall(self, times, patience):
        """A hub's trouble: the first uploads stall, for longer than a push waits."""

        def decide(method, path):
            if "/lfs/" in path and self.now < times * patience:
                self.now += patience
                return "stall"
            return None

        return decide


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(push, "time", clock)
    return clock


def summaries(hub):
    return [summary for summary, _ in hub.repos[REPO].commits]


def waiting(tmp_path):
    """Adapters that were not pushed."""
    return sorted(path.name for path in (tmp_path / "out" / push.FOLDER).glob("*"))


# --- Trainer's own arguments ----------------------------------------------------------------------------------------


def test_push_to_hub_by_the_trainer_s_arguments(make, hub, token, tiny_llama, tmp_path):
    trainer = make(push_to_hub=True, hub_model_id=REPO, hub_token=token, hub_private_repo=True, report=True)
    trainer.train()
    trainer.push_to_hub(dataset_name="someone/books")
    repo = hub.repos[REPO]
    assert repo.private and ADAPTER | {"report.html", "loss.png", "run.json"} <= set(repo.files)
    assert repo.files["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert any(path.startswith("/lfs/") for method, path in hub.requests if method == "PUT")
    card = ModelCard(repo.files["README.md"].decode())
    assert card.data.datasets == ["someone/books"] and "sft" in card.data.tags
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in card.text
    assert "| 2 | 256 | 3 | shifted sparse | 64 | 4 | never |" in card.text


def test_checkpoints_are_pushed_with_their_card(make, hub, token):
    """At its own pace: Trainer uploads from the output directory while it goes on to write there."""
    options = dict(push_to_hub=True, hub_model_id=REPO, hub_token=token, save_strategy="steps", save_steps=100)
    make(**options, stages=[{"max_length": 128, "max_steps": 2}]).train()
    ((_, files),) = hub.repos[REPO].commits
    assert set(files) >= ADAPTER and "- steps: 2, batch size 2" in files["README.md"].decode()


def test_a_pushed_adapter_is_loaded_by_name(make, hub, token, tiny_llama, monkeypatch, tmp_path):
    trainer = make(callbacks=[callback(token, private=True)])
    torch.manual_seed(0)
    base = tiny_llama()
    trainer.train()
    monkeypatch.setenv("HF_TOKEN", token)
    model = PeftModel.from_pretrained(base, REPO, cache_dir=str(tmp_path / "cache")).eval()
    assert model.config.rope_parameters["factor"] == 4.0
    ids = torch.arange(3, 103)[None]
    assert torch.allclose(model(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5)


def test_a_private_adapter_and_a_wrong_token_are_one_message(make, hub, token, tiny_llama, monkeypatch, tmp_path):
    make(callbacks=[callback(token, private=True)]).train()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'user/adapter'") as error:
        PeftModel.from_pretrained(tiny_llama(), REPO, cache_dir=str(tmp_path / "cache"))
    reason = error.value.__context__  # PEFT says what it did not find, this says why
    assert isinstance(reason, RepositoryNotFoundError) and "make sure you are authenticated" in str(reason)
    assert "hf_wrong" not in str(error.value) + str(reason)


def test_a_private_repository_with_a_wrong_token_is_one_message(make, hub, token, tmp_path):
    HfApi(endpoint=hub.url, token=token).create_repo(REPO, private=True)
    with pytest.raises(HfHubHTTPError) as error:
        make(push_to_hub=True, hub_model_id=REPO, hub_token="hf_wrong")
    assert "hf_wrong" not in str(error.value)


# --- the callback ---------------------------------------------------------------------------------------------------


def test_a_push_at_the_end_of_each_stage(make, hub, token, said, tmp_path):
    make(callbacks=[callback(token)]).train()
    assert summaries(hub)[-1] == "Adapter of step 6" and set(summaries(hub)) <= {
        "Adapter of step 3",
        "Adapter of step 6",
    }
    assert not said() and not (tmp_path / "out" / push.FOLDER).exists()
    files = hub.repos[REPO].files
    assert set(files) >= ADAPTER | {"run.json", "tokenizer.json"} and not any("optimizer" in name for name in files)
    assert json.loads(files["adapter_config.json"])["rope"]["rope_parameters"]["factor"] == 4.0


class Slow(TrainerCallback):
    """Waits after each step for the pushes of it."""

    def on_step_end(self, args, state, control, **kwargs):
        wait_until(lambda: not Path(args.output_dir, push.FOLDER).exists())


def test_a_push_every_n_steps_and_at_the_end(make, hub, token, said):
    make(callbacks=[callback(token, every_n_steps=4), Slow()]).train()
    assert summaries(hub) == ["Adapter of step 4", "Adapter of step 6"]
    early = json.loads(hub.repos[REPO].commits[0][1]["adapter_config.json"])
    assert early["rope"]["rope_parameters"]["factor"] == 4.0
    card = hub.repos[REPO].commits[0][1]["README.md"].decode()
    assert "- steps: 4 of 6" in card and "- data: 12 examples, packed (wrapped)" in card


def test_a_run_that_is_stopped_early_is_pushed_as_it_stands(make, hub, token):
    make(callbacks=[Stop(2), callback(token)]).train()
    assert summaries(hub) == ["Adapter of step 2"]


def test_the_adapter_of_plain_lora_may_be_pushed_too(tiny_llama, tiny_tokenizer, hub, token, tmp_path):
    from datasets import Dataset
    from trl import SFTTrainer

    SFTTrainer(
        tiny_llama(),
        SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1),
        train_dataset=Dataset.from_dict({"text": ["It was a bright day."] * 8}),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=2),
        callbacks=[callback(token)],
    ).train()
    assert set(hub.repos[REPO].files) >= ADAPTER


def once(fragment, trouble, times=1):
    """Trouble for the first requests whose path has `fragment`."""
    left = [times]

    def decide(method, path):
        if fragment in path and left[0] > 0:
            left[0] -= 1
            return trouble
        return None

    return decide


@pytest.mark.parametrize("trouble", ["drop", 503])
@pytest.mark.parametrize("where", ["/lfs/", "/commit/", "/preupload/", "/repos/create", "validate-yaml"])
def test_trouble_that_passes_loses_nothing(make, hub, token, said, tmp_path, where, trouble):
    # huggingface_hub itself tries some requests six times, by its version
    hub.trouble = once(where, trouble, times=7 if where in ("/lfs/", "/preupload/") else 2)
    make(stages=[{"max_length": 128, "max_steps": 2}], callbacks=[callback(token, retries=8, backoff=0.02)]).train()
    assert summaries(hub) == ["Adapter of step 2"] and set(hub.repos[REPO].files) >= ADAPTER
    assert said() and all("Next try in" in message for message in said())
    assert not (tmp_path / "out" / push.FOLDER).exists()


@pytest.mark.parametrize("trouble", ["drop", "stall", 500])
def test_trouble_that_stays_ends_no_training(make, hub, token, said, tiny_llama, tmp_path, clock, trouble):
    hub.trouble = lambda method, path: trouble if "/lfs/" in path else None
    if trouble == "stall":
        hub.trouble = clock.stall(times=99, patience=1)
    trainer = make(callbacks=[callback(token, retries=1, patience=1)])
    assert trainer.train().global_step == 6
    assert clock.now <= 5  # a push of each adapter, and two more of the last
    last = said()[-1]
    folder = tmp_path / "out" / push.FOLDER / "step-6"
    assert last.startswith("The adapter of step 6 is not on the Hub as user/adapter: ")
    assert waiting(tmp_path) == ["step-6"]
    assert f"It is whole in {folder}. To push it: hf upload user/adapter {folder} ." in last
    assert not hub.repos[REPO].commits  # never half an adapter
    torch.manual_seed(0)
    kept = PeftModel.from_pretrained(tiny_llama(), str(folder))
    x = torch.arange(3, 103)[None]
    assert torch.allclose(kept.eval()(input_ids=x).logits, trainer.model.eval()(input_ids=x).logits, atol=1e-5)


@pytest.mark.usefixtures("xet")
@pytest.mark.parametrize("trouble", [None, 503])
def test_an_adapter_goes_by_xet(make, hub, token, said, tmp_path, trouble):
    hub.trouble = once("/xet/", trouble, times=6)  # Xet tries twice by itself
    trainer = make(stages=[{"max_length": 128, "max_steps": 2}], callbacks=[callback(token, retries=8, backoff=0.02)])
    trainer.train()
    trainer.save_model()
    (commit,) = hub.repos[REPO].commits
    assert commit[1]["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert not any("/lfs/" in path for _, path in hub.requests)
    assert [message for message in said() if "Next try in" not in message] == []
    assert bool(said()) == (trouble is not None)


@pytest.mark.usefixtures("xet")
@pytest.mark.parametrize(("where", "trouble"), [("/xet/", "drop"), ("/xet/", 500), ("xet-write-token", 403)])
def test_xet_that_fails_ends_no_training(make, hub, token, said, tmp_path, where, trouble):
    hub.trouble = lambda method, path: trouble if where in path else None
    assert make(callbacks=[callback(token, retries=1)]).train().global_step == 6
    assert said()[-1].startswith("The adapter of step 6 is not on the Hub as user/adapter: ")
    assert waiting(tmp_path) == ["step-6"] and not hub.repos[REPO].commits
    assert not any(token in message for message in said())


class UntilItStalls(TrainerCallback):
    """Before the last step, a push is under way and has no answer."""

    def __init__(self, clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            wait_until(lambda: self.clock.now > 0)


def test_a_push_that_stalls_gives_way_to_the_next_and_can_t_undo_it(make, hub, token, said, clock):
    hub.trouble = clock.stall(times=1, patience=60)
    make(callbacks=[UntilItStalls(clock), callback(token)]).train()
    assert summaries(hub) == ["Adapter of step 6"] and "had no answer in 60 s; another is begun" in said()[0]
    hub.release.set()  # the first one's connection is closed; it would try again, and commit
    stalled = [thread for thread in threading.enumerate() if thread.name == f"push to {REPO}"]
    assert len(stalled) == 1
    stalled[0].join(240)
    assert not stalled[0].is_alive()
    assert summaries(hub) == ["Adapter of step 6"] and len(said()) == 1


def test_a_stalled_push_of_the_last_adapter_is_begun_anew_at_the_end(make, hub, token, said, clock):
    hub.trouble = clock.stall(times=1, patience=1)
    make(callbacks=[callback(token, patience=1, every_n_steps=6)]).train()
    assert summaries(hub) == ["Adapter of step 6"] and len(said()) == 1


def test_another_s_commit_in_between_is_no_loss(make, hub, token, said):
    """Two programs that push to one repository: a commit that follows another than it thought is made once more."""

    def trouble(method, path):
        if path.endswith("/commit/main") and not hub.repos[REPO].commits:
            hub.repos[REPO].commits.append(("Someone else", {"NOTES.md": b"notes"}))

    hub.trouble = trouble
    make(callbacks=[callback(token, every_n_steps=6)]).train()
    assert summaries(hub) == ["Someone else", "Adapter of step 6"] and "412" in said()[0]
    assert ADAPTER | {"NOTES.md"} <= set(hub.repos[REPO].files)


def test_what_a_run_before_could_not_push_goes_with_the_next(make, hub, token, said, tmp_path):
    options = dict(save_strategy="steps", save_steps=100)
    hub.trouble = lambda method, path: 500
    make(callbacks=[Stop(3), callback(token, retries=0)], **options).train()
    assert waiting(tmp_path) == ["step-3"]
    hub.trouble = lambda method, path: None
    make(callbacks=[callback(token)], **options).train(resume_from_checkpoint=True)
    assert summaries(hub) == ["Adapter of step 6"] and not waiting(tmp_path)


def test_a_wrong_token_is_not_tried_again(make, hub, said, tmp_path):
    make(callbacks=[callback("hf_wrong")]).train()
    creations = [path for _, path in hub.requests if path == "/api/repos/create"]
    assert 1 <= len(creations) <= 2  # for each adapter once
    assert "401" in said()[-1] and "the token is not valid, or may not write to user/adapter" in said()[-1]
    assert waiting(tmp_path) == ["step-6"]  # the newest
    assert not any("hf_wrong" in message for message in said())


@pytest.mark.parametrize("first", [None, 500], ids=["pushed late", "failed"])
def test_an_adapter_that_is_overtaken_is_dropped(make, hub, token, said, tmp_path, first):
    answers = iter([first])

    def trouble(method, path):
        wait_until((tmp_path / "out" / push.FOLDER / "step-6" / "README.md").exists)
        return next(answers, None)

    hub.trouble = trouble
    make(callbacks=[callback(token, every_n_steps=1)]).train()
    assert summaries(hub)[-1] == "Adapter of step 6"
    assert set(summaries(hub)[:-1]) <= {"Adapter of step 1", "Adapter of step 5"}
    assert ("Adapter of step 1" in summaries(hub)) == (first is None)
    assert not waiting(tmp_path)


def test_the_best_model_is_pushed_after_the_last_step_s(make, hub, token, said, monkeypatch, tmp_path):
    """Where a run stops at a step that is pushed: both would wait in one folder."""
    waited = threading.Event()
    hub.trouble = lambda method, path: waited.wait(240) and None
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer = make(callbacks=[Stop(3), callback(token)], eval_dataset=texts(2), load_best_model_at_end=True, **options)
    finish, save, saved = push._Pusher.finish, trainer.model.save_pretrained, []

    def finishing(pusher):
        waited.set()
        finish(pusher)

    def saving(folder, **kwargs):
        save(folder, **kwargs)
        saved.append(folder)
        if [str(each).endswith("_push/step-3") for each in saved].count(True) == 2:
            waited.set()

    monkeypatch.setattr(push._Pusher, "finish", finishing)
    monkeypatch.setattr(trainer.model, "save_pretrained", saving)
    trainer.train()
    assert summaries(hub) == ["Adapter of step 3"] * 2 and not said() and not waiting(tmp_path)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionError("reset"), True),
        (TimeoutError(), True),
        (OSError(28, "No space left on device"), True),
        (json.JSONDecodeError("not JSON", "<html>", 0), True),  # an error page of a proxy
        (HFValidationError("Repo id must be in the form"), False),
    ],
)
def test_what_is_worth_a_retry(error, again):
    wrapped = RuntimeError("Error while uploading 'a' to the Hub.")
    wrapped.__cause__ = error
    assert push.worth_a_retry(error) is again and push.worth_a_retry(wrapped) is again


def test_nothing_that_is_to_be_private_is_pushed_to_a_public_repository(make, hub, token, said):
    hub.repos[REPO] = Repo(False)
    trainer = make(callbacks=[PushAdapterCallback(REPO, token=token, private=True, patience=60)])
    assert trainer.train().global_step == 6
    assert f"{REPO} is there already and public" in said()[-1]
    assert not hub.repos[REPO].commits


def test_a_card_that_was_edited_on_the_hub_is_not_pushed_over(make, hub, token):
    for text, kept in (("# Mine", True), (MARK, False)):
        hub.repos[REPO] = Repo(False)
        hub.repos[REPO].commits.append(("Edited on the Hub", {"README.md": text.encode()}))
        make(callbacks=[PushAdapterCallback(REPO, token=token, patience=60)]).train()
        files = hub.repos[REPO].files
        assert "adapter_model.safetensors" in files and (files["README.md"].decode() == text) == kept


def test_a_name_that_can_t_be_one_is_said_once(make, hub, token, said, tmp_path):
    trainer = make(callbacks=[PushAdapterCallback("not/a/name", token=token, patience=60)])
    assert trainer.train().global_step == 6
    assert "HFValidationError" in said()[-1]


def test_a_whole_model_is_refused(make, hub, token):
    with pytest.raises(ValueError, match="push_to_hub=True for whole models"):
        make(peft_config=None, callbacks=[callback(token)]).train()


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_zero3_enabled"])
def test_weights_that_are_spread_over_processes_are_refused(make, token, monkeypatch, sharding):
    trainer = make(callbacks=[callback(token)])
    monkeypatch.setattr(push, sharding, lambda: True)
    with pytest.raises(ValueError, match=r"can't gather weights.*hub_strategy='every_save'"):
        trainer.train()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_none_of_the_push_s_business(make, hub, token, said, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    trainer = make(callbacks=[callback(token)])
    monkeypatch.setattr(trainer.model, "save_pretrained", full)
    assert trainer.train().global_step == 6
    assert [message.startswith("The adapter of step") and "No space left" in message for message in said()] == [
        True
    ] * 2


def test_bad_intervals_are_refused():
    with pytest.raises(ValueError, match="every_n_steps"):
        PushAdapterCallback(REPO, every_n_steps=0)


def test_push_by_the_command_line_takes_what_was_evaluated_since(make, hub, token, monkeypatch, tmp_path):
    trainer = make(report=True)
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    (out / "_push" / "step-3").mkdir(parents=True)
    (out / "_push" / "step-3" / "README.md").write_text("waiting")
    records = {"dense": [{"length": 128, "perplexity": 12.5}]}
    evaluation = {"adapter_sha256": weights_sha256(out), "perplexity": records}
    (out / "evaluation.json").write_text(json.dumps(evaluation))
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(out), REPO]) == 0
    files = hub.repos[REPO].files
    assert not any(name.startswith("_") for name in files) and "report.html" in files
    card = files["README.md"].decode()
    assert "| dense | 12.50 |" in card and "- steps: 6, batch size 2" in card
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in card and "sft" in ModelCard(card).data.tags


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_are_in_nothing_that_is_kept_or_pushed(make, hub, token, tiny_llama, tmp_path, capfd, said):
    tiny_llama().save_pretrained(tmp_path / "base")
    hub.trouble = once("/repos/create", 500, times=0)
    trainer = make(
        model=str(tmp_path / "base"),
        model_init_kwargs={"token": token},
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=token,
        save_strategy="steps",
        save_steps=2,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        callbacks=[PushAdapterCallback("user/other", patience=60)],
    )
    for args in (trainer.args, copy.copy(trainer.args), copy.deepcopy(trainer.args)):
        assert args.hub_token == args.model_init_kwargs["token"] == token  # it works, though
    trainer.train()
    trainer.push_to_hub()
    secret = token.encode()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in kept) and any("checkpoint-" in str(path) for path in kept)
    assert [str(path) for path in kept if secret in path.read_bytes()] == []
    for repo in hub.repos.values():
        assert repo.commits and not any(secret in data for _, files in repo.commits for data in files.values())
    assert "user/other" in hub.repos and "last-checkpoint" not in hub.repos[REPO].files
    out, err = capfd.readouterr()
    assert token not in out + err and not any(token in message for message in said())
    assert token not in json.dumps(trainer.args.to_dict(), default=str) and token not in repr(
        trainer.args.to_json_string()
    )


def test_the_search_for_tokens_would_find_one(tmp_path, token):
    """transformers' own arguments keep it."""
    args = SFTConfig(str(tmp_path), hub_token=token, use_cpu=True, bf16=False)
    torch.save(args, tmp_path / "training_args.bin")
    assert token.encode() in (tmp_path / "training_args.bin").read_bytes()
