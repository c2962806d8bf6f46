"""Segments folded into the batch of `torch.nn.functional.scaled_dot_product_attention`, by views.

Segments of equal length at equal distances become one launch: `[B, H, c * L, D]` seen as `[B * c, H, L, D]`. A
document of `n` tokens takes two launches for heads that are not shifted (whole groups, the rest), and two or three for
those that are: whole groups, and the shorter first and last one, together if they are of one length.

The launches are those of torch's operators for cuDNN, FlashAttention or the CPU, whichever the function would take,
written in place (`in_place`). What these can't do (attention dropout, odd widths, fp32 on a GPU) goes through the
function itself, and autograd puts the pieces together.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..segments import Part, Segment, Span
from . import operators
from .in_place import ENGINES, Engine, attend_in_place, heads_of, rows_follow
from .runs import Run, keys_of, runs
from .seen import Call, Tensors, own_keys

LAUNCH_TOKENS = 32_768
"""Tokens in a launch, or one segment if that is longer. A launch's pieces, and the fp32 gradients of queries that
kernels add up in, are freed before the next. 16,384 are 4% slower, 131,072 2% faster with 1.55 times the tensors'
memory instead of 1.14 (`benchmarks/results/attention.csv`)."""


class Launch(NamedTuple):
    """`times` segments of `length` tokens, `gap` tokens apart, the first at `start`, in each of `rows` rows."""

    heads: Span
    kv_heads: Span
    row: int
    rows: int
    start: int
    gap: int
    times: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.times * self.length

    @property
    def joins_rows(self) -> bool:
        return self.rows > 1 and self.times > 1


def sdpa_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention within segments: `[B, H, S, D]`, `[B, H_kv, E + S, D]` -> `[B, S, H, D_v]`, 0 in padding."""
    if dropout_p == 0.0 and operators.serve(query, value):
        return attend_in_place("sdpa", query, key, value, _numbers(query, key, value, parts), parts, scale)
    outs = []
    for heads, kv_heads, rows in parts:
        q, k, v = heads_of(query, heads), heads_of(key, kv_heads), heads_of(value, kv_heads)
        outs.append(_by_autograd(q, k, v, rows, scale, dropout_p))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


# --------------------------------------------------------------------------------------------------------------------
# In place, by torch's operators


def launches(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Sequence[Part]) -> Iterator[Launch]:
    """What a call in place is made of."""
    return decoded(_numbers(query, key, value, parts))


def _numbers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Sequence[Part]) -> list[int]:
    follow = rows_follow(query, own_keys(query, key), own_keys(query, value))
    return encoded(tuple(parts), query.shape[2], follow, LAUNCH_TOKENS)


@lru_cache(maxsize=64)
def encoded(parts: tuple[Part, ...], length: int, follow: bool, limit: int) -> list[int]:
    """The launches of a call as a flat list of numbers, which is what a custom operator takes.

    Args:
        parts: What is cut where.
        length: Tokens in a row.
        follow: Whether rows follow one another in memory, so that several fold into one batch by views.
        limit: Tokens in a launch.
    """
    found = []
    for heads, kv_heads, rows in parts:
        row = 0
        while row < len(rows):
            alike = next((n for n in range(row, len(rows)) if rows[n] != rows[row]), len(rows)) - row
            for start, gap, count, size in progressions(rows[row]):
                # Whole rows fold into one batch, and so does one segment of each row; else each row by itself.
                whole = follow and gap == size and count * size == length
                together = alike if count == 1 or whole else 1
                for first in range(row, row + alike, together):
                    found += list(_cut(Launch(heads, kv_heads, first, together, start, gap, count, size), limit))
            row += alike
    return [number for launch in found for number in chain(launch.heads, launch.kv_heads, launch[2:])]


def _cut(launch: Launch, limit: int) -> Iterator[Launch]:
    """Launches of `limit` tokens at most, or of one segment."""
    many = max(1, limit // launch.length)
    if launch.rows > 1:
        per_row = max(1, many // launch.times)
        for row in range(0, launch.rows, per_row):
            held = launch._replace(row=launch.row + row, rows=min(per_row, launch.rows - row))
            if held.rows > 1:
                yield held
            else:  # may be more than the limit by itself
                yield from _cut(held, limit)
        return
    for first in range(0, launch.times, many):
        times = min(many, launch.times - first)
        yield launch._replace(start=launch.start + first * launch.gap, times=times)


def progressions(cut: Sequence[Segment]) -> list[tuple[int, int, int, int]]:
    """Segments of equal length at equal distances: `(start, gap, count, length)` for each such run.

    Neighbours first; then the leftover segments of equal length two by two, such as the ends of a shifted document.
    """
    found: list[tuple[int, int, int, int]] = []
    for start, end, _ in cut:
        if found:
            first, _, count, length = found[-1]
            if end - start == length and start == first + count * length:
                found[-1] = (first, length, count + 1, length)
                continue
        found.append((start, end - start, 1, end - start))
    single: dict[int, int] = {}  # length -> index of a run of one
    merged: list[tuple[int, int, int, int]] = []
    for run in found:
        start, _, count, length = run
        if count == 1 and length in single:
            at = single.pop(length)
            merged[at] = (merged[at][0], start - merged[at][0], 2, length)
            continue
        if count == 1:
            single[length] = len(merged)
        merged.append(run)
    return merged


def decoded(numbers: Sequence[int]) -> Iterator[Launch]:
    """The launches that `encoded` gave."""
    for at in range(0, len(numbers), 10):
        a, b, c, d, *rest = numbers[at : at + 10]
        yield Launch((a, b), (c, d), *rest)


def _fold(launch: Launch, x: torch.Tensor, heads: Span) -> torch.Tensor:
    """The segments of a launch as a batch, a view: `[B, H, S, D]` -> `[rows * times, h, length, D]`."""
    at_row, at_head, at_token, at_width = x.stride()
    if launch.joins_rows and not rows_follow(x):
        raise RuntimeError("A launch joins rows that don't follow one another in memory.")
    first = x[launch.row :, heads[0] : heads[1], launch.start :]
    step = launch.gap * at_token if launch.times > 1 else at_row
    size = (launch.rows * launch.times, heads[1] - heads[0], launch.length, x.shape[-1])
    return first.as_strided(size, (step, at_head, at_token, at_width), first.storage_offset())


def _forward(launch: Launch, call: Call, scale: float) -> None:
    query, key, value, out, lse = call
    found = operators.forward(query, key, value, True, scale)
    out.copy_(found[0])
    lse.copy_(found[1])


def _backward(launch: Launch, grad: torch.Tensor, call: Call, gradients: Tensors, scale: float) -> None:
    for into, gradient in zip(gradients, operators.backward(grad, *call, True, scale), strict=True):
        into.copy_(gradient)


ENGINES["sdpa"] = Engine(decoded, _fold, _forward, _backward)


# --------------------------------------------------------------------------------------------------------------------
# By autograd


def _by_autograd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Sequence[Sequence[Segment]],
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    """Heads that are cut alike: `[B, h, S, D]` -> `[B, S, h, D_v]`."""
    batch, length = query.shape[0], query.shape[2]
    own = list(runs(rows[0], length))
    alike = all(row == rows[0] for row in rows[1:])
    # Several rows fold into one call by views only where a run is a single segment or spans the whole row.
    if batch > 1 and not (alike and all(run.segments <= 1 or run.tokens == length for run in own)):
        by_row = zip(query.split(1), key.split(1), value.split(1), rows, strict=True)
        return torch.cat([_by_autograd(q, k, v, [row], scale, dropout_p) for q, k, v, row in by_row])

    # `split` and not slices: its backward is one concatenation, that of a slice a zero-filled tensor of full size.
    queries = query.split([run.tokens for run in own], 2)
    parts = [
        _attend(q, k, v, run, scale, dropout_p)
        for run, q, k, v in zip(own, queries, keys_of(own, key), keys_of(own, value), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, run: Run, scale: float | None, dropout_p: float
) -> torch.Tensor:
    """One run: `[B, H, run.tokens, D]`, `[B, H_kv, segments, keys, D]` -> `[B, run.tokens, H, D_v]`."""
    batch, heads, tokens = query.shape[:3]
    if run.segments == 0:
        return value.new_zeros(batch, tokens, heads, value.shape[-1])
    # Keys that all of a segment sees come before its own, and as many queries of 0, whose output is dropped, before
    # its queries: a plain causal mask then shows each query what it should see, whatever answers below.
    query = query.unflatten(2, (run.segments, run.length))
    query = F.pad(query, (0, 0, run.others, 0)) if run.others else query
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=scale,
        dropout_p=dropout_p,
        enable_gqa=heads != key.shape[1],
    )
    return out[:, :, run.others :].transpose(1, 2).reshape(batch, tokens, heads, value.shape[-1])
