"""The bench of a training step: its methods on the smallest shape, and what its tables make of rows."""

import pytest

from benchmarks import step_methods
from benchmarks.plots import Steps, of_fused, of_lengths, of_longest, of_methods
from benchmarks.provenance import read_rows
from benchmarks.step_methods import Method
from benchmarks.train_step import Run, preset, run_method
from hf_longlora.attention.kernels import KERNELS


@pytest.mark.parametrize("method", ["stock", "ours-64+tile", "ours-32+sinks=0", "floor", "floor-qk"])
def test_a_row_for_each_length(method, tmp_path, monkeypatch):
    calls = []
    for name in ("floor", "floor-qk"):  # put there by a run, and taken away again
        monkeypatch.setitem(KERNELS, name, KERNELS["sdpa"])
    for name in ("identity", "identity_qk"):
        function = getattr(step_methods, name)
        monkeypatch.setattr(step_methods, name, lambda *a, f=function, **k: calls.append(f) or f(*a, **k))
    run_method(Run(method, [64, 128], steps=1, warm=0), "tiny", tmp_path / "rows.csv", tmp_path / "progress")
    rows = read_rows(tmp_path / "rows.csv")
    assert [(row["method"], row["length"], row["status"], row["steps"]) for row in rows] == [
        (method, "64", "ok", "1"),
        (method, "128", "ok", "1"),
    ]
    assert all(float(row["s_p50"]) > 0 and 5 < float(row["loss"]) < 8 for row in rows)
    assert {row["sink_tokens"] for row in rows} == {"4" if method == "ours-64+tile" else "0"}
    assert bool(calls) == method.startswith("floor")  # no stage has put attention back


@pytest.mark.parametrize(
    "name", ["theirs", "stock+tile", "ours-2048+fa4", "stock+kernel=varlen", "stock+sinks=4", "ours-2048+nothing"]
)
def test_unknown_methods_are_refused(name):
    with pytest.raises(SystemExit):
        Method.parse(name)


@pytest.mark.parametrize("name", ["tiny", "targets", "lengths", "fused", "longest", "sinks"])
def test_presets_name_methods(name):
    assert all(Method.parse(run.method) for run in preset(name)[1])


def row(method, length, seconds, status="ok", gib=10.0, warm="1"):
    text = str(seconds) if status == "ok" else ""
    return {
        "method": method,
        "model": "8b",
        "length": str(length),
        "gpu": "H",
        "status": status,
        "s_p50": text,
        "tokens_per_s": text and str(length / seconds),
        "peak_gpu_gib": str(gib),
        "peak_pinned_gib": "0",
        "peak_host_gib": "1",
        "warm": warm,
    }


def test_tables():
    steps = Steps(
        [
            row("stock", 1024, 99.0),  # an older one
            row("stock", 1024, 12.0),
            row("stock+cudnn", 1024, 6.0),
            row("ours-dense", 1024, 8.0),
            row("ours-2048", 1024, 2.0),
            row("floor", 1024, 1.6),
            row("ours-2048+compile", 1024, 1.8, gib=8.0),
            row("ours-2048", 2048, 0, "out of memory"),
            row("ours-2048+liger+tile", 2048, 4.0),
            row("ours-dense+liger+tile", 2048, 8.0, warm="0"),
        ],
        "8b",
        "H",
    )
    assert steps.best_dense(1024) == "stock+cudnn"
    assert steps.mixed(2.0, 8.0, 8) == pytest.approx((7 * 2.0 + 8.0) / 8)
    assert "| ours-2048 | 2.00 | 512 | 10.0 | 6.00 | 3.00 | 1.250 |" in of_methods(steps, 1024)
    assert "| 2,048 | 10 | 8.00* s, 256 |  | 4.00 s, 512 | 4.50* s, 455 | 5.00* s, 410 |" in of_lengths(steps)
    assert "| ours-2048+compile | 1,024 | 2.00 -> 1.80 | -10.0% | 10.0 -> 8.0 |" in of_fused(steps)
    assert "| ours-2048+liger+tile | 2,048 | 4.00 | 512 |" in of_longest(steps)
