"""What a person sees of a run: lines, trackers and the report."""

import importlib
import io
import json
import logging
import re
import sqlite3
import sys
from importlib.util import find_spec

import pytest
from transformers import TrainerCallback
from transformers.integrations import rewrite_logs

from hf_longlora import ContextStage
from hf_longlora.hub.card import weights_sha256
from hf_longlora.hub.run import training_seconds
from hf_longlora.trainer import report, saving, sft_trainer, update_report

from .helpers import STAGES, Stop, texts


@pytest.fixture
def screen(monkeypatch):
    """What progress bars write."""
    from hf_longlora.trainer import callbacks

    out = io.StringIO()
    bar = callbacks.tqdm
    monkeypatch.setattr(callbacks, "tqdm", lambda **options: bar(file=out, mininterval=0, ncols=200, **options))
    callbacks.tqdm.format_interval = bar.format_interval
    return out


def lines(out):
    return [line for line in re.split(r"[\r\n]+", out.getvalue()) if line.strip()]


def test_one_line_a_stage(make, screen, capsys):
    make(disable_tqdm=False, eval_strategy="steps", eval_steps=3, eval_dataset=texts(2)).train()
    seen = lines(screen)
    ended = [line for line in seen if "3/3" in line]
    for number, length in ((1, 128), (2, 256)):
        own = [line for line in seen if line.startswith(f"stage {number}/2, {length} tokens")]
        assert "0/3" in own[0] and "3/3" in own[-1]
        assert re.search(r"loss \d\.\d{3}, [\d,]+ tokens/s, \d+\.\d GiB, all done in \d\d:\d\d", own[-1])
    assert "all done in 00:00" in ended[-1]
    # the evaluations, each after a stage's last step
    assert re.findall(r"^step (\d): evaluation loss \d\.\d{3}$", capsys.readouterr().out, re.MULTILINE) == ["3", "6"]


def test_the_line_of_a_resumed_stage_goes_on_where_it_was(make, screen):
    options = dict(save_strategy="steps", save_steps=100, disable_tqdm=False)
    make(callbacks=[Stop(2)], **options).train()
    before = len(lines(screen))
    make(**options).train(resume_from_checkpoint=True)
    first = lines(screen)[before]
    assert first.startswith("stage 1/2") and "2/3" in first


def test_no_line_where_none_is_wanted(make, screen):
    make(disable_tqdm=True).train()
    assert not screen.getvalue()


class Tracker(TrainerCallback):
    """What Trainer's integrations are given, as TensorBoard, trackio and wandb name it."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(rewrite_logs(logs))


def test_trackers_get_the_stage_as_a_number(make):
    tracker = Tracker()
    make(callbacks=[tracker]).train()
    logged = [log for log in tracker.logs if "train/loss" in log]
    assert [log["train/stage"] for log in logged] == [1, 1, 1, 2, 2, 2]
    assert [log["train/context_length"] for log in logged] == [128] * 3 + [256] * 3
    wanted = {f"train/{key}" for key in ("tokens_per_second", "peak_memory_gib", "rope_factor", "num_tokens")}
    assert all(wanted <= set(log) for log in logged)
    # an integration warns of what is no number, at each log
    assert all(isinstance(value, (int, float)) for log in logged for value in log.values())


def tensorboard(folder):
    """Each step's values, as TensorBoard has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = {}
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path)).Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                steps.setdefault(event.step, {})[name] = event.value
    return [steps[step] for step in sorted(steps)]


def trackio(folder):
    (file,) = folder.glob("trackio/*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select metrics from metrics where run_name = 'a run' order by step").fetchall()
    return [json.loads(metrics) for (metrics,) in rows]


def wandb(folder):
    """An offline run's file: 7 bytes, then records in LevelDB's log format, all whole in so short a file."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()[7:]
        while data:
            end = 7 + int.from_bytes(data[4:6], "little")  # after checksum, length and kind
            items = Record.FromString(data[7:end]).history.item
            steps.append({item.nested_key[0]: json.loads(item.value_json) for item in items if item.nested_key})
            data = data[end:]
    return steps


@pytest.mark.parametrize(
    "tracker",
    [
        pytest.param(read, marks=pytest.mark.skipif(find_spec(read.__name__) is None, reason=f"needs {read.__name__}"))
        for read in (tensorboard, trackio, wandb)
    ],
)
def test_a_tracker_has_the_stage_over_a_stop(make, tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its folder when it is imported
    secret = "hf_aTokenThatNoTrackerMayKeep"
    options = dict(report_to=tracker.__name__, run_name="a run", hub_token=secret, save_strategy="steps", save_steps=9)
    for stopped in (True, False):
        make(callbacks=[Stop(2)] if stopped else None, **options).train(resume_from_checkpoint=not stopped)
        if tracker is wandb:
            importlib.import_module("wandb").finish()  # as it is at the end of a program
    logged = [log for log in tracker(tmp_path) if "train/loss" in log]
    assert [log["train/stage"] for log in logged] == [1, 1, 1, 2, 2, 2]
    assert [log["train/context_length"] for log in logged] == [128] * 3 + [256] * 3
    assert [log["train/rope_factor"] for log in logged] == [2] * 3 + [4] * 3
    assert all(log["train/tokens_per_second"] > 0 and log["train/peak_memory_gib"] > 0 for log in logged)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_tokens_are_counted_on_over_a_stop(make):
    options = dict(save_strategy="steps", save_steps=100)
    whole = make(output="whole", **options)
    whole.train()
    make(callbacks=[Stop(2)], **options).train()
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=True)
    expected, got = (
        [log["num_tokens"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, resumed)
    )
    assert got == expected and len(got) == 6


# --- the report -----------------------------------------------------------------------------------------------------


def page(folder):
    return (folder / "report.html").read_text()


def test_a_run_ends_with_a_report(make, tmp_path):
    trainer = make(
        report=True,
        dense_every=2,
        stages=[STAGES[0], ContextStage(256, 3, attention="dense")],
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=texts(2),
    )
    trainer.train()
    out = tmp_path / "out"
    rows = re.findall(r"<tr>(.*?)</tr>", page(out))
    assert "<td>1</td><td>128</td><td>3</td><td>shifted sparse</td><td>32</td><td>4</td><td>2</td>" in rows[1]
    assert "<td>2</td><td>256</td><td>3</td><td>dense</td><td>-</td>" in rows[2]
    assert re.search(r"(<td>\d\.\d{3}</td>){3}<td>[\d,]+</td><td>\d+\.\d</td>$", rows[1])
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    for row, loss in zip(rows[1:3], evaluated, strict=True):  # that of the stage's end, beside training's
        assert re.findall(r"<td>(\d\.\d{3})</td>", row)[2] == f"{loss:.3f}"
    assert "dense, on up to 256 tokens" in page(out)
    facts = dict(re.findall(r"<tr><td>([a-z][a-z0-9 ]+)</td><td>(.*?)</td></tr>", page(out)))
    assert facts == json.loads((out / "run.json").read_text())
    assert facts["evaluation loss"] == f"{evaluated[0]:.3f} at first, {evaluated[1]:.3f} at last"
    assert "None" not in page(out)
    pictures = re.findall(r'src="(.*?)"', page(out))
    assert pictures == ["loss.png", "speed.png", "memory.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_several_evaluation_sets_come_into_the_report(make, tmp_path, capsys):
    held_out = {"books": texts(2), "math_loss": texts(3)}
    options = dict(eval_strategy="steps", eval_steps=3, disable_tqdm=False, report=True)
    trainer = make(eval_dataset=held_out, **options)
    trainer.train()
    out, history = tmp_path / "out", trainer.state.log_history
    losses = {name: [e[f"eval_{name}_loss"] for e in history if f"eval_{name}_loss" in e] for name in held_out}
    head, *rows = re.findall(r"<tr>(.*?)</tr>", page(out))
    assert "<th>evaluation loss, books</th><th>evaluation loss, math_loss</th><th>tokens/s</th>" in head
    printed = capsys.readouterr()
    for number, row in enumerate(rows[:2]):
        shown = [f"{losses[name][number]:.3f}" for name in losses]
        assert re.findall(r"<td>(\d\.\d{3})</td>", row)[2:] == shown
        assert f"step {3 * number + 3}: evaluation loss, books {shown[0]}" in printed.out + printed.err
    facts = json.loads((out / "run.json").read_text())
    for name, (first, last) in losses.items():
        assert facts[f"evaluation loss, {name}"] == f"{first:.3f} at first, {last:.3f} at last"
    assert "evaluation loss" not in facts


def test_an_evaluation_comes_into_the_report(make, tmp_path):
    make(report=True).train()
    out = tmp_path / "out"
    records = [
        {"length": length, "perplexity": perplexity, "tokens": 1280, "documents": 12}
        for length, perplexity in ((128, 12.5), (256, 11.25))
    ]
    retrieval = [{"length": 256, "depth": depth, "accuracy": depth, "trials": 4} for depth in (0.25, 1.0)]
    results = {"perplexity": {"dense <&>": records}, "far_context": "It helps.", "passkey": retrieval}
    (out / "evaluation.json").write_text(json.dumps(results))
    for name in ("perplexity", "passkey", "needles"):  # the last of an earlier evaluation
        (out / f"{name}.png").write_bytes(b"PNG")
    assert "Perplexity" not in page(out)
    assert update_report(out) == out / "report.html"
    for part in (
        "<th>model</th><th>128 tokens</th><th>256 tokens</th>",
        "<td>dense &lt;&amp;&gt;</td><td>12.50</td><td>11.25</td>",
        "<p>Each is over 1,280 tokens of 12 documents.</p>",
        "<p>It helps.</p>",
        "<h2>Passkeys found, by length of the text and depth of the passkey</h2>",
        "<th>tokens</th><th>25%</th><th>100%</th></tr><tr><td>256</td><td>25%</td><td>100%</td>",
        "<p>Each is of 4 texts.</p>",
    ):
        assert part in page(out), part
    assert re.findall(r'src="(.*?)"', page(out))[3:] == ["perplexity.png", "passkey.png"]


def test_a_report_does_not_show_the_evaluation_of_the_run_before(make, tmp_path):
    out = tmp_path / "out"
    make(report=True).save_model()
    records = [{"length": 128, "perplexity": 12.5}]
    evaluation = {"adapter_sha256": weights_sha256(out), "perplexity": {"dense": records}}
    (out / "evaluation.json").write_text(json.dumps(evaluation))
    trainer = make(report=True)
    trainer.train()
    assert "12.50" not in page(out)  # while the adapter of before is still there
    trainer.save_model()
    update_report(out)
    assert "12.50" not in page(out)


def test_a_run_that_was_stopped_says_how_far_it_came(make, tmp_path):
    make(callbacks=[Stop(4)], report=True).train()
    rows = re.findall(r"<tr>(.*?)</tr>", page(tmp_path / "out"))
    assert "<td>128</td><td>3</td>" in rows[1] and "<td>256</td><td>1 of 3</td>" in rows[2]


class Clock(TrainerCallback):
    """A clock of the test's own: a step takes a second, a batch of an evaluation 10, and a checkpoint 100."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def on_step_end(self, args, state, control, **kwargs):
        self.now += 1

    def on_prediction_step(self, args, state, control, **kwargs):
        self.now += 10

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += 10


@pytest.mark.parametrize("several", [False, True], ids=["one set", "a dict of them"])
def test_evaluations_and_checkpoints_are_no_training_time(make, monkeypatch, several):
    clock = Clock()
    for module in (sft_trainer, saving):
        monkeypatch.setattr(module, "time", clock)
    held_out = {"books": texts(2), "math": texts(4)} if several else texts(2)
    options = dict(eval_strategy="steps", eval_steps=2, eval_dataset=held_out, save_strategy="steps")
    trainer = make(callbacks=[clock], **options)
    save = trainer._save

    def slow_save(*args, **kwargs):
        clock.now += 100
        save(*args, **kwargs)

    trainer._save = slow_save
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 6 and training_seconds(logged) == pytest.approx(6)
    assert clock.now > 6 + 2 * 100 + 3 * 10 * (1 + several)


def test_no_report_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run of LongLoraSFTTrainer has ended"):
        update_report(tmp_path)


def test_a_report_can_be_left_out(make, tmp_path):
    make(report=False).train()
    assert not (tmp_path / "out" / "report.html").exists()


def test_without_matplotlib_a_report_has_tables_and_a_warning(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(report.logger, "propagate", True)
    out = tmp_path / "out"
    make(report=True).train()
    (out / "evaluation.json").write_text(json.dumps({"perplexity": {"dense": [{"length": 128, "perplexity": 12.5}]}}))
    update_report(out)
    assert "No pictures: plots need matplotlib" in page(out) and "12.50" in page(out)
    assert not list(out.glob("*.png"))
    assert sum("has no pictures" in record.getMessage() for record in caplog.records) == 2  # twice written
