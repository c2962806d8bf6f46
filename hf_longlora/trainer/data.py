"""What a stage sees of a dataset."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import (
    Dataset,
    IterableDataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging

from .config import LongLoraSFTConfig

logger = logging.get_logger(__name__)

COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks")
"""The columns of a prepared dataset that have a value for each token."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, `datasets` shows no progress."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def with_length(args: LongLoraSFTConfig, max_length: int | None) -> LongLoraSFTConfig:
    """`args` with another `max_length`; the rest is shared."""
    args = copy.copy(args)
    args.max_length = max_length
    return args


def order(examples: int, wanted: int, seed: int, shuffle: bool) -> Iterable[int]:
    """`wanted` indices into a stage's view: passes over it, each in another order."""
    generator = torch.Generator().manual_seed(seed)
    passes = [
        torch.randperm(examples, generator=generator) if shuffle else torch.arange(examples)
        for _ in range(math.ceil(wanted / examples))
    ]
    return torch.cat(passes)[:wanted].tolist()


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset or of a stream, which may not say them before its first example."""
    return list(next(iter(dataset), {})) if dataset.column_names is None else dataset.column_names


def limited(dataset: Any, examples: int | None) -> Any:
    """The first examples of a dataset or a stream; `None`: all."""
    if examples is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.take(examples)
    return dataset.select(range(min(examples, len(dataset))))


def evaluation_data(dataset: Any, examples: int | None) -> Any:
    """An evaluation dataset, or each of a mapping, up to so many examples.

    A stream, which has to be limited, is read into a dataset: every evaluation is of the same text.
    """
    if isinstance(dataset, Mapping):
        return {name: evaluation_data(part, examples) for name, part in dataset.items()}
    if not isinstance(dataset, IterableDataset):
        return dataset if dataset is None or examples is None else limited(dataset, examples)
    if examples is None:
        raise ValueError(
            "The evaluation data are a stream, which may have no end: say by `max_eval_examples` how many of its "
            "examples are evaluated, the same ones each time."
        )
    return Dataset.from_list(list(dataset.take(examples)), features=dataset.features)


def in_arrow(dataset: Dataset, column: str) -> Iterator[Any]:
    """A column of lists, a thousand rows at a time."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        yield table[column]


def lengths(dataset: Dataset) -> np.ndarray:
    """Tokens in each document of a prepared dataset, int64: of a row, or of those packed into it."""
    column = "seq_lengths" if "seq_lengths" in dataset.column_names else "input_ids"
    measure = pc.list_flatten if column == "seq_lengths" else pc.list_value_length
    parts = [measure(values).to_numpy().astype(np.int64) for values in in_arrow(dataset, column)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def learned(dataset: Dataset) -> int:
    """Tokens of a prepared dataset that a model learns to predict: those that its labels don't leave out."""
    learned = (pc.not_equal(pc.list_flatten(labels), -100) for labels in in_arrow(dataset, "labels"))
    return sum(pc.sum(each).as_py() or 0 for each in learned)


@dataclass(frozen=True)
class StageData:
    """What a stage sees of the data.

    Args:
        given: Examples there are.
        dropped: Examples of which nothing is left at the stage's length.
        cut: Examples of which a part is left.
        tokens, used: Tokens there are, and tokens left; with `masked` only tokens that are learned count.
        masked: Whether some tokens are not learned (their labels are -100).
        passes: How often the stage goes through what is left; `None` for a stream, whose counts are of what was read.
    """

    given: int
    dropped: int
    cut: int
    tokens: int
    used: int
    masked: bool
    passes: float | None

    @classmethod
    def of(
        cls, tokenized: Dataset, view: Dataset, max_length: int, packing: str | None, masked: bool, served: int | None
    ) -> StageData:
        """From a tokenized dataset and its view, which TRL has cut or packed (`packing`) to `max_length` tokens.

        `served` is how many rows of the view the stage takes; `None` for a part of a stream.
        """
        before, after = lengths(tokenized), lengths(view)
        longer, full = int((before > max_length).sum()), int((before == max_length).sum())
        if packing is None:
            dropped, cut = len(before) - len(after), max(int((after == max_length).sum()) - full, 0)
        else:  # "wrapped" and "bfd_split" go on in the next row
            dropped, cut = int((before == 0).sum()), longer if packing == "bfd" else 0
        count: Any = learned if masked else lambda dataset: int(lengths(dataset).sum())
        passes = None if served is None else served / len(view) if len(view) else 0.0
        return cls(len(before), dropped, cut, count(tokenized), count(view), masked, passes)

    def __add__(self, more: StageData) -> StageData:
        """For streams: the counts of what was read before and of what was read after it, together."""
        names = ("given", "dropped", "cut", "tokens", "used")
        return replace(self, **{name: getattr(self, name) + getattr(more, name) for name in names})

    @property
    def share(self) -> float:
        """The share of tokens that is left."""
        return self.used / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        lost = [f"{count:,} {what}" for what, count in (("cut", self.cut), ("dropped", self.dropped)) if count]
        kept = f"{self.given - self.dropped:,} of {self.given:,} examples" + (f" ({', '.join(lost)})" if lost else "")
        what = "tokens to learn from" if self.masked else "tokens"
        passes = "as streamed" if self.passes is None else f"{self.passes:.3g} passes"
        return f"{kept}, {self.used:,} of {self.tokens:,} {what} ({self.share:.0%}), {passes}"


def describe(dataset: Dataset | IterableDataset, args: LongLoraSFTConfig) -> str:
    """What the training data is, for a card: its name if it was loaded by one, its size, how it is packed."""
    name = dataset.info.dataset_name
    known = "" if name in (None, dataset.info.builder_name) else f"{name}, "  # of files both are their format
    packed = f", packed ({args.packing_strategy})" if args.packing else ""
    if isinstance(dataset, IterableDataset):
        limit = "" if args.max_examples is None else f"the first {args.max_examples:,} examples of "
        return f"{known}{limit}a stream{packed}"
    return f"{known}{len(dataset):,} examples{packed}"


def say_data(stages: Sequence[StageData], args: LongLoraSFTConfig) -> None:
    """Log what each stage sees of the data, one line a stage; a warning where that is less than half."""
    for number, data in enumerate(stages, start=1):
        if data.share >= 0.5:
            logger.info(f"Stage {number}: {data}")
            continue
        remedy = (
            'packing_strategy="bfd_split" or "wrapped" goes on in the next row with what is over'
            if args.packing
            else 'packing=True with packing_strategy="bfd_split" or "wrapped" cuts nothing off'
        )
        logger.warning(f"Stage {number} uses less than half of the data: {data}. A longer stage sees more; {remedy}.")
