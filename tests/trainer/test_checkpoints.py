import json
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin

from hf_longlora.trainer import last_checkpoint
from hf_longlora.trainer.checkpoints import begin_checkpoint, check_signature, optimizer_states
from hf_longlora.trainer.checks import check_saving


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


def launched(deepspeed=None, fsdp=None, processes=1):
    """As much of an accelerator as says how a run was launched."""
    state = SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=fsdp)
    return SimpleNamespace(state=state, num_processes=processes)


def test_optimizer_states_are_told_apart_by_the_launch():
    """Equal where one launch can read what the other wrote; `test_distributed.py` has the real launches."""
    zero = [SimpleNamespace(zero_stage=stage) for stage in (2, 3)]
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    kinds = [launched(), launched(fsdp=plugin), *(launched(z, processes=n) for z in zero for n in (2, 4))]
    assert len({optimizer_states(kind) for kind in kinds}) == 6
    assert optimizer_states(launched(processes=2)) == optimizer_states(launched())
    assert optimizer_states(launched(fsdp=plugin, processes=2)) == optimizer_states(launched(fsdp=plugin))


def test_a_launch_that_would_save_no_adapter_is_refused():
    check_saving(launched(processes=2))
    check_saving(launched(fsdp=FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")))
    with pytest.raises(ValueError, match="FSDP would save no adapter: fsdp_state_dict_type is SHARDED_STATE_DICT"):
        check_saving(launched(fsdp=FullyShardedDataParallelPlugin(fsdp_version=2)))  # its default
