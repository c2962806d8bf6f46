"""The bench of sequence parallelism: its runs by name, and rows of the smallest shape over two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.parallel import Exchanges, Method, Run, preset, summarize
from benchmarks.provenance import read_rows

ROOT = Path(__file__).parents[2]


def test_runs_have_names():
    assert Run.parse("sparse-2048@4096", 4) == ("sparse-2048", 4096, 4)
    assert Run.parse("sparse-n/16+offload=0.5@4096@2", 4) == ("sparse-n/16+offload=0.5", 4096, 2)
    assert [Method.parse(name).group_at(4096) for name in ("sparse-64", "sparse-n/16", "dense")] == [64, 256, 0]
    assert Method.parse("sparse-n/16+offload=0.5").offload == 0.5
    assert Method.parse("ulysses-flash_attention_4").theirs == "flash_attention_4"


@pytest.mark.parametrize(
    "text",
    [
        "sparse-64",
        "sparse-64@",
        "theirs@64",
        "sparse@64",
        "sparse-64@65",
        "sparse-64@64@3",
        "ulysses-sdpa@64@1",
        "sparse-64+offload=2@64",
        "sparse-64+offload@64",
        "sparse-64+offload=0.5+offload=1@64",
    ],
)
def test_unknown_runs_are_refused(text):
    with pytest.raises(SystemExit):
        Run.parse(text, 2)


@pytest.mark.parametrize("name", ["tiny", "x2", "weak", "million"])
def test_presets_name_runs(name):
    assert all(Run.parse(text, 4) for text in preset(name, 4))


def sent(group: dist.ProcessGroup) -> int:
    """Bytes that are counted of an exchange of uneven parts and of a gathering, which do what they did, in floats."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = [[1, 2], [3, 4]]  # from, to
    before, exchanges = dist.all_to_all_single, Exchanges()
    with exchanges.watched():
        x = torch.arange(sum(counts[rank]), dtype=torch.float32)
        got = torch.empty(sum(row[rank] for row in counts))
        received = [row[rank] for row in counts]
        dist.all_to_all_single(got, x, received, counts[rank], group=group, async_op=True).wait()
        found = [torch.empty(5) for _ in range(size)]
        dist.all_gather(found, torch.full((5,), float(rank)), group=group)
    assert dist.all_to_all_single is before and exchanges.seconds() > 0
    assert [int(y[0]) for y in found] == [0, 1] and got.tolist()[: received[0]] == list(
        range(rank, rank + received[0])
    )
    return exchanges.bytes // 4


def test_what_is_sent_to_others_is_counted(processes):
    assert processes.run(2, sent) == [2 + 5, 3 + 5]


def test_weak_scaling_is_against_one_card_with_as_many_tokens(capsys):
    def row(method: str, tokens: int, processes: int, seconds: float) -> dict[str, str]:
        return {"method": method, "tokens": str(tokens), "processes": str(processes), "s_p50": str(seconds)}

    summarize([row("sparse-64", 100, 1, 2.0), row("sparse-64", 200, 2, 2.1), row("dense", 200, 2, 9.0)])
    assert capsys.readouterr().out == "sparse-64 at 100 tokens a card: 2 cards take 1.050 of one's time\n"


@pytest.mark.slow
def test_rows_of_two_processes(tmp_path):
    runs = ["sparse-64@128@1", "sparse-n/16@256", "dense@256"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "benchmarks.parallel", "--check", "--steps", "1", "--results", str(tmp_path), "--runs"]
    done = subprocess.run(
        [sys.executable, *command, *runs], cwd=ROOT, capture_output=True, text=True, timeout=500, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-5000:]
    rows = read_rows(tmp_path / "parallel.csv")
    assert [(row["method"], row["processes"], row["status"]) for row in rows] == [
        ("sparse-64", "1", "ok"),
        ("sparse-n/16", "2", "ok"),
        ("dense", "2", "ok"),
    ]
    assert float(rows[0]["sent_gib"]) == 0 < float(rows[1]["sent_gib"]) < float(rows[2]["sent_gib"])
    checked = read_rows(tmp_path / "parallel_check.csv")
    assert len(checked) == 18 and {row["status"] for row in checked} == {"ok"}
