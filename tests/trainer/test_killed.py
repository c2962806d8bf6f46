"""A run that is killed again and again ends as the unbroken one."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest

from .killed_run import STEPS, WRITERS, run

KILLS = 20
ATTEMPTS = 60


@pytest.fixture
def start(tiny_tokenizer, tmp_path):
    """Start the run in a process of its own, on this or that output folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__module__])
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def process(output, **options):
        child = context.Process(target=run, args=(str(tmp_path / output), str(tmp_path / "tokenizer")), kwargs=options)
        child.start()
        return child

    return process


def result(folder: Path):
    return (folder / "adapter_model.safetensors").read_bytes(), json.loads((folder / "losses.json").read_text())


def finish(child, folder: Path):
    child.join(120)
    assert child.exitcode == 0, Path(f"{folder}.log").read_text()[-3000:]


def test_killed_at_random_points(start, tmp_path):
    """By SIGTERM and SIGKILL at random moments, between the files of a checkpoint, and with a file half written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("whole"), whole)  # the fork server imports meanwhile
    began = time.monotonic()
    finish(start("again"), tmp_path / "again")
    seconds = time.monotonic() - began
    assert result(whole) == result(tmp_path / "again") and len(result(whole)[1]) == STEPS

    draw = random.Random()
    kills = {"SIGTERM": 0, "SIGKILL": 0, "between files": 0, "half a file": 0}
    for number in range(ATTEMPTS):
        if sum(kills.values()) == KILLS:
            break
        how = list(kills)[number % len(kills)]
        if how in ("SIGTERM", "SIGKILL"):
            child = start("killed")
            child.join(draw.uniform(0.1, 0.7 * seconds))
            if child.is_alive():
                (child.terminate if how == "SIGTERM" else child.kill)()
        else:
            child = start("killed", at=draw.choice(list(WRITERS)), torn=how == "half a file")
        child.join(120)
        if child.exitcode == 0:  # it was done before it could be killed: from the start again
            assert result(killed) == result(whole)
            killed = killed.rename(tmp_path / f"done-{number}").with_name("killed")
        else:
            assert child.exitcode in (-signal.SIGTERM, -signal.SIGKILL), Path(f"{killed}.log").read_text()[-3000:]
            kills[how] += 1
    finish(start("killed"), killed)
    assert result(killed) == result(whole)
    assert sum(kills.values()) == KILLS, kills


def test_a_full_disk(start, tmp_path):
    """The run ends with an error, and the next one goes on from the last whole checkpoint."""
    finish(start("whole"), tmp_path / "whole")
    child = start("full", at="rng")
    child.join(120)
    smallest = min(file.stat().st_size for file in (tmp_path / "full").glob("checkpoint-*/adapter_model.safetensors"))
    child = start("full", bytes_on_disk=smallest // 2)
    child.join(120)
    assert child.exitcode == 1 and "File too large" in (tmp_path / "full.log").read_text()
    finish(start("full"), tmp_path / "full")
    assert result(tmp_path / "full") == result(tmp_path / "whole")
