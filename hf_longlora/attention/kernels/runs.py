"""A row as runs of equal segments, for the pieces of `sdpa` that autograd puts together.

What segments see beside their own keys stands before these: K and V are copied once for it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..segments import Segment, Span


class Run(NamedTuple):
    """`segments` neighbours of `length` tokens each that see the same beside their own; 0 of them: padding.

    Args:
        start: The first token.
        segments: How many.
        length: Tokens in each; of padding, its tokens.
        seen: Spans of earlier tokens that each of them sees.
    """

    start: int
    segments: int
    length: int
    seen: tuple[Span, ...] = ()

    @property
    def tokens(self) -> int:
        return max(self.segments, 1) * self.length

    @property
    def others(self) -> int:
        """Keys that a segment sees beside its own."""
        return sum(end - start for start, end in self.seen)


def runs(cut: Sequence[Segment], length: int) -> Iterator[Run]:
    """Cover a row of `length` tokens: equal neighbours as one run, padding as runs of no segment."""
    run: Run | None = None
    at = 0
    for start, end, seen in cut:
        if run and (start, end - start, seen) == (at, run.length, run.seen):
            run = run._replace(segments=run.segments + 1)
        else:
            if run:
                yield run
            if start > at:
                yield Run(at, 0, start - at)
            run = Run(start, 1, end - start, seen)
        at = end
    if run:
        yield run
    if at < length:
        yield Run(at, 0, length - at)


def keys_of(every: Sequence[Run], x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The keys, or values, of each run's segments: `[B, H, E + S, D]` -> `[B, H, segments, others + length, D]`.

    Of padding, its own.
    """
    tokens = [run.tokens for run in every]
    before = x.shape[2] - sum(tokens)
    # `split` and not slices: its backward is one concatenation, that of a slice a zero-filled tensor of full size.
    for run, own in zip(every, x.split([before, *tokens], 2)[1:], strict=True):
        own = own.unflatten(2, (max(run.segments, 1), run.length))
        others = [
            x[:, :, None, before + start : before + end].expand(-1, -1, run.segments, -1, -1)
            for start, end in run.seen
        ]
        yield torch.cat([*others, own], dim=3) if others else own
