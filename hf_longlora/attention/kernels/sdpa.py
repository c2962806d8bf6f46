"""Segments folded into the batch of `torch.nn.functional.scaled_dot_product_attention`, by views.

Neighbouring segments of equal length become one call: `[B, H, c * L, D]` seen as `[B * c, H, L, D]`. A row of `n`
tokens takes two calls at most for heads that are not shifted (whole groups, the rest), three for those that are.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..segments import Span


class Run(NamedTuple):
    """`segments` neighbours of `length` tokens each; 0 of them: `length` tokens of padding."""

    segments: int
    length: int

    @property
    def tokens(self) -> int:
        return max(self.segments, 1) * self.length


def runs(spans: Sequence[Span], length: int) -> Iterator[Run]:
    """Cover a row of `length` tokens: equal neighbours as one run, padding as runs of no segment."""
    at, count, size = 0, 0, 0
    for start, end in spans:
        if count and (start > at or end - start != size):
            yield Run(count, size)
            count = 0
        if start > at:
            yield Run(0, start - at)
        count, size, at = count + 1, end - start, end
    if count:
        yield Run(count, size)
    if at < length:
        yield Run(0, length - at)


def sdpa_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Sequence[Sequence[Span]],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention within segments: `[B, H, S, D]`, `[B, H_kv, S, D]` -> `[B, S, H, D_v]`, 0 in padding."""
    if softcap is not None or sinks is not None:
        raise ValueError("The sdpa kernel has neither softcap nor sinks.")
    batch, length = query.shape[0], query.shape[2]
    plan = list(runs(rows[0], length))
    alike = all(row == rows[0] for row in rows[1:])
    # Several rows fold into one call by views only where a run is a single segment or spans the whole row.
    if batch > 1 and not (alike and all(run.segments <= 1 or run.tokens == length for run in plan)):
        by_row = zip(query.split(1), key.split(1), value.split(1), rows, strict=True)
        return torch.cat([sdpa_kernel(q, k, v, [row], scale=scale, dropout_p=dropout_p) for q, k, v, row in by_row])

    # `split` and not slices: its backward is one concatenation, that of a slice a zero-filled tensor of full size.
    sizes = [run.tokens for run in plan]
    pieces = zip(plan, *(x.split(sizes, 2) for x in (query, key, value)), strict=True)
    parts = [_attend(q, k, v, run, scale, dropout_p) for run, q, k, v in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, run: Run, scale: float | None, dropout_p: float
) -> torch.Tensor:
    """One run: `[B, H, run.tokens, D]` -> `[B, run.tokens, H, D_v]`."""
    batch, heads, tokens = query.shape[:3]
    if run.segments == 0:
        return value.new_zeros(batch, tokens, heads, value.shape[-1])

    def fold(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (run.segments, run.length)).transpose(1, 2).flatten(0, 1)

    out = F.scaled_dot_product_attention(
        fold(query),
        fold(key),
        fold(value),
        is_causal=True,
        scale=scale,
        dropout_p=dropout_p,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).reshape(batch, tokens, heads, value.shape[-1])
