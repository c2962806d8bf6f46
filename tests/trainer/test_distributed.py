import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def test_two_processes_are_one_of_twice_the_batch(tmp_path):
    """DDP over gloo: the same adapter and the same logs, across a stage boundary."""
    script = str(Path(__file__).with_name("distributed_run.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs = {"one": [script, "2"], "two": [*launcher, script, "1"]}
    results = {}
    for name, command in runs.items():
        out = tmp_path / name
        position = command.index(script) + 1
        arguments = [sys.executable, *command[:position], str(out), *command[position:]]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = load_file(out / "adapter_model.safetensors"), json.loads((out / "logs.json").read_text())
    (one, one_logs), (two, two_logs) = results["one"], results["two"]
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
    assert [(log["stage"], log["attention"]) for log in one_logs] == [
        (1, "s2attn"),
        (1, "dense"),
        (1, "s2attn"),
        (2, "dense"),
        (2, "s2attn"),
        (2, "dense"),
    ]
    for log, other in zip(one_logs, two_logs, strict=True):
        assert log == other | {"loss": pytest.approx(other["loss"], abs=1e-4)}
