"""A run that is killed again and again ends as the unbroken one."""

import json
import multiprocessing
import random
import signal
from pathlib import Path

import pytest

from hf_longlora.trainer import last_checkpoint

from .killed_run import STEPS, WRITERS, run

PATIENCE = 300
"""Seconds for a run that takes two, on a machine with much else to do."""


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


@pytest.fixture
def whole(start, tmp_path, unbroken):
    """The result of a run that nothing befell, and how many functions it called; made once."""
    if not unbroken:
        finish(start("whole", counted=True), tmp_path / "whole")
        unbroken += [result(tmp_path / "whole"), int((tmp_path / "whole" / "calls").read_text())]
    return unbroken[0]


@pytest.fixture(scope="module")
def unbroken():
    return []


def result(folder: Path):
    return (folder / "adapter_model.safetensors").read_bytes(), json.loads((folder / "losses.json").read_text())


def log(folder: Path) -> str:
    return Path(f"{folder}.log").read_text()


def finish(child, folder: Path):
    child.join(PATIENCE)
    assert child.exitcode == 0, log(folder)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("planned, seed", [(2, 0), (20, None)])
def test_killed_at_random_points(start, whole, unbroken, tmp_path, planned, seed):
    """By SIGTERM and SIGKILL at random moments, between the files of a checkpoint, and with a file half written.

    At other moments each time where there is no seed; the one that was drawn is printed.
    """
    killed = tmp_path / "killed"
    calls = unbroken[1]
    assert len(whole[1]) == STEPS
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)  # `random` itself begins alike in every test
        print("seed of the kills:", seed)
    draw = random.Random(seed)
    ways = ("SIGTERM", "SIGKILL", "between files", "half a file")
    kills: list[str] = []
    for number in range(4 * planned):
        if len(kills) == planned:
            break
        how = ways[len(kills) % len(ways)]
        if how in ("SIGTERM", "SIGKILL"):
            child = start("killed", die_at=draw.randrange(calls // 20, calls * 2 // 3), how=int(signal.Signals[how]))
        else:
            child = start("killed", at=draw.choice(list(WRITERS)), torn=how == "half a file")
        child.join(PATIENCE)
        if child.exitcode == 0:  # it was done before it could be killed: from the start again
            assert result(killed) == whole
            killed = killed.rename(tmp_path / f"done-{number}").with_name("killed")
        else:
            assert child.exitcode in (-signal.SIGTERM, -signal.SIGKILL), log(killed)[-3000:]
            kills.append(how)
    assert len(kills) == planned, kills
    finish(start("killed"), killed)
    assert result(killed) == whole


@pytest.mark.slow
def test_a_streamed_run_is_killed(start, tmp_path):
    """Twice, in other blocks, the second time with half a file."""
    finish(start("whole", streamed=True), tmp_path / "whole")
    for torn in (False, True):
        child = start("killed", at="rng", torn=torn, streamed=True)
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL, log(tmp_path / "killed")[-3000:]
    finish(start("killed", streamed=True), tmp_path / "killed")
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


@pytest.mark.parametrize("after", list(WRITERS))
def test_killed_after_each_file_of_a_checkpoint(start, whole, tmp_path, after):
    """The checkpoint counts once its last file is there, and not before."""
    child = start("run", at=after)
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGKILL, log(tmp_path / "run")[-3000:]
    kept = last_checkpoint(tmp_path / "run")
    assert Path(kept).name == ("checkpoint-2" if after == "state" else "checkpoint-1")
    finish(start("run"), tmp_path / "run")
    assert result(tmp_path / "run") == whole


@pytest.mark.parametrize("full", ["optimizer", "state"])
def test_a_full_disk(start, whole, tmp_path, full):
    """The run ends with an error, and once there is room the next goes on from the last whole checkpoint."""
    child = start("run", full=full)
    child.join(PATIENCE)
    assert child.exitcode == 1 and "No space left on device" in log(tmp_path / "run")
    assert Path(last_checkpoint(tmp_path / "run")).name == "checkpoint-1"
    finish(start("run"), tmp_path / "run")
    assert result(tmp_path / "run") == whole


def test_a_file_that_stops_in_the_middle(start, whole, tmp_path):
    """As on a disk that fills while the adapter is written: the operating system refuses the rest of the file."""
    child = start("run", at="rng")
    child.join(PATIENCE)
    smallest = min(file.stat().st_size for file in (tmp_path / "run").glob("checkpoint-*/adapter_model.safetensors"))
    Path(f"{tmp_path / 'run'}.log").unlink()  # a short one has room
    child = start("run", bytes_on_disk=smallest // 2)
    child.join(PATIENCE)
    assert child.exitcode == 1 and "File too large" in log(tmp_path / "run")
    finish(start("run"), tmp_path / "run")
    assert result(tmp_path / "run") == whole
