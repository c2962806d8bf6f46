"""What a stage sees of a dataset."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

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


def longest_document(view: Dataset) -> int:
    """Tokens in the longest document of a prepared dataset: a row, or one of those packed into a row."""
    if len(view) == 0:
        return 0
    table = view.with_format("arrow")[:]
    if "seq_lengths" in view.column_names:
        return pc.max(pc.list_flatten(table["seq_lengths"])).as_py() or 0
    return pc.max(pc.list_value_length(table["input_ids"])).as_py() or 0


def describe(dataset: Dataset, args: LongLoraSFTConfig) -> str:
    """What the training data is, for a card: its name if it was loaded by one, its size, how it is packed."""
    name = dataset.info.dataset_name or ""
    known = "" if name in ("", *FILE_FORMATS) else f"{name}, "
    packed = f", packed ({args.packing_strategy})" if args.packing else ""
    return f"{known}{len(dataset):,} examples{packed}"
