"""The bench of attention with a sliding window, on the smallest shape."""

import pytest
import torch

from benchmarks import sliding
from benchmarks.provenance import read_rows
from hf_longlora.attention import interface


def test_a_row_for_each_method_and_length(tmp_path, monkeypatch):
    used, attend = [], interface.attend_in_blocks
    monkeypatch.setattr(interface, "attend_in_blocks", lambda *a: used.append(a[-1].shape[1]) or attend(*a))
    options = ["--device", "cpu", "--shapes", "tiny", "--seconds", "0", "--whole", "96"]
    sliding.main([*options, "--lengths", "96", "160", "--results", str(tmp_path / "rows.csv")])
    rows = [(row["method"], row["length"]) for row in read_rows(tmp_path / "rows.csv")]
    blocks = [(name, length) for name in ("blocks/1", "blocks", "blocks/4") for length in ("96", "160")]
    assert rows == [*blocks, ("whole mask", "96")]
    assert {-(-160 // 64), -(-160 // 32), -(-160 // 16)} <= set(used)


def test_what_is_wrong_is_not_timed(monkeypatch):
    shape, cpu = sliding.SHAPES["tiny"], torch.device("cpu")
    wider = sliding.by_mask(sliding.NAME, sliding.s2_attention_forward)
    sliding.check("right", wider, shape, cpu, torch.float32)
    monkeypatch.setattr(interface, "attend_in_blocks", lambda attend, *tensors: attend(*tensors[:3], None))
    with pytest.raises(SystemExit, match="wrong one is wrong"):
        sliding.check("wrong one", wider, shape, cpu, torch.float32)
