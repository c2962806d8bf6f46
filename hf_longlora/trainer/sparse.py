"""What the steps of a run that aren't dense are: shifted sparse attention, or windows, where texts can be cut."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..attention import check_skipping
from ..rope import AUTO, current_rope, only_reading
from ..schedule import Schedule
from .config import LongLoraSFTConfig
from .data import in_arrow

logger = logging.get_logger(__name__)

ANSWERED = frozenset(
    {"messages", "conversations", "prompt", "completion", "chosen", "rejected", "labels"}
    | {"completion_mask", "assistant_masks"}
)
"""Columns of examples that end in answers, or whose labels may leave out tokens."""

ANSWERS = (
    "In windows most of a document stands elsewhere than its end: answers, which alone are learned here "
    '(completion_only_loss, assistant_only_loss, labels of -100), would lose what they answer. Set sparse="s2", or '
    "learn all tokens (completion_only_loss=False)."
)


def settle_sparse(
    args: LongLoraSFTConfig,
    schedule: Schedule,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    columns: Collection[str] = (),
    own_collator: bool = False,
) -> Schedule:
    """The schedule with what `sparse="auto"` stands for, in `args`, too: "windows" for plain text that can be cut.

    `columns` are the training dataset's; `own_collator` says whether the trainer is given a collator.

    Raises:
        ValueError: if steps in windows are asked for and can't be had.
    """
    refusal = None
    try:
        _check_cuttable(args, schedule, config, model_class, columns, own_collator)
    except ValueError as error:
        refusal = error
    if args.sparse == AUTO:
        why = None
        if answers := sorted(set(columns) & ANSWERED):
            why = f"the dataset has answers ({', '.join(answers)})"
        elif args.sequence_parallel > 1:
            why = "processes share sequences"
        elif refusal is not None and not schedule.says_groups:  # who says how groups are knows why
            why = str(refusal)
        args.sparse = "windows" if why is None and not schedule.says_groups else "s2"
        if why is not None and replace(schedule, sparse="windows").any_windows and args.process_index == 0:
            logger.warning(f'Steps that aren\'t dense take sparse="s2", not "windows": {why}.')
        schedule = replace(schedule, sparse=args.sparse)
    if refusal is not None and schedule.any_windows:
        raise refusal
    return schedule


def _check_cuttable(
    args: LongLoraSFTConfig,
    schedule: Schedule,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    columns: Collection[str],
    own_collator: bool,
) -> None:
    """Refuse what can't be cut into windows."""
    if schedule.native_window is None:  # of a linear RoPE that may be read in two ways: windows would be of either
        only_reading(config, current_rope(config))
    if model_class is not None:
        check_skipping(model_class, config)
    completions = args.completion_only_loss
    if completions is None:
        completions = {"prompt", "completion"} <= set(columns)
    if completions or args.assistant_only_loss:
        raise ValueError(ANSWERS)
    if own_collator:
        raise ValueError('Windows are collated as they are: leave out `data_collator`, or set sparse="s2".')
    accelerator: Any = args.accelerator_config
    if accelerator.dispatch_batches:
        raise ValueError("`dispatch_batches` would tear windows apart; leave it out.")


def check_unmasked(view: Dataset) -> None:
    """Refuse steps in windows on a prepared dataset whose labels leave out tokens."""
    if any(pc.any(pc.equal(pc.list_flatten(labels), -100)).as_py() for labels in in_arrow(view, "labels")):
        raise ValueError(ANSWERS)
