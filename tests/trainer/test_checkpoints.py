import json

import pytest

from hf_longlora.trainer import last_checkpoint
from hf_longlora.trainer.checkpoints import begin_checkpoint, check_signature


def whole(folder):
    begin_checkpoint(folder, {"seed": 1, "tokens": 7})
    (folder / "trainer_state.json").write_text("{}")


def test_the_newest_whole_checkpoint_counts(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 10):  # by number, not by name
        whole(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    begin_checkpoint(tmp_path / "checkpoint-12", {"seed": 1})
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_checkpoint_that_is_written_over_is_not_whole_meanwhile(tmp_path):
    """As when a run is started anew in the folder of another."""
    whole(tmp_path / "checkpoint-2")
    begin_checkpoint(tmp_path / "checkpoint-2", {"seed": 2})
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_belongs_to_its_run(tmp_path):
    whole(tmp_path / "checkpoint-2")
    assert check_signature(str(tmp_path / "checkpoint-2"), {"seed": 1}) == 7
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        check_signature(str(tmp_path / "checkpoint-2"), {"seed": 2})
    # one written by an earlier version, which counted no tokens
    (tmp_path / "checkpoint-2" / "context_schedule.json").write_text(json.dumps({"seed": 1}))
    assert check_signature(str(tmp_path / "checkpoint-2"), {"seed": 1}) == 0
