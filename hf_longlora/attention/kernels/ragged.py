"""Launches of kernels that take segments of any length, one after the other, with a list of where each begins.

Padding is cut into segments of its own, whose results are then set to 0, and where rows follow one another in memory
a launch goes through several: a batch is one launch for each part, whatever is packed into it and however it is
padded.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from ..segments import Part, Segment, Span
from .in_place import ENGINES, Engine, attend_in_place, heads_of, rows_follow
from .seen import Call, Tensors, own_keys

LAUNCH_TOKENS = 32_768
"""Tokens in a launch, or one segment if that is longer: kernels add up the gradients of queries in fp32, which for
all heads is as much as queries and their gradients together. 131,072 in one launch are 3% faster and take 1.32 times
the tensors' memory instead of 1.08 (`benchmarks/results/attention.csv`)."""


class Launch(NamedTuple):
    """Segments of the tokens from `start` on, in the batch's rows one after the other.

    Args:
        heads: Query heads.
        kv_heads: Their key/value heads.
        joins_rows: Whether it goes through more than one row.
        start: The first token, counted through the rows.
        lengths: Tokens in each segment.
        padding: Which of them are padding.
    """

    heads: Span
    kv_heads: Span
    joins_rows: bool
    start: int
    lengths: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def edges(self, device: torch.device) -> torch.Tensor:
        """Where segments begin and end, counted from `start`: `[segments + 1]`, int32."""
        return _edges(self.lengths, device)

    def clear(self, *tensors: torch.Tensor) -> None:
        """Set what padding got to 0: tensors `[tokens, h, D]`."""
        starts = [0, *accumulate(self.lengths)]
        for index in self.padding:
            for x in tensors:
                x[starts[index] : starts[index + 1]] = 0


@lru_cache(maxsize=64)
def _edges(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where pieces of these lengths begin and end, one after the other: `[pieces + 1]`, int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def encoded(parts: tuple[Part, ...], length: int, follow: bool, limit: float) -> list[int]:
    """The launches of a call as a flat list of numbers, which is what a custom operator takes.

    Args:
        parts: What is cut where.
        length: Tokens in a row.
        follow: Whether rows follow one another in memory, so that a launch can go through several.
        limit: Tokens in a launch.
    """
    found: list[int] = []
    for heads, kv_heads, rows in parts:
        covers = [list(_cover(row, length)) for row in rows]
        start = 0
        for stretch in [list(chain(*covers))] if follow else covers:
            for held in _within(stretch, limit):
                sizes = [size for size, _ in held]
                padding = [index for index, (_, real) in enumerate(held) if not real]
                end = start + sum(sizes)
                joins = start // length != (end - 1) // length
                found += [*heads, *kv_heads, joins, start, len(held), len(padding), *sizes, *padding]
                start = end
    return found


def _within(pieces: Sequence[tuple[int, bool]], limit: float) -> Iterator[list[tuple[int, bool]]]:
    """Neighbours of `limit` tokens at most, or a longer one alone."""
    held: list[tuple[int, bool]] = []
    for piece in pieces:
        if held and sum(size for size, _ in held) + piece[0] > limit:
            yield held
            held = []
        held.append(piece)
    if held:
        yield held


def _cover(cut: Sequence[Segment], length: int) -> Iterator[tuple[int, bool]]:
    """Lengths that cover a row, and which of them are segments: the others are padding."""
    at = 0
    for start, end, _ in cut:
        if start > at:
            yield start - at, False
        yield end - start, True
        at = end
    if at < length:
        yield length - at, False


def decoded(numbers: Sequence[int]) -> Iterator[Launch]:
    """The launches that `encoded` gave."""
    at = 0
    while at < len(numbers):
        a, b, c, d, joins, start, segments, pads = numbers[at : at + 8]
        at += 8
        yield Launch(
            (a, b),
            (c, d),
            bool(joins),
            start,
            tuple(numbers[at : at + segments]),
            tuple(numbers[at + segments : at + segments + pads]),
        )
        at += segments + pads


def tokens_of(launch: Launch, x: torch.Tensor, heads: Span) -> torch.Tensor:
    """The launch's tokens, a view: `[B, H, S, D]` -> `[tokens, h, D]`."""
    own = heads_of(x, heads).transpose(1, 2)
    if launch.joins_rows:
        own = own.view(-1, *own.shape[2:])  # raises on rows that don't follow one another in memory
        return own[launch.start : launch.start + launch.tokens]
    row, start = divmod(launch.start, x.shape[2])
    return own[row, start : start + launch.tokens]


def ragged_kernel(
    name: str,
    forward: Callable[[Launch, Call, float], None],
    backward: Callable[[Launch, torch.Tensor, Call, Tensors, float], None],
) -> Callable[..., torch.Tensor]:
    """A kernel by these launches; `forward` and `backward` as `Engine` has them."""
    ENGINES[name] = Engine(decoded, tokens_of, forward, backward)

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: Sequence[Part],
        *,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention within segments: `[B, H, S, D]`, `[B, H_kv, E + S, D]` -> `[B, S, H, D]`, 0 in padding."""
        follow = rows_follow(query, own_keys(query, key), own_keys(query, value))
        launches = encoded(tuple(parts), query.shape[2], follow, LAUNCH_TOKENS)
        return attend_in_place(name, query, key, value, launches, parts, scale)

    return kernel
