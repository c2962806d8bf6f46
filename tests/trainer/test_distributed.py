"""Several processes are one of a batch as large: DDP, FSDP2 and DeepSpeed, as `examples/accelerate_configs` say."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.utils import _apply_to_tensors

from hf_longlora.attention.interface import S2Mask

from .distributed_run import main, tiny_model

SCRIPT = str(Path(__file__).with_name("distributed_run.py"))
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
BY = {"ddp": "MULTI_", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
OPTIONS = [(), ("tied",), ("bf16",), ("tied", "bf16")]
STEPS = [(1, "s2attn"), (1, "dense"), (1, "s2attn"), (2, "dense"), (2, "s2attn"), (2, "dense")]
POSE = [(1, "s2attn"), (1, "dense"), (1, "s2attn"), (2, "pose"), (2, "pose"), (2, "pose")]

slow = pytest.mark.slow
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed (pip install deepspeed)"
)
quantized = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install bitsandbytes)"
)
CASES = [pytest.param("ddp", (), id="ddp", marks=slow), pytest.param("ddp", ("pose",), id="ddp-pose")]
CASES += [pytest.param("ddp", ("stream",), id="ddp-stream", marks=slow)]
RESUMED = [pytest.param("ddp", (), id="ddp"), pytest.param("ddp", ("stream",), id="ddp-stream")]
for kind, marks in (("fsdp2", [slow]), ("zero2", [slow, deepspeed]), ("zero3", [slow, deepspeed])):
    CASES += [pytest.param(kind, o, id="-".join((kind, *o)), marks=marks) for o in OPTIONS]
    RESUMED += CASES[-1:]
    CASES += [pytest.param(kind, ("pose",), id=f"{kind}-pose", marks=marks)]
KEPT = {"fsdp2": "those of FSDP"}
KEPT |= {f"zero{stage}": f"those of DeepSpeed ZeRO-{stage} in 2 processes" for stage in (2, 3)}


def start(*command: str, gpus: str = "0,1") -> None:
    # DeepSpeed takes the CPU only if it is told; none of the others looks at it.
    environment = os.environ | (
        {"CUDA_VISIBLE_DEVICES": gpus} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    )
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-10000:]


def two_processes(config: Path, output: Path, *options: str, processes: int = 2) -> None:
    precision = "bf16" if "bf16" in options else "no"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
    start(*launch, "--mixed_precision", precision, "--main_process_port", "0", SCRIPT, str(output), "1", *options)


def one_process(output: Path, batch_size: int, *options: str) -> None:
    if torch.cuda.is_available():  # of several it is to see one
        start(SCRIPT, str(output), str(batch_size), *options, gpus="0")
    else:
        main(str(output), batch_size, *options)


def told(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_two_processes_are_one_of_twice_the_batch(name, options, tmp_path):
    """The same adapter and the same logs, across a stage boundary; and the adapter loads in one process."""
    one_process(tmp_path / "one", 2, *options)
    two_processes(CONFIGS / f"{name}.yaml", tmp_path / "two", *options)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    one_run, two_run = told(tmp_path / "one"), told(tmp_path / "two")
    assert BY[name] in two_run["by"]
    if name == "fsdp2":
        assert two_run["parameters"] == ["DTensor"]  # all of them sharded
    assert [(log["stage"], log["attention"]) for log in one_run["logs"]] == (POSE if "pose" in options else STEPS)
    for log, other in zip(one_run["logs"], two_run["logs"], strict=True):
        assert log == other | {"loss": pytest.approx(other["loss"], abs=0.02 if "bf16" in options else 1e-4)}
    assert one.keys() == two.keys()
    if "bf16" in options:  # each step rounds, and Adam turns a gradient near zero into a whole step of 0.01
        assert max((one[k].float() - two[k].float()).abs().mean() for k in one) < 1e-3
    else:
        # Windows add up in another order: 1 of 9,000 elements is off by 2.5e-5, of steps of 0.01.
        assert all(torch.allclose(one[k], two[k], atol=1e-4 if "pose" in options else 1e-5) for k in one)
    loaded = PeftModel.from_pretrained(tiny_model(*options), tmp_path / "two")
    assert loaded.config.max_position_embeddings == 256
    assert loaded.get_parameter("base_model.model.model.norm.modules_to_save.default.weight").ne(1).any()


def check_resumed(out, steps, run):
    """That runs which go on from checkpoints of the run in `out`, started by `run(folder)`, end as that one did."""
    whole, whole_run = load_file(out / "adapter_model.safetensors"), told(out)
    for step in steps:
        again = out.with_name(f"from-{step}")
        shutil.copytree(out, again)
        for file in ("adapter_model.safetensors", "run.json"):
            (again / file).unlink()
        for later in range(step + 1, 9):  # the checkpoints after it have lost their last file
            (again / f"checkpoint-{later}" / "trainer_state.json").unlink(missing_ok=True)
        run(again)
        assert told(again) == whole_run | {"from": f"checkpoint-{step}"}
        resumed = load_file(again / "adapter_model.safetensors")
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@slow
@pytest.mark.parametrize(("name", "options"), RESUMED)
def test_two_processes_resume(name, options, tmp_path):
    """In each stage, from the last whole checkpoint, as the unbroken run; and not by a launch of another kind."""
    out, config = tmp_path / "out", CONFIGS / f"{name}.yaml"
    two_processes(config, out, *options)
    assert told(out)["from"] is None
    assert (out / "report.html").is_file() and "None" not in (out / "README.md").read_text()
    check_resumed(out, (2, 4), lambda again: two_processes(config, again, *options))
    if name != "ddp":
        with pytest.raises(AssertionError, match=f"optimizer_states was {KEPT[name]}, is whole"):
            two_processes(CONFIGS / "ddp.yaml", out, *options)


@slow
@deepspeed
@pytest.mark.parametrize(
    ("name", "processes", "options"),
    [
        ("zero2", 2, ()),
        ("zero3", 2, ("answers",)),
        ("zero2", 2, ("packed",)),
        ("zero2", 4, ()),
        ("zero2", 3, ("thirds", "answers")),
        ("zero2", 4, ("groups", "answers")),
        ("zero3", 4, ("groups", "packed", "tiles")),
        pytest.param("zero2", 2, ("qlora",), marks=quantized),
    ],
    ids=str,
)
def test_shards_of_sequences_are_whole_ones(name, processes, options, tmp_path):
    """Losses, gradients, tokens, evaluations and weights of processes that share sequences are those of one.

    With labels on one shard more than on the other, and in one row than in the next; packed documents in steps of
    several batches; key/value heads for two processes each, and 4 heads for 3; two groups of two. In both stages, in
    sparse steps and dense ones. Evaluations are cut, too, in training and after it.
    """
    options = ("shards", *options)
    one_process(tmp_path / "one", 2 if "groups" in options else 1, *options)
    two_processes(CONFIGS / f"{name}.yaml", tmp_path / "two", *options, processes=processes)
    one_run, two_run = told(tmp_path / "one"), told(tmp_path / "two")
    assert "DEEPSPEED" in two_run["by"]
    assert {log["attention"] for log in one_run["logs"]} == {"s2attn", "dense"}
    for what in ("logs", "others"):
        assert len(one_run[what]) == len(two_run[what]) > (5 if "thirds" in options else 7)
        for log, other in zip(one_run[what], two_run[what], strict=True):
            assert log == {key: pytest.approx(x, rel=1e-4) if key != "attention" else x for key, x in other.items()}
    assert one_run["after"] == pytest.approx(two_run["after"], rel=1e-4)
    sharing = processes // 2 if "groups" in options else processes
    assert two_run["evaluated"] == -(-one_run["evaluated"] // sharing)  # the longest that a process has seen
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


@slow
@deepspeed
@pytest.mark.parametrize(
    ("name", "processes", "options"), [("zero2", 2, ()), ("zero3", 2, ()), ("zero2", 4, ("groups",))], ids=str
)
def test_shards_resume(name, processes, options, tmp_path):
    """A run in shards goes on where it was, in each stage, also in the middle of what processes have read."""
    out, config = tmp_path / "out", CONFIGS / f"{name}.yaml"
    two_processes(config, out, "shards", *options, processes=processes)
    check_resumed(out, (2, 6), lambda again: two_processes(config, again, "shards", *options, processes=processes))


@slow
def test_sharded_state_is_refused_before_training(tmp_path):
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    config["fsdp_config"]["fsdp_state_dict_type"] = "SHARDED_STATE_DICT"
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(AssertionError, match="FSDP would save no adapter"):
        two_processes(tmp_path / "sharded.yaml", tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoint-2").exists()


def test_fsdp_leaves_the_mask_as_it_is():
    """FSDP2 rebuilds the dataclasses among a layer's arguments, and with them what the first layer has found out."""
    mask = S2Mask({"attention_mask": torch.ones(1, 4, dtype=torch.bool)})
    assert _apply_to_tensors(lambda tensor: tensor.half(), {"attention_mask": mask})["attention_mask"] is mask


@pytest.mark.parametrize("name", BY)
def test_a_config_is_one_that_accelerate_knows(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert BY[name] in config.distributed_type
    assert yaml.safe_load(path.read_text())["num_processes"] == 8
