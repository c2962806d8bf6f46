"""Where attention is cut: the one definition of the pattern, read by every kernel and by the reference.

A *document* is a run of tokens that may see each other: a row of the batch without packing, one of several in a packed
row. Padding belongs to no document. A *segment* is a run of tokens that do see each other in one head: token `i`
attends to token `j` iff both lie in the same segment and `j <= i`, or `j` is one of the earlier tokens that the whole
segment sees, its document's first. Both are half-open spans `(start, end)` of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

Span = tuple[int, int]

Shifted = Literal["half", "none", "all"]
"""Which heads of a layer are shifted: `"half"` of them is the method, the others are for comparison."""


class Segment(NamedTuple):
    """Neighbouring tokens of one document that see each other, causally.

    Args:
        start: The first of them.
        end: After the last.
        seen: Spans of tokens before `start` that each of them sees, disjoint. Negative numbers are keys that stand
            before the row's first query: the last of these is -1.
    """

    start: int
    end: int
    seen: tuple[Span, ...] = ()

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        length = self.end - self.start
        return length * (length + 1) // 2 + length * sum(last - first for first, last in self.seen)


class Part(NamedTuple):
    """Heads that are cut alike.

    Args:
        heads: Query heads, half-open.
        kv_heads: Their key/value heads.
        rows: For each row of the batch, its segments.
    """

    heads: Span
    kv_heads: Span
    rows: tuple[tuple[Segment, ...], ...]


def segments(
    documents: Sequence[Span], group_size: int | None, shift: int = 0, sink_tokens: int = 0
) -> tuple[Segment, ...]:
    """Cut the documents of one row into segments (LongLoRA section 3.2, without its wrap-around).

    Inside a document, counted from its start, tokens `i` and `j` share a segment iff
    `(i + shift) // group_size == (j + shift) // group_size`. A document of at most `group_size` tokens is one segment,
    shifted or not. The first and the last segment of a shifted document are shorter: the published code instead rolls
    the sequence, which shows its end to its beginning.

    Pretrained models park attention on the first tokens of their context (arXiv 2309.17453). So that a group in
    mid-document has where to, each segment also sees its document's first `sink_tokens` (as SinkLoRA, arXiv
    2406.05678), those that come before it.

    Args:
        documents: Spans of a row, ascending and disjoint.
        group_size: Tokens in a group; `None` means dense, a segment for each document.
        shift: 0, or `group_size // 2` for shifted heads.
        sink_tokens: How many of a document's first tokens every later segment sees; 0 is the paper's pattern.
    """
    cut: list[Segment] = []
    for first, last in documents:
        if group_size is None or last - first <= group_size:
            cut.append(Segment(first, last))
            continue
        edges = [first, *range(first + group_size - shift, last, group_size), last]
        for start, end in pairwise(edges):
            sinks = (first, min(first + sink_tokens, start))
            cut.append(Segment(start, end, (sinks,) if sinks[1] > first else ()))
    return tuple(cut)


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, held on the host: read off the device once for each forward, not for each layer.

    Args:
        rows: For each row of the batch, its documents' spans.
        length: Tokens in a row, padding included.
    """

    rows: tuple[tuple[Span, ...], ...]
    length: int
    _cuts: dict[tuple[int | None, int, int], tuple[tuple[Segment, ...], ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def longest(self) -> int:
        """Tokens in the longest document; 0 if there is none."""
        return max((end - start for row in self.rows for start, end in row), default=0)

    @cached_property
    def packed(self) -> bool:
        """Whether a row holds more than one document."""
        return any(len(row) > 1 for row in self.rows)

    def segments(
        self, group_size: int | None, shift: int = 0, sink_tokens: int = 0
    ) -> tuple[tuple[Segment, ...], ...]:
        """`segments` of each row. Computed once for each forward."""
        key = (group_size, shift, sink_tokens)
        if key not in self._cuts:
            self._cuts[key] = tuple(segments(row, *key) for row in self.rows)
        return self._cuts[key]

    def parts(
        self,
        heads: int,
        kv_heads: int,
        group_size: int | None,
        shift: Shifted = "half",
        sink_tokens: int = 0,
    ) -> tuple[Part, ...]:
        """Which heads are cut where; the whole pattern of a call, as kernels read it.

        Shifted are the last half of the key/value heads with all their query heads; with a single key/value head, the
        last half of the query heads. The parts of a call cover every query head once.

        Args:
            heads: Query heads, a multiple of `kv_heads`.
            kv_heads: Key/value heads.
            group_size: Tokens in a group; `None` for dense.
            shift: Which heads are.
            sink_tokens: First tokens of a document that all of its segments see.
        """
        whole = (0, heads), (0, kv_heads)
        if group_size is None or self.longest <= group_size:
            return (Part(*whole, self.segments(group_size)),)
        plain, shifted = (self.segments(group_size, by, sink_tokens) for by in (0, group_size // 2))
        if shift != "half" or heads == 1:  # one head has no half to shift
            return (Part(*whole, shifted if shift == "all" else plain),)
        if kv_heads == 1:
            at = heads - heads // 2
            return Part((0, at), (0, 1), plain), Part((at, heads), (0, 1), shifted)
        at = kv_heads - kv_heads // 2
        query_at = at * (heads // kv_heads)
        return Part((0, query_at), (0, at), plain), Part((query_at, heads), (at, kv_heads), shifted)

    @classmethod
    @torch.compiler.disable  # data to numbers: outside of the graph, once for each forward
    def find(
        cls,
        batch_size: int,
        length: int,
        *,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> "Documents":
        """Find the documents of a batch of `batch_size` rows of `length` tokens.

        Args:
            cu_seqlens: `[documents + 1]`, ends of the documents packed into the one row, from 0 to `length`.
            attention_mask: `[batch_size, length]`, 0 where a token is padding; left, right, and each row by another
                amount.
            position_ids: `[batch_size or 1, length]`; a document starts where they don't go up by one.

        Raises:
            ValueError: on shapes that don't fit, on `cu_seqlens` that don't cover the row, on padding inside a
                document.
        """
        if cu_seqlens is not None:
            return cls._from_cu_seqlens(cu_seqlens, batch_size, length, attention_mask)
        if position_ids is not None and position_ids.shape[0] == 1:
            position_ids = position_ids.expand(batch_size, -1)
        for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if tensor is not None and tuple(tensor.shape) != (batch_size, length):
                raise ValueError(f"`{name}` must be of shape {(batch_size, length)}, got {tuple(tensor.shape)}.")
        if attention_mask is None and position_ids is None:
            return cls(((((0, length),) if length else ()),) * batch_size, length)

        template = attention_mask if attention_mask is not None else position_ids
        assert template is not None
        real = torch.ones_like(template, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        new = ~torch.nn.functional.pad(real[:, :-1], (1, 0))  # nothing real before
        gap = new.clone()
        if position_ids is not None:
            new[:, 1:] |= position_ids.diff(dim=-1) != 1
        starts = real & new
        # The end of a document is a start, a pad or the row's end.
        ends = real & torch.nn.functional.pad(starts[:, 1:] | ~real[:, 1:], (0, 1), value=True)
        first = torch.zeros_like(real) if position_ids is None else position_ids == 0
        # one transfer for everything that the host needs
        found = torch.cat([torch.stack([starts, gap & real, first]).flatten(1), ends.flatten()[None]]).cpu()
        start_at, after_gap, at_zero, end_at = (part.view(batch_size, length) for part in found)
        rows = []
        for row in range(batch_size):
            begin = start_at[row].nonzero().flatten().tolist()
            end = (end_at[row].nonzero().flatten() + 1).tolist()
            broken = [i for i in begin[1:] if after_gap[row, i] and not at_zero[row, i]]
            if broken:
                raise ValueError(
                    f"`attention_mask` of row {row} has padding inside a document (before token {broken[0]}). "
                    "Pad left or right; for several documents pass `cu_seq_lens_q`, or `position_ids` that restart."
                )
            rows.append(tuple(zip(begin, end, strict=True)))
        return cls(tuple(rows), length)

    @classmethod
    def _from_cu_seqlens(
        cls, cu_seqlens: torch.Tensor, batch_size: int, length: int, attention_mask: torch.Tensor | None
    ) -> "Documents":
        edges: list[int] = cu_seqlens.tolist()
        if batch_size != 1:
            raise ValueError(f"`cu_seqlens` describe one packed row, got a batch of {batch_size}: flatten it first.")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("Pass either `cu_seqlens` or a padding mask: a packed row has no padding.")
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != length or any(a > b for a, b in pairwise(edges)):
            raise ValueError(f"`cu_seqlens` must rise from 0 to the row's {length} tokens, got {edges[:8]}...")
        spans = tuple((a, b) for a, b in pairwise(edges) if a < b)
        return cls((spans,), length)
