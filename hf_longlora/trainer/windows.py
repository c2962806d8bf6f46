"""Windows: the tokens of long rows in pieces of the length that the model was trained at, with their true positions.

A window is a run of neighbouring tokens of a document (`sparse="windows"`), or two chunks of one, between which
positions skip (`sparse="pose"`): so positional skip-wise training (PoSE, arXiv 2309.10400) teaches long distances
without long sequences. The windows of a row use each of its tokens once.

The windows of a step are of as many rows as a row has windows, not of one: what a row teaches is then spread over
steps. SmolLM2-135M, 8,192 -> 65,536 tokens, each 4th step dense, perplexity against dense training: windows of the
step's own row +1.25% (books) and +0.72% (math), shuffled among the rows of all steps +0.78% and -0.14%
(benchmarks/results/pretrained.csv, "native windows, 4th dense").
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, pairwise
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..attention.segments import Span
from ..schedule import Schedule

READ = ("input_ids", "labels", "seq_lengths")
"""The columns of rows that windows are made of: with `remove_unused_columns=False` there are more."""


class Window(NamedTuple):
    """Tokens that see each other: chunks of a document of a row.

    Args:
        start: Where the document begins in the row.
        chunks: Of the document, in order.
    """

    start: int
    chunks: list[Span]

    @property
    def tokens(self) -> int:
        return sum(end - start for start, end in self.chunks)


def cut(lengths: Iterable[int], size: int, draw: random.Random | None = None) -> list[Window]:
    """Cut the documents of a row into windows of `size` tokens; the last window of a document may be shorter.

    A document that is no longer than that stays whole. With `draw`, where chance comes from, a window is two chunks of
    random sizes, and the chunks of a document's windows follow each other in random order.
    """
    found, start = [], 0
    for length in lengths:
        sizes = [min(size, length - at) for at in range(0, length, size)]
        pieces = list(enumerate(sizes))  # window, tokens
        if draw is not None and len(sizes) > 1:
            pieces = [piece for number, tokens in pieces for piece in _halves(number, tokens, draw)]
            draw.shuffle(pieces)
        chunks: list[list[Span]] = [[] for _ in sizes]
        at = 0
        for number, tokens in pieces:
            chunks[number].append((at, at + tokens))
            at += tokens
        found += [Window(start, own) for own in chunks]
        start += length
    return found


def _halves(number: int, tokens: int, draw: random.Random) -> list[tuple[int, int]]:
    first = draw.randint(1, max(1, tokens - 1))
    return [(number, part) for part in (first, tokens - first) if part > 0]


def slots(windows: Sequence[Window], count: int) -> list[list[Window]]:
    """Share the windows of a row out among `count` slots, about as many tokens in each.

    Windows of one size go to a slot each, in order; where a row has more, the largest go first and each to the slot
    that has least, so that documents of many lengths in a row don't make steps that are longer than rows.
    """
    found: list[list[int]] = [[] for _ in range(count)]
    least = [(0, slot) for slot in range(count)]
    for number in sorted(range(len(windows)), key=lambda number: -windows[number].tokens):
        tokens, slot = heapq.heappop(least)
        found[slot].append(number)
        heapq.heappush(least, (tokens + windows[number].tokens, slot))
    return [[windows[number] for number in sorted(own)] for own in found]


class Windows(NamedTuple):
    """An example of a step in windows: these, one after the other.

    Args:
        input_ids, position_ids: int64 `[S]`; positions are those in the document.
        labels: int64 `[S]`. A token whose predecessor in the window isn't its predecessor in the text is -100.
        lengths: Tokens in each window.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    lengths: list[int]

    @classmethod
    def of(cls, windows: Sequence[tuple[Window, np.ndarray, np.ndarray]]) -> Windows:
        """Made of windows, each with tokens and labels of its row."""
        chunks = [(of.start, chunk, ids, labels) for of, ids, labels in windows for chunk in of.chunks]
        ids = np.concatenate([ids[start + a : start + b] for start, (a, b), ids, _ in chunks]).astype(np.int64)
        labels = np.concatenate([labels[start + a : start + b] for start, (a, b), _, labels in chunks]).astype(
            np.int64
        )
        positions = np.concatenate([np.arange(a, b, dtype=np.int64) for _, (a, b), _, _ in chunks])
        lengths = [of.tokens for of, _, _ in windows]
        labels[1:][np.diff(positions) != 1] = -100
        labels[list(accumulate(lengths[:-1], initial=0))] = -100
        return cls(ids, labels, positions, lengths)


class WindowCollator:
    """Collates the examples of steps in windows into one packed row, others as the collator that it wraps.

    The row is as TRL's padding-free collator gives it: `input_ids`, `labels` and `position_ids` `[1, S]`,
    `cu_seq_lens_q` and `cu_seq_lens_k` `[windows + 1]`, `max_length_q` and `max_length_k`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        if not isinstance(examples[0], Windows):
            return self.collator(examples)
        *tokens, lengths = zip(*examples, strict=True)
        joined = [torch.from_numpy(np.concatenate(each))[None] for each in tokens]
        row = dict(zip(Windows._fields, joined, strict=False))
        return row | boundaries(list(accumulate(chain(*lengths), initial=0)))


def boundaries(ends: Sequence[int], device: torch.device | None = None) -> dict[str, Any]:
    """What TRL's padding-free collator says of documents in a row, by their `ends`."""
    cu_seq_lens = torch.tensor(ends, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(ends))
    return dict(cu_seq_lens_q=cu_seq_lens, cu_seq_lens_k=cu_seq_lens, max_length_q=longest, max_length_k=longest)


class Served(Dataset[dict[str, Any] | Windows]):
    """A dataset whose examples of steps in windows are made of windows of several rows: a function of the place alone.

    The windows of a row are in as many slots as the stage's `max_length` holds windows. Of the rows that a stage's
    steps in windows take, in their order, the example at the i-th place has slot j of the (i - j)-th, from the last
    again before the first. So each token is used once, and rows of equal lengths make examples of equal lengths.

    Args:
        rows: As the trainer serves them, step after step: all of a run, or some that follow each other.
        seed: The run's. Chunks are drawn by it and the place of their row.
        schedule: The stages.
        batch: Examples of an optimizer step, of all processes.
        start: The place of the first row in the run.
    """

    def __init__(self, rows: Any, seed: int, schedule: Schedule, batch: int, start: int = 0) -> None:
        self.rows, self.seed, self.schedule, self.batch, self.start = rows, seed, schedule, batch, start
        columns = [name for name in READ if name in rows.column_names]
        # A place of 65,536 tokens of 8 rows takes 1 ms, one row as a list 19.
        self._tables = rows.with_format("arrow", columns=columns)
        end = start + len(rows)
        self._places = [
            [
                place
                for step in range(max(first, start // batch), min(last, -(-end // batch)))
                if schedule.step(step).mode == "windows"
                for place in range(max(step * batch, start), min((step + 1) * batch, end))
            ]
            if schedule.has_windows(stage)
            else []
            for stage, (first, last) in enumerate(pairwise([0, *schedule.ends]))
        ]
        """For each stage: the places, among the rows here, of the examples of its steps in windows."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any] | Windows:
        place = self.start + index
        step = self.schedule.step(place // self.batch)
        if step.mode != "windows":
            return self.rows[index]
        size = self.schedule.native_window
        assert size is not None
        among, count = self._places[step.stage], ceil(self.schedule.stages[step.stage].max_length / size)
        own = bisect_left(among, place)
        places = [among[(own - slot) % len(among)] for slot in range(count)]
        table = self._tables[[place - self.start for place in places]]
        pose = self.schedule.sparse_by(step.stage) == "pose"
        found = []
        for slot, place in enumerate(places):
            row = {name: table[name][slot].values.to_numpy() for name in table.column_names}
            ids = row["input_ids"]
            draw = random.Random(f"{self.seed}/{place}") if pose else None
            windows = cut(row["seq_lengths"].tolist() if "seq_lengths" in row else [len(ids)], size, draw)
            found += [(window, ids, row.get("labels", ids)) for window in slots(windows, count)[slot]]
        return Windows.of(found)
