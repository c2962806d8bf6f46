"""Checkpoints of a staged run: which are whole, and which run one belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from ..schedule import stored_schedule

logger = logging.get_logger(__name__)

SCHEDULE_NAME = "context_schedule.json"
STREAM_NAME = "stream.json"
"""Where a stream stood."""
MEANING = {
    "base.weights": "the base's weights are others, or in another dtype",
    "data": "the training data are others, or tokenized otherwise",
}
"""What it means that a hash of the signature differs."""


def whole_checkpoints(directory: str | Path) -> list[Path]:
    """The whole checkpoints in a run's output directory, the newest first, by number.

    A checkpoint is whole if the trainer's state, the last file written, is there and can be read. One that a kill or a
    full disk has left in part is passed over, with a warning. Folders of other names (`checkpoint-100-best`) are none.
    """
    found = {step: path for path in Path(directory).glob("checkpoint-*") if (step := step_of(path)) is not None}
    whole = []
    for _, path in sorted(found.items(), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning(f"{path} was not written to its end and is passed over.")
        else:
            whole.append(path)
    return whole


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's folder; `None` of another."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def last_checkpoint(directory: str | Path) -> str | None:
    """The newest whole checkpoint in a run's output directory; `None` if there is none."""
    return next(map(str, whole_checkpoints(directory)), None)


def begin_checkpoint(folder: Path, signature: Mapping[str, Any]) -> None:
    """Make a checkpoint's folder, not whole until the trainer's state is written.

    `signature` is what makes the run this run, and `tokens`, trained on so far: TRL counts from 0 in a resumed run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # not whole any more, if it was
    write_signature(folder, signature)


def write_signature(folder: Path, signature: Mapping[str, Any]) -> None:
    (folder / SCHEDULE_NAME).write_text(json.dumps(signature, indent=2))


def optimizer_states(accelerator: Any) -> str:
    """How a checkpoint holds the optimizer's states: by a launch of another kind they can't be read.

    Trainer starts them from zero then, without a word where DeepSpeed's are resumed without it. One process and DDP
    keep them alike, and so does FSDP over any number of processes; DeepSpeed has one part for each.
    """
    if accelerator.state.deepspeed_plugin is not None:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return f"those of DeepSpeed ZeRO-{stage} in {accelerator.num_processes} processes"
    return "those of FSDP" if getattr(accelerator.state, "fsdp_plugin", None) is not None else "whole"


def check_signature(path: str | Path, signature: Mapping[str, Any]) -> int:
    """The tokens that the run of a checkpoint had trained on, if it is the run of `signature`.

    Raises:
        ValueError: if it is another run's, with the first difference.
    """
    found, difference = _compare(path, signature)
    if difference is not None:
        raise ValueError(
            f"{path} is of another run and can't be resumed: {difference}. Give the run what it was started with, or "
            "start another one in a folder of its own (output_dir)."
        )
    return int(found.get("tokens", 0))


def _compare(path: str | Path, signature: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's signature, and its first difference from a run's."""
    file = Path(path, SCHEDULE_NAME)
    if not file.is_file():
        return {}, f"it has no {SCHEDULE_NAME}, which each checkpoint of a staged run has"
    found, own = json.loads(file.read_text()), json.loads(json.dumps(signature))
    if "stages" in own:
        found = stored_schedule(found)
        del own["native_window"]  # what it makes, groups and windows, is compared
    return found, first_difference(found, own)


def first_difference(found: Mapping[str, Any], own: Mapping[str, Any], inside: str = "") -> str | None:
    """The first difference between a checkpoint's signature and a run's, in words; `None` if they are equal."""
    for key, value in own.items():
        name = f"{inside}{key}"
        if key not in found:
            return f"it was written by another version, and doesn't say its {name}"
        if isinstance(value, dict) and isinstance(found[key], dict):
            difference = first_difference(found[key], value, f"{name}.")
            if difference is not None:
                return difference
        elif found[key] != value:
            return MEANING.get(name, f"{name} was {found[key]}, is {value}")
    dropped = sorted(found.keys() - own.keys()) if inside else []
    return f"{inside}{dropped[0]} was {found[dropped[0]]}, and is not set" if dropped else None


def refuse_others(directory: str | Path, signature: Mapping[str, Any], limited: bool) -> None:
    """Raise a `ValueError` if a run that saves checkpoints would have to share its folder.

    It could take another's for its own when it is resumed; and where their number is limited, Trainer deletes the
    oldest of all folders of that name, or those with the lowest number.
    """
    what = "Use another output_dir, or move it away."
    for path in whole_checkpoints(directory):
        _, difference = _compare(path, signature)
        if difference is not None:
            raise ValueError(
                f"{path} is of another run, and this one would save its checkpoints beside it: {difference}. {what}"
            )
    for path in Path(directory).glob("checkpoint-*"):
        if limited and path.is_dir() and step_of(path) is None:
            raise ValueError(f"{path} is no checkpoint, and save_total_limit would have Trainer delete it. {what}")


def check_complete(path: str, processes: int, scaled: bool, streamed: bool = False) -> None:
    """Raise a `ValueError` unless a checkpoint has all that a run is resumed from; Trainer would go on without.

    `scaled` is a run that scales its losses (fp16), `streamed` one whose data are a stream.
    """
    folder = Path(path)
    parts = {"the trainer's state": TRAINER_STATE_NAME, "the optimizer's state": "optimizer*"}
    parts |= {"the learning rate's schedule": SCHEDULER_NAME, "the random state": "rng_state*.pth"}
    if scaled:
        parts["the scale of the losses"] = SCALER_NAME
    if any(folder.glob("global_step*")):  # DeepSpeed's, of optimizer, schedule and scale
        parts = {what: name for what, name in parts.items() if name.startswith(("trainer", "rng"))}
    if streamed:
        parts["the place in the stream"] = STREAM_NAME
    missing = [f"{what} ({name})" for what, name in parts.items() if not any(folder.glob(name))]
    if missing:
        raise ValueError(
            f"{path} can't be resumed: it lacks {', '.join(missing)}. It was saved by save_only_model=True, or copied "
            "in part. Resume from a checkpoint that has it all, or begin a new run with these weights as its model "
            "(an adapter's by PeftModel.from_pretrained(base, checkpoint, is_trainable=True))."
        )
    saved = len(list(folder.glob("rng_state*.pth")))
    if saved != processes:
        logger.warning(
            f"{path} was saved by {saved} processes and is resumed by {processes}: what is random in the model, as "
            "dropout is, will not be what it would have been."
        )
