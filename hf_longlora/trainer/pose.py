"""PoSE: the tokens of a long row in windows of the length that the model was trained at, with their true positions.

Positional skip-wise training (PoSE, arXiv 2309.10400) teaches long distances without long sequences: positions skip
inside a window. Here a window is two chunks of one document, whose windows use each of its tokens once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import Dataset

from ..attention.segments import Span
from .stages import Schedule

SEED = "pose_seed"
"""Of an example: what its windows are drawn by. Examples of other steps have none."""
FILLER = 2
"""Tokens in a `filler`."""


def windows(length: int, size: int, draw: random.Random) -> list[list[Span]]:
    """Cut a document into windows of `size` tokens, the last of what is left.

    A window is two chunks, of random sizes; the chunks of all windows follow each other in random order.

    Args:
        length: Tokens in the document.
        size: Tokens in a window, at least 1.
        draw: Where chance comes from.

    Returns:
        Of each window its chunks, in the order of the document. One chunk is the whole of a document that is no longer
        than a window.
    """
    if length <= size:
        return [[(0, length)]]
    sizes = [min(size, length - at) for at in range(0, length, size)]
    chunks: list[tuple[int, int]] = []  # window, tokens
    for number, tokens in enumerate(sizes):
        first = draw.randint(1, max(1, tokens - 1))
        chunks += [(number, part) for part in (first, tokens - first) if part > 0]
    draw.shuffle(chunks)
    found: list[list[Span]] = [[] for _ in sizes]
    at = 0
    for number, tokens in chunks:
        found[number].append((at, at + tokens))
        at += tokens
    return found


class PoseCollator:
    """Collates the examples of PoSE steps into windows, others as the collator that it wraps.

    The windows of all examples make one packed row, as TRL's padding-free collator gives it: `input_ids`, `labels` and
    `position_ids` `[1, S]`, `cu_seq_lens_q` and `cu_seq_lens_k` `[windows + 1]`, `max_length_q` and `max_length_k`.
    Positions are those in the document. A token whose predecessor in the window isn't its predecessor in the text is
    not predicted.

    Args:
        collator: For all other examples.
        window: Tokens in a window.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], window: int) -> None:
        self.collator, self.window = collator, window

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if SEED not in examples[0]:
            return self.collator(examples)
        parts: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
        ends = [0]
        for example in examples:
            draw = random.Random(example[SEED])
            tokens = torch.tensor(example["input_ids"])
            labels = torch.tensor(example.get("labels", example["input_ids"]))
            start = 0
            for length in example.get("seq_lengths") or [len(tokens)]:
                for chunks in windows(length, self.window, draw):
                    position = torch.cat([torch.arange(*chunk) for chunk in chunks])
                    parts["position_ids"].append(position)
                    parts["input_ids"].append(tokens[start + position])
                    parts["labels"].append(labels[start + position])
                    ends.append(ends[-1] + len(position))
                start += length
        row = {name: torch.cat(found)[None] for name, found in parts.items()}
        row["labels"][:, 1:][row["position_ids"].diff() != 1] = -100
        row["labels"][:, ends[:-1]] = -100
        return row | _boundaries(ends)


def _boundaries(ends: Sequence[int]) -> dict[str, Any]:
    cu_seq_lens = torch.tensor(ends, dtype=torch.int32)
    longest = max(b - a for a, b in pairwise(ends))
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class Served(Dataset[dict[str, Any]]):
    """A dataset whose examples of PoSE steps say what their windows are drawn by: a function of their place alone.

    Args:
        rows: As the trainer serves them, step after step.
        seed: The run's.
        schedule: The stages.
        batch: Examples of an optimizer step, of all processes.
    """

    def __init__(self, rows: Any, seed: int, schedule: Schedule, batch: int) -> None:
        self.rows, self.seed, self.schedule, self.batch = rows, seed, schedule, batch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        return [
            row | {SEED: f"{self.seed}/{place}"} if self.schedule.step(place // self.batch).mode == "pose" else row
            for place, row in zip(places, self.rows.__getitems__(places), strict=True)
        ]


def pieces(ends: Sequence[int], most: int, count: int = 1) -> list[Span]:
    """Consecutive windows taken together, up to `most` tokens; in `count` pieces or more, if there are such many.

    Args:
        ends: Where windows end, from 0.
        most: Tokens in a piece that is more than one window.
        count: Pieces that are wanted.

    Returns:
        Of each piece its windows, half-open.
    """
    found: list[Span] = []
    for window in range(len(ends) - 1):
        if found and ends[window + 1] - ends[found[-1][0]] <= most:
            found[-1] = (found[-1][0], window + 1)
        else:
            found.append((window, window + 1))
    while len(found) < min(count, len(ends) - 1):
        number = max(range(len(found)), key=lambda i: found[i][1] - found[i][0])
        first, end = found[number]
        middle = (first + end) // 2
        found[number : number + 1] = [(first, middle), (middle, end)]
    return found


def piece(inputs: Mapping[str, Any], ends: Sequence[int], of: Span) -> dict[str, Any]:
    """Some of the windows of a packed row, as a row of their own.

    Args:
        inputs: What `PoseCollator` gave.
        ends: Where its windows end.
        of: The windows, half-open.
    """
    start, end = ends[of[0]], ends[of[1]]
    row = {name: inputs[name][:, start:end] for name in ("input_ids", "labels", "position_ids")}
    device = inputs["cu_seq_lens_q"].device
    told = _boundaries([at - start for at in ends[of[0] : of[1] + 1]])
    return row | {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in told.items()}


def filler(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `FILLER` tokens from which nothing is learned, for a process that has fewer pieces than others."""
    row = {name: inputs[name][:, :1].expand(-1, FILLER) for name in ("input_ids", "labels")}
    row["labels"] = torch.full_like(row["labels"], -100)
    row["position_ids"] = torch.arange(FILLER, device=row["labels"].device)[None]
    device = inputs["cu_seq_lens_q"].device
    return row | {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in _boundaries([0, FILLER]).items()}
