"""What a stage sees of a dataset."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from .config import LongLoraSFTConfig

FILE_FORMATS = ("arrow", "csv", "generator", "json", "pandas", "parquet", "spark", "sql", "text", "webdataset", "xml")
"""What datasets calls a dataset that was loaded from files."""


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


def lengths(dataset: Dataset) -> np.ndarray:
    """Tokens in each document of a prepared dataset, int64: of a row, or of those packed into it."""
    column = "seq_lengths" if "seq_lengths" in dataset.column_names else "input_ids"
    parts = []
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        values = table[column]
        found = pc.list_flatten(values) if column == "seq_lengths" else pc.list_value_length(values)
        parts.append(found.to_numpy().astype(np.int64))
    return np.concatenate([np.zeros(0, np.int64), *parts])


def longest_document(view: Dataset) -> int:
    """Tokens in the longest document of a prepared dataset: a row, or one of those packed into a row."""
    return int(lengths(view).max(initial=0))


def describe(dataset: Dataset, args: LongLoraSFTConfig) -> str:
    """What the training data is, for a card: its name if it was loaded by one, its size, how it is packed."""
    name = dataset.info.dataset_name or ""
    known = "" if name in ("", *FILE_FORMATS) else f"{name}, "
    packed = f", packed ({args.packing_strategy})" if args.packing else ""
    return f"{known}{len(dataset):,} examples{packed}"
