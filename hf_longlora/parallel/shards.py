"""The pattern over shards: what the queries of one process see, and what of that other processes hold.

Each process of a group holds neighbouring tokens of every row, its *shard*, in the order of ranks. Documents, and with
them the pattern, are those of whole rows; each process cuts its own queries out of it. What these see of earlier
shards, the *halo*, stands before its own keys, where segments see it by negative numbers (`Segment.seen`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from ..attention.segments import Part, Segment, Span


@dataclass(frozen=True)
class Shards:
    """Where rows are cut.

    Args:
        edges: Where the shard of each rank begins, and the end of the row; shards may differ in length.
        rank: That of this process.

    Raises:
        ValueError: if a shard has no token.
    """

    edges: tuple[int, ...]
    rank: int

    def __post_init__(self) -> None:
        if any(start >= end for start, end in self.spans):
            raise ValueError(
                f"Rows of {self.edges[-1]} tokens leave a process of {self.size} without one: shards are of "
                f"{self.lengths} tokens. Use fewer processes for a sequence, or pad the rows to a multiple of them."
            )

    @classmethod
    def of(cls, lengths: Sequence[int], rank: int) -> "Shards":
        """Shards of these lengths, one a rank."""
        return cls((0, *accumulate(lengths)), rank)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.edges) - 1

    @property
    def spans(self) -> tuple[Span, ...]:
        """The tokens of each rank."""
        return tuple(pairwise(self.edges))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(end - start for start, end in self.spans)


class LocalPart(NamedTuple):
    """A part as one process computes it.

    Args:
        part: Its segments, counted from the shard's first token; heads as in the whole.
        halo: For each row of the batch, the earlier tokens that its queries see, spans of the whole row in ascending
            order.
    """

    part: Part
    halo: tuple[tuple[Span, ...], ...]

    @property
    def keys(self) -> int:
        """Keys before the shard's own: tokens of the longest halo of a row."""
        return max((_tokens(spans) for spans in self.halo), default=0)

    def slots(self) -> Iterator[tuple[int, int, Span]]:
        """Where the halo stands among those keys, at their end: row, first key, span of tokens."""
        for row, spans in enumerate(self.halo):
            at = self.keys - _tokens(spans)
            for span in spans:
                yield row, at, span
                at += span[1] - span[0]


def localize(part: Part, shard: Span) -> LocalPart:
    """Cut the queries of a shard out of a part."""
    cut = [tuple(_queries(row, shard)) for row in part.rows]
    before = [[(a, min(b, shard[0])) for s in row for a, b in s.seen if a < shard[0]] for row in cut]
    halo = tuple(_union(spans) for spans in before)
    rows = tuple(
        tuple(Segment(s.start - shard[0], s.end - shard[0], tuple(_counted(s.seen, spans, shard[0]))) for s in row)
        for row, spans in zip(cut, halo, strict=True)
    )
    return LocalPart(part._replace(rows=rows), halo)


def _queries(row: Sequence[Segment], shard: Span) -> Iterator[Segment]:
    """The segments of a row, their queries those of the shard alone: what came before these is seen by all of them."""
    for start, end, seen in row:
        first, last = max(start, shard[0]), min(end, shard[1])
        if first < last:
            yield Segment(first, last, (*seen, (start, first)) if start < first else seen)


def _union(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Ascending and disjoint spans of the same tokens."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return tuple(found)


def _counted(seen: Sequence[Span], halo: Sequence[Span], first: int) -> Iterator[Span]:
    """Spans that are seen, counted from the shard's `first` token; those in the halo, which ends there, by its own."""
    for start, end in seen:
        at = -_tokens(halo)
        for begin, stop in halo:
            low, high = max(start, begin), min(end, stop)
            if low < high:
                yield at + low - begin, at + high - begin
            at += stop - begin
        if end > first:
            yield max(start, first) - first, end - first


def _tokens(spans: Sequence[Span]) -> int:
    return sum(end - start for start, end in spans)
