"""The bench of a million tokens through the trainer: its stages, and rows of the smallest shape."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.million import STAGES, Stage
from benchmarks.provenance import read_rows
from hf_longlora import ContextStage

ROOT = Path(__file__).parents[1]


def test_stages_have_names():
    assert Stage.parse("sparse-2048@1048576x3", 4) == ("sparse-2048", 2048, 0, 1048576, 3)
    assert Stage.parse("mixed-n/16@1000x2", 4) == ("mixed-n/16", 63, 4, 1000, 2)
    dense = Stage.parse("dense@512x1", 4)
    assert dense.group is None and dense.context() == ContextStage(512, 1, attention="dense")
    mixed = Stage.parse("mixed-64@512x5", 2).context()
    assert mixed == ContextStage(512, 5, group_size=64, dense_every=2, sparse="s2")
    assert all(Stage.parse(text, 4).tokens == 1_048_576 for text in STAGES)


@pytest.mark.parametrize("text", ["sparse@64x1", "dense@64", "dense-8@64x1", "mixed-8@64", "windows-8@64x1"])
def test_unknown_stages_are_refused(text):
    with pytest.raises(SystemExit, match="KIND@TOKENSxSTEPS"):
        Stage.parse(text, 4)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_rows_of_two_processes(tmp_path):
    config = ROOT / "examples" / "accelerate_configs" / "zero2.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    launch += ["--main_process_port", "0", *([] if torch.cuda.is_available() else ["--mixed_precision", "no"])]
    command = ["-m", "benchmarks.million", "--model", "tiny", "--results", str(tmp_path), "--dense-every", "2"]
    stages = ["--stages", "mixed-64@256x4", "sparse-n/16@512x2"]  # gloo gathers no batches of two lengths at once
    environment = os.environ | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})
    done = subprocess.run(
        [sys.executable, *launch, *command, *stages],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    rows = read_rows(tmp_path / "million.csv")
    names = ("tokens", "step", "group", "steps", "warm")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("256", "sparse", "64", "1", "1"),
        ("256", "dense", "0", "1", "1"),
        ("512", "sparse", "32", "1", "1"),
    ]
    assert 0 < float(rows[0]["sent_gib"]) < float(rows[1]["sent_gib"])
    assert all(0 < float(row["exchange_s"]) < float(row["s_p50"]) for row in rows)
    assert all(6 < float(row["loss"]) < 6.5 for row in rows)  # log(512), of random tokens
