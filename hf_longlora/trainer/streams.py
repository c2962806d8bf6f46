"""A stream of examples as the rows of a run.

What is longer than a disk is read as it comes (`datasets.IterableDataset`): in blocks of so many examples, each of
which is cut or packed and shuffled as a dataset is that is had whole. A stage goes on where the one before it stopped,
and takes no more than its steps need; at its end a stream is read once more.

`datasets` says by `state_dict` where a stream stands, but keeps no shuffle buffer. So what is kept is where a block
begins: a resumed run makes that block once more, and passes over what it has trained on.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, repeat
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from datasets import Dataset
from datasets import IterableDataset as Stream
from datasets.utils import logging as datasets_logging
from transformers.utils import logging
from trl import pack_dataset

from ..schedule import Schedule
from .columns import check_tokens
from .config import LongLoraSFTConfig
from .data import COLUMNS, StageData, order, without_bars
from .identity import data_fingerprint
from .sparse import check_unmasked
from .windows import Served

logger = logging.get_logger(__name__)

HEAD = 16
"""Examples that are looked at before a run starts, at least."""

FILLED = 8
"""Rows that a block of packed examples fills, at least. Of texts that are short beside a row `shuffle_buffer` of them
may not fill one, and no sequence would have the stage's length; and windows are of the rows of a block."""


class Row(NamedTuple):
    """A row of a run, and what a run that is resumed at it needs.

    Args:
        example: `None`: it has been trained on.
        state: JSON.
    """

    example: Any
    state: str


class StreamCollator:
    """Collates the examples of `Row`s as the collator that it wraps, and adds `stream`, the state of the last."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        if rows[0].example is None:
            return {}
        return {**self.collator([row.example for row in rows]), "stream": rows[-1].state}


@dataclass(frozen=True)
class Mark:
    """Where a block begins.

    Args:
        row: The place of its first row in the run.
        block: Its number.
        passes: Over the stream, that are done.
        began: Where the pass began, as a `row`.
        read: Examples of the pass.
        stream: The stream's state; `None`: at its beginning.
    """

    row: int = 0
    block: int = 0
    passes: int = 0
    began: int = 0
    read: int = 0
    stream: dict[str, Any] | None = None


class StreamedRows(torch.utils.data.IterableDataset[Row]):
    """The rows of all stages, one after the other: as many as the steps take, and in each process all of them.

    Args:
        documents: Tokenized, not cut; `COLUMNS` alone.
        masked: Whether there are tokens that are not to be learned.
        vocabulary: The tokens that the model has.
    """

    def __init__(
        self, documents: Stream, args: LongLoraSFTConfig, schedule: Schedule, masked: bool, vocabulary: int
    ) -> None:
        self.documents, self.schedule, self.masked, self.vocabulary = documents, schedule, masked, vocabulary
        self.buffer, self.seed = args.shuffle_buffer, args.order_seed
        self.shuffle = args.train_sampling_strategy != "sequential"
        self.packing = args.packing_strategy if args.packing else None
        self.keep_end = args.truncation_mode == "keep_end"
        self.batch = args.examples_a_step
        self._ends = [steps * self.batch for steps in schedule.ends]
        self._state, self._done = "", 0

    def __len__(self) -> int:
        return self._ends[-1]

    def resume(self, state: str, done: int) -> None:
        """Begin with the rows after the first `done`, by the state of any before: only a block is read twice."""
        self._state, self._done = state, done

    def head(self) -> Dataset:
        """The first examples: `HEAD`, or as many as it takes to see one as long as the last stage's."""
        longest = self.schedule.stages[-1].max_length
        found, tokens = [], 0
        for document in _named(iter(self.documents), 0):
            found.append(_table(document))
            size = len(document["input_ids"])
            tokens = tokens + size if self.packing == "wrapped" else max(tokens, size)
            enough = tokens >= longest or (self.packing != "wrapped" and len(found) >= self.buffer)
            if enough and len(found) >= HEAD:
                break
        return self._checked(found)

    def view(self, documents: Dataset, stage: int) -> tuple[Dataset, StageData]:
        """Examples cut or packed to a stage's length, as TRL does it, and what that leaves of them."""
        length = self.schedule.stages[stage].max_length
        with without_bars():
            if self.packing is not None:
                view = pack_dataset(documents, length, self.packing)
            else:
                part = slice(-length, None) if self.keep_end else slice(None, length)
                view = documents.map(lambda row: {name: tokens[part] for name, tokens in row.items()})
                if "labels" in view.column_names:
                    view = view.filter(lambda row: any(label != -100 for label in row["labels"]))
        return view, StageData.of(documents, view, length, self.packing, self.masked, None)

    def __iter__(self) -> Iterator[Row]:
        state = json.loads(self._state) if self._state else {}
        mark = Mark(**state.get("mark", {}))
        seen = {int(stage): StageData(**data) for stage, data in state.get("seen", {}).items()}
        yield from repeat(Row(None, ""), mark.row)
        documents = self._open(mark)
        while mark.row < len(self):
            stage = bisect_right(self._ends, mark.row)
            left = self._ends[stage] - mark.row
            block, more = self._block(documents, stage, left, mark)
            if "digest" in state and _digest(block) != state["digest"]:
                logger.warning(
                    "The stream doesn't go on where it stopped (datasets keeps no shuffle buffer), and is read from "
                    "its start. The trainer shuffles by itself, as `shuffle_buffer` says."
                )
                documents = self._open(replace(mark, stream=None))
                for _ in islice(documents, mark.read):
                    pass
                block, more = self._block(documents, stage, left, mark)
                if _digest(block) != state["digest"]:
                    raise ValueError(
                        "The stream gives other examples than it gave the run that is resumed, so that this would be "
                        "another run. Let it give the same ones in the same order each time, or start anew."
                    )
            state = {}
            rows: Any = []
            if len(block) > 0:
                view, data = self.view(block, stage)
                if self.schedule.has_windows(stage):
                    check_unmasked(view)
                before = seen
                seen = {**seen, stage: seen[stage] + data if stage in seen else data}
                places = list(order(len(view), len(view), self.seed + mark.block, self.shuffle)) if len(view) else []
                rows = view.select(places[:left])
                if self.schedule.has_windows(stage):
                    rows = Served(rows, self.seed, self.schedule, self.batch, mark.row)
                told = json.dumps(
                    {
                        "mark": asdict(mark),
                        "digest": _digest(block),
                        "seen": {number: asdict(data) for number, data in before.items()},
                        "data": {number: asdict(data) for number, data in seen.items()},
                    }
                )
            for place in range(len(rows)):
                done = mark.row + place < self._done
                yield Row(None, "") if done else Row(rows[place], told)
            now = mark.row + len(rows)
            if more:
                read = mark.read + len(block)
                mark = replace(mark, row=now, block=mark.block + 1, read=read, stream=self.documents.state_dict())
                continue
            if now == mark.began:
                raise ValueError(
                    f"Stage {stage + 1} (max_length {self.schedule.stages[stage].max_length:,}) finds nothing to "
                    "learn from in all of the stream. Give other examples, or a longer stage."
                )
            mark = Mark(row=now, block=mark.block + 1, passes=mark.passes + 1, began=now)
            documents = self._open(mark)

    def _open(self, mark: Mark) -> Iterator[dict[str, Any]]:
        """The stream from a mark on."""
        self.documents.set_epoch(mark.passes)
        self.documents.load_state_dict(mark.stream)  # `None`, too: one that was loaded stays
        return _named(_quietly(iter(self.documents)), 0 if mark.stream is None else mark.read)

    def _block(self, documents: Iterator[dict[str, Any]], stage: int, left: int, mark: Mark) -> tuple[Dataset, bool]:
        """The next examples, and whether the stream may go on: `buffer` of them and more where these are packed and
        don't fill `FILLED` rows, or as many as make `left` rows."""
        length = self.schedule.stages[stage].max_length
        found: list[pa.Table] = []
        room = left * length
        filled = room - (0 if self.packing is None else FILLED * length)
        try:
            while room > 0 and (len(found) < self.buffer or room > filled):
                document = next(documents)
                found.append(_table(document))
                tokens = len(document["input_ids"])
                room -= length if self.packing is None else min(tokens, length) if self.packing == "bfd" else tokens
            more = True
        except StopIteration:
            more = False
        return self._checked(found), more

    def _checked(self, found: Sequence[pa.Table]) -> Dataset:
        if not found:
            return Dataset.from_dict({})
        documents = Dataset(pa.concat_tables(found))
        check_tokens(documents, self.vocabulary)
        return documents


def stage_data(state: str) -> dict[int, StageData]:
    """What stages, counted from 0, have seen of a stream, by the state of a row."""
    return {int(stage): StageData(**data) for stage, data in json.loads(state)["data"].items()} if state else {}


def _digest(block: Dataset) -> str | None:
    """What tells a block from others; `None` of no examples, where a buffer had read a short stream to its end."""
    return data_fingerprint(block) if len(block) > 0 else None


def _table(document: Mapping[str, Any]) -> pa.Table:
    return pa.table({name: pa.array([document[name]], pa.list_(pa.int64())) for name in COLUMNS if name in document})


def _named(documents: Iterator[dict[str, Any]], read: int) -> Iterator[dict[str, Any]]:
    """Raises a `ValueError` where a stream can't be read on, which says after how many examples."""
    while True:
        try:
            document = next(documents)
        except StopIteration:
            return
        except Exception as error:  # of many types: one for each format and compression
            said = isinstance(error, (OSError, ValueError)) and str(error)
            raise ValueError(f"The stream can't be read on after {read:,} examples: {said or repr(error)}") from error
        read += 1
        yield document


def _quietly(documents: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same, without the warning of `datasets` that a shuffle buffer (of one example, for shards) is empty."""
    verbosity = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity_error()
    try:
        first = next(documents, None)
    finally:
        datasets_logging.set_verbosity(verbosity)
    if first is not None:
        yield first
        yield from documents
