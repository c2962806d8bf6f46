"""One run in two processes (DDP over gloo), by `accelerate launch`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = str(Path(__file__).with_name("distributed_run.py"))
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def run(out: Path, *command: str):
    """The adapter and the logs of the run."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "adapter_model.safetensors"), json.loads((out / "logs.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return out, *run(out, *LAUNCH, SCRIPT, str(out), "1")


def test_two_processes_are_one_of_twice_the_batch(two, tmp_path):
    """The same adapter and the same logs, across a stage boundary."""
    one, one_logs = run(tmp_path, SCRIPT, str(tmp_path), "2")
    out, adapter, logs = two
    assert one.keys() == adapter.keys()
    assert all(torch.allclose(one[key], adapter[key], atol=1e-5) for key in one)
    assert [(log["stage"], log["attention"]) for log in one_logs] == [
        (1, "s2attn"),
        (1, "dense"),
        (1, "s2attn"),
        (2, "dense"),
        (2, "s2attn"),
        (2, "dense"),
    ]
    for log, other in zip(one_logs, logs, strict=True):
        assert log == other | {"loss": pytest.approx(other["loss"], abs=1e-4)}
    assert (out / "report.html").is_file() and "None" not in (out / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_resume(two, tmp_path):
    """From the last whole checkpoint: the one after it has lost its last file."""
    out, adapter, logs = two
    again = shutil.copytree(out, tmp_path / "again")
    (again / "adapter_model.safetensors").unlink()
    (again / "checkpoint-6" / "trainer_state.json").unlink()
    resumed, resumed_logs = run(again, *LAUNCH, SCRIPT, str(again), "1")
    assert all(torch.equal(resumed[key], adapter[key]) for key in adapter)
    assert resumed_logs == logs
