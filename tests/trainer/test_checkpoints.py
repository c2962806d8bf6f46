import json
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin

from hf_longlora.trainer import checkpoints, last_checkpoint
from hf_longlora.trainer.checkpoints import (
    begin_checkpoint,
    check_complete,
    check_signature,
    first_difference,
    optimizer_states,
    refuse_others,
)
from hf_longlora.trainer.guards import check_saving


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
    with pytest.raises(ValueError, match="written by another version, and doesn't say its adapter"):
        check_signature(str(tmp_path / "checkpoint-2"), {"seed": 1, "adapter": {}})
    # one written by an earlier version, which counted no tokens
    (tmp_path / "checkpoint-2" / "context_schedule.json").write_text(json.dumps({"seed": 1}))
    assert check_signature(str(tmp_path / "checkpoint-2"), {"seed": 1}) == 0


def test_the_first_difference_is_named_where_it_lies():
    own = {"stages": [1, 2], "adapter": {"r": 4, "alpha": 16}, "base": {"weights": "ab", "rope": None}, "data": "cd"}
    assert first_difference(own | {"tokens": 7}, own) is None
    for found, words in (
        ({"stages": [1]}, "stages was [1], is [1, 2]"),
        ({"adapter": {"r": 4, "alpha": 64}}, "adapter.alpha was 64, is 16"),
        ({"adapter": {"r": 4, "alpha": 16, "dora": True}}, "adapter.dora was True, and is not set"),
        ({"adapter": None}, "adapter was None, is {'r': 4, 'alpha': 16}"),
        ({"base": {"weights": "xy", "rope": None}}, "the base's weights are others, or in another dtype"),
        ({"data": "xy"}, "the training data are others, or tokenized otherwise"),
    ):
        assert first_difference(own | found, own) == words


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    whole(tmp_path / "checkpoint-100")
    for name in ("checkpoint-100-best", "checkpoint-200x", "checkpoint-", "checkpoint-best"):
        whole(tmp_path / name)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    refuse_others(tmp_path, {"seed": 1}, limited=False)
    with pytest.raises(ValueError, match=r"checkpoint-\S* is no checkpoint, and save_total_limit"):
        refuse_others(tmp_path, {"seed": 1}, limited=True)


def test_no_run_saves_beside_another(tmp_path):
    whole(tmp_path / "checkpoint-2")
    refuse_others(tmp_path, {"seed": 1}, limited=True)
    with pytest.raises(ValueError, match=r"checkpoint-2 is of another run.*seed was 1, is 2.*another output_dir"):
        refuse_others(tmp_path, {"seed": 2}, limited=False)
    (tmp_path / "checkpoint-2" / "context_schedule.json").unlink()
    with pytest.raises(ValueError, match=r"it has no context_schedule.json"):
        refuse_others(tmp_path, {"seed": 1}, limited=False)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    refuse_others(tmp_path, {"seed": 1}, limited=False)  # what a kill has left


FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"]


@pytest.mark.parametrize("missing", FILES)
def test_a_checkpoint_is_resumed_from_all_of_its_files(tmp_path, missing):
    for name in FILES:
        (tmp_path / name).write_text("")
    check_complete(str(tmp_path), 1, scaled=True)
    (tmp_path / missing).unlink()
    with pytest.raises(
        ValueError, match=rf"it lacks [^(]*\({missing.split('.')[0]}\S*\)\.? It was saved by save_only"
    ):
        check_complete(str(tmp_path), 1, scaled=True)


def test_what_several_processes_leave_is_complete(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    for name in ("trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"):
        (tmp_path / name).write_text("")
    (tmp_path / "global_step3").mkdir()
    check_complete(str(tmp_path), 2, scaled=False)  # DeepSpeed has optimizer and schedule in its own folder
    (tmp_path / "global_step3").rmdir()
    (tmp_path / "optimizer_0").mkdir()
    (tmp_path / "scheduler.pt").write_text("")
    check_complete(str(tmp_path), 2, scaled=False)  # FSDP
    assert not said
    check_complete(str(tmp_path), 1, scaled=False)
    assert len(said) == 1 and "saved by 2 processes and is resumed by 1" in said[0]


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
    with pytest.raises(ValueError, match="fsdp_state_dict_type is SHARDED_STATE_DICT"):
        check_saving(launched(fsdp=FullyShardedDataParallelPlugin(fsdp_version=2)))  # its default
