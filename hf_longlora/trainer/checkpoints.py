"""Checkpoints of a staged run: which are whole, and which run one belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .stages import stored_schedule

logger = logging.get_logger(__name__)

SCHEDULE_NAME = "context_schedule.json"


def last_checkpoint(directory: str | Path) -> str | None:
    """The newest whole checkpoint in a run's output directory; `None` if there is none.

    A checkpoint is whole if the trainer's state, the last file written, is there and can be read. One that a kill or a
    full disk has left in part is passed over, with a warning.
    """
    found = [(int(path.name.rpartition("-")[2]), path) for path in Path(directory).glob("checkpoint-[0-9]*")]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning(f"{path} was not written to its end and is passed over.")
        else:
            return str(path)
    return None


def begin_checkpoint(folder: Path, signature: Mapping[str, Any]) -> None:
    """Make a checkpoint's folder, not whole until the trainer's state is written.

    Args:
        folder: The checkpoint's.
        signature: What makes the run this run, and `tokens`, trained on so far: TRL counts from 0 in a resumed run.
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


def check_signature(path: str, signature: Mapping[str, Any]) -> int:
    """The tokens that the run of a checkpoint had trained on, if it is the run of `signature`.

    Raises:
        ValueError: if it is another run's.
    """
    file = Path(path, SCHEDULE_NAME)
    if not file.is_file():
        raise ValueError(f"{path} is not a checkpoint of a staged run: it has no {SCHEDULE_NAME}.")
    found, own = json.loads(file.read_text()), json.loads(json.dumps(signature))
    if "stages" in own:
        found = stored_schedule(found)
        del own["native_window"]  # what it makes, groups and windows, is compared
    differing = [key for key in own if found.get(key) != own[key]]
    if differing:
        raise ValueError(
            f"{path} is of another run and can't be resumed: "
            + "; ".join(f"{key} was {found.get(key)}, is {own[key]}" for key in differing)
            + "."
        )
    return int(found.get("tokens", 0))
