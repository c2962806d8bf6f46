"""Launches of kernels that take segments of any length, one after the other, with a list of where each begins.

Rows of a batch follow one another, and padding is cut into segments of its own, whose results are then set to 0: so a
batch is one launch for each part, whatever is packed into it and however it is padded.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from ..segments import Part, Span
from .in_place import Call, Engine, Tensors, attend_in_place, heads_of

LAUNCH_TOKENS = 32_768
"""Tokens in a launch, or one segment if that is longer: kernels add up the gradients of queries in fp32, which for
all heads is as much as queries and their gradients together. 131,072 in one launch are 3% faster and take 1.32 times
the tensors' memory instead of 1.08 (`benchmarks/results/attention.csv`)."""


class Launch(NamedTuple):
    """Segments of the tokens from `start` on, in the batch's rows one after the other.

    Args:
        heads: Query heads.
        kv_heads: Their key/value heads.
        start: The first token.
        lengths: Tokens in each segment.
        padding: Which of them are padding.
    """

    heads: Span
    kv_heads: Span
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
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def plan(parts: tuple[Part, ...], length: int, limit: float) -> list[int]:
    """The launches of a call, of `limit` tokens at most, as a flat list, for the operator takes numbers only."""
    found: list[int] = []
    for heads, kv_heads, rows in parts:
        pieces = [piece for row in rows for piece in _cover(row, length)]
        start = 0
        held: list[tuple[int, bool]] = []
        for size, real in [*pieces, (0, True)]:
            tokens = sum(n for n, _ in held)
            if held and (size == 0 or tokens + size > limit):
                padding = [i for i, (_, kept) in enumerate(held) if not kept]
                found += [*heads, *kv_heads, start, len(held), len(padding), *(n for n, _ in held), *padding]
                start, held = start + tokens, []
            held.append((size, real))
    return found


def _cover(spans: Sequence[Span], length: int) -> Iterator[tuple[int, bool]]:
    """Lengths that cover a row, and which of them are segments: the others are padding."""
    at = 0
    for start, end in spans:
        if start > at:
            yield start - at, False
        yield end - start, True
        at = end
    if at < length:
        yield length - at, False


def launches(numbers: Sequence[int]) -> Iterator[Launch]:
    at = 0
    while at < len(numbers):
        a, b, c, d, start, segments, pads = numbers[at : at + 7]
        at += 7
        yield Launch(
            (a, b),
            (c, d),
            start,
            tuple(numbers[at : at + segments]),
            tuple(numbers[at + segments : at + segments + pads]),
        )
        at += segments + pads


def tokens_of(launch: Launch, x: torch.Tensor, heads: Span) -> torch.Tensor:
    """The launch's tokens, a view: `[B, H, S, D]` -> `[tokens, h, D]`."""
    return heads_of(x, heads).transpose(1, 2).flatten(0, 1)[launch.start : launch.start + launch.tokens]


def engine(
    forward: Callable[[Launch, Call, float], None],
    backward: Callable[[Launch, torch.Tensor, Call, Tensors, float], None],
) -> Engine:
    """An engine over these launches."""
    return Engine(launches, tokens_of, forward, backward)


def attend_ragged(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Sequence[Part],
    scale: float | None,
) -> torch.Tensor:
    """`attend_in_place` over the launches of `parts`. Rows that don't follow one another in memory are copied."""
    length = query.shape[2]
    query, key, value = (
        x if x.stride(0) == length * x.stride(2) or x.shape[0] == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in (query, key, value)
    )
    return attend_in_place(name, query, key, value, plan(tuple(parts), length, LAUNCH_TOKENS), scale)
