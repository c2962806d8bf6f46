"""The bench of packed documents, on a CPU."""

from itertools import pairwise

from benchmarks import packed
from benchmarks.provenance import read_rows


def test_a_row_for_each_kernel_and_length(tmp_path, monkeypatch):
    asked, attend = [], packed.s2_attention
    monkeypatch.setattr(
        packed,
        "s2_attention",
        lambda *a, **o: asked.append((o["kernel"], o["cu_seqlens"].tolist())) or attend(*a, **o),
    )
    options = ["--device", "cpu", "--tokens", "64", "--group-size", "16", "--repeats", "2"]
    options += ["--documents", "5", "40", "--kernels", "sdpa", "reference", "--results", str(tmp_path / "rows.csv")]
    packed.main(options)
    rows = read_rows(tmp_path / "rows.csv")
    assert [(row["kernel"], row["mean"]) for row in rows] == [
        (kernel, mean) for mean in ("5", "40") for kernel in ("sdpa", "reference")
    ]
    assert all(float(row[f"{name}_p50"]) > 0 for row in rows for name in ("first", "again"))
    lengths = [[b - a for a, b in pairwise(ends)] for _, ends in asked]
    assert lengths[6][0] == lengths[0][0] + 1  # like documents for each kernel, and none of another one's shapes
    drawn = [ends for _, ends in asked[:6]]
    assert drawn[::2] == drawn[1::2] and drawn[0] != drawn[2] != drawn[4]  # twice each, and others each time
    assert all(ends[0] == 0 and ends[-1] == 64 for ends in drawn)
