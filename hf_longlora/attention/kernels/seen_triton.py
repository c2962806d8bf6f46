"""`seen` on a GPU: what it does with a piece at a time, fused and for all pieces of a part at once.

Bound by memory: the forward reads queries and reads and writes the output, the backward reads queries, output and its
gradient and reads and writes the gradient of queries, each once. The gradients of the few keys are sums over many
queries: each program writes its own, and another launch adds these up, in the same order always.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .seen import Call, Piece, Tensors, pieces, rounds

STRETCH = 1024
"""Queries of a program, one tile after the other."""

KEYS = 32
"""Keys in a launch; where more are seen, others follow. With 64 at widths of 128 registers spill."""

ROWS = 32
"""Sums of programs that are added up at a time."""


class Launch(NamedTuple):
    """Pieces of one part, and of each up to `KEYS` keys.

    Args:
        heads: The first query head, and after the last.
        kv_heads: Of keys and values.
        stretches: `[n, 5]`: row, first query, after the last, first key, after the last.
        documents: `[m, 5]`: row, first key, after the last, first stretch, after the last, of those that see the same
            keys, or the first of them.
        keys: Seen by any stretch, at most.
    """

    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    stretches: torch.Tensor
    documents: torch.Tensor
    keys: int

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return (self.heads[1] - self.heads[0]) // (self.kv_heads[1] - self.kv_heads[0])


@lru_cache(maxsize=16)
def _launches(numbers: tuple[int, ...], device: torch.device) -> tuple[Launch, ...]:
    found = []
    parts = groupby(pieces(numbers), key=lambda piece: piece[:2])
    for heads, kv_heads, at_once in ((*of, at_once) for of, part in parts for at_once in rounds(part)):
        own = sorted(at_once, key=lambda piece: (piece.row, piece.first))  # what sees the same keys, together
        for skipped in range(0, max(piece.last - piece.first for piece in own), KEYS):
            some = [
                piece._replace(first=piece.first + skipped, last=min(piece.last, piece.first + skipped + KEYS))
                for piece in own
                if piece.last - piece.first > skipped
            ]
            stretches: list[tuple[int, ...]] = []
            documents: list[tuple[int, ...]] = []
            for (row, first), alike in groupby(some, key=lambda piece: (piece.row, piece.first)):
                same, before = list(alike), len(stretches)
                stretches += [stretch for piece in same for stretch in _stretches(piece)]
                documents.append((row, first, max(piece.last for piece in same), before, len(stretches)))
            queries, keys = (torch.tensor(x, dtype=torch.int32).to(device) for x in (stretches, documents))
            found.append(Launch(heads, kv_heads, queries, keys, max(piece.last - piece.first for piece in some)))
    return tuple(found)


def _stretches(piece: Piece) -> Iterator[tuple[int, int, int, int, int]]:
    for start in range(piece.start, piece.end, STRETCH):
        yield piece.row, start, min(start + STRETCH, piece.end), piece.first, piece.last


def _options(width: int, keys: int) -> dict[str, Any]:
    """A program's tile sizes and compile options. They fit the 99 KiB of shared memory of small GPUs."""
    return {
        "TILE": 64 if width <= 128 else 32,
        "KEYS": max(16, triton.next_power_of_2(keys)),  # the least that a matrix product on a GPU takes
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "num_warps": 4 if width <= 128 else 8,
        "num_stages": 2 if width <= 128 else 1,
    }


def _on(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def merge(numbers: Sequence[int], call: Call, scale: float) -> None:
    """`seen.merge`; values are as wide as keys, and widths lie without gaps. Keys and values begin with the queries'
    own tokens; what stands before these has negative numbers."""
    query, key, value, out, lse = call
    width = query.shape[-1]
    with _on(query):
        for launch in _launches(tuple(numbers), query.device):
            _merge[(len(launch.stretches), launch.heads[1] - launch.heads[0])](
                *(query, key, value, out, lse, launch.stretches),
                *(query.stride()[:3], key.stride()[:3], value.stride()[:3], out.stride()[:3], lse.stride()),
                *(scale, width, launch.heads[0], launch.kv_heads[0], launch.group),
                **_options(width, launch.keys),
            )


def add_gradients(numbers: Sequence[int], grad: torch.Tensor, call: Call, gradients: Tensors, scale: float) -> None:
    """`seen.add_gradients`; values are as wide as keys, and widths lie without gaps."""
    query, key, value, out, lse = call
    width, (dq, dk, dv) = query.shape[-1], gradients
    with _on(query):
        for launch in _launches(tuple(numbers), query.device):
            heads, kv_heads = (b - a for a, b in (launch.heads, launch.kv_heads))
            sums = query.new_empty(2, len(launch.stretches), heads, launch.keys, width, dtype=torch.float32)
            _gradients[(len(launch.stretches), heads)](
                *(grad, query, key, value, out, lse, dq, sums, launch.stretches),
                *(grad.stride()[:3], query.stride()[:3], key.stride()[:3], value.stride()[:3]),
                *(out.stride()[:3], lse.stride(), dq.stride()[:3], sums.stride()[:4]),
                *(scale, width, launch.keys, launch.heads[0], launch.kv_heads[0], launch.group),
                **_options(width, launch.keys),
            )
            _add_sums[(len(launch.documents), kv_heads, launch.keys)](
                *(dk, dv, sums, launch.documents, dk.stride()[:3], dv.stride()[:3], sums.stride()[:4]),
                *(width, launch.kv_heads[0], launch.group),
                ROWS=ROWS,
                WIDTH=triton.next_power_of_2(width),
            )


# --------------------------------------------------------------------------------------------------------------------
# Programs. `strides` are those of rows, heads and tokens; widths lie without gaps. Offsets of rows and tokens are
# 64-bit: a million tokens of 32 heads of 128 are more than 2^31 numbers.

COUNTS = ("first_head", "first_kv_head", "group", "most")
"""Arguments for whose values nothing is compiled anew."""


@triton.jit
def _numbers(table):  # type: ignore[no-untyped-def]
    """The five numbers that the program has in `stretches` or `documents`."""
    own = table + tl.program_id(0) * 5
    return tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3), tl.load(own + 4)


@triton.jit
def _row(base, strides, row, head):  # type: ignore[no-untyped-def]
    """A pointer to a row and head."""
    return base + row.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _at(base, strides, row, head, tokens, columns):  # type: ignore[no-untyped-def]
    """Pointers to `[tokens, columns]` of a row and head."""
    return _row(base, strides, row, head) + tokens.to(tl.int64)[:, None] * strides[2] + columns[None, :]


@triton.jit
def _seen(  # type: ignore[no-untyped-def]
    key, value, of_key, of_value, row, head, first, last, width, KEYS: tl.constexpr, WIDTH: tl.constexpr
):
    """Columns, which of them are real, which of `KEYS` keys are, and these with their values, `[KEYS, WIDTH]`."""
    columns, tokens = tl.arange(0, WIDTH), first + tl.arange(0, KEYS)
    wide, seen = columns < width, tokens < last
    held = seen[:, None] & wide[None, :]
    keys = tl.load(_at(key, of_key, row, head, tokens, columns), mask=held, other=0.0)
    values = tl.load(_at(value, of_value, row, head, tokens, columns), mask=held, other=0.0)
    return columns, wide, seen, keys, values


@triton.jit(do_not_specialize=COUNTS)
def _merge(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    out,
    lse,
    stretches,
    of_query,
    of_key,
    of_value,
    of_out,
    of_lse,
    scale,
    width,
    first_head,
    first_kv_head,
    group,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, start, end, first, last = _numbers(stretches)
    head = first_head + tl.program_id(1)
    columns, wide, seen, keys, values = _seen(
        key, value, of_key, of_value, row, first_kv_head + tl.program_id(1) // group, first, last, width, KEYS, WIDTH
    )
    for at in range(start, end, TILE):
        tokens = at + tl.arange(0, TILE)
        real = tokens < end
        here = real[:, None] & wide[None, :]
        queries = tl.load(_at(query, of_query, row, head, tokens, columns), mask=here, other=0.0)
        to_lse = _row(lse, of_lse, row, head) + tokens * of_lse[2]
        own = tl.load(to_lse, mask=real, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        highest = tl.maximum(own, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        total = highest + tl.log(tl.exp(own - highest) + tl.sum(weights, 1))
        weights = tl.exp(scores - total[:, None])
        to_out = _at(out, of_out, row, head, tokens, columns)
        attended = tl.load(to_out, mask=here, other=0.0).to(tl.float32) * tl.exp(own - total)[:, None]
        attended += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        tl.store(to_out, attended.to(out.dtype.element_ty), mask=here)
        tl.store(to_lse, total, mask=real)


@triton.jit(do_not_specialize=COUNTS)
def _gradients(  # type: ignore[no-untyped-def]
    grad,
    query,
    key,
    value,
    out,
    lse,
    dq,
    sums,
    stretches,
    of_grad,
    of_query,
    of_key,
    of_value,
    of_out,
    of_lse,
    of_dq,
    of_sums,
    scale,
    width,
    most,
    first_head,
    first_kv_head,
    group,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, start, end, first, last = _numbers(stretches)
    head = first_head + tl.program_id(1)
    columns, wide, seen, keys, values = _seen(
        key, value, of_key, of_value, row, first_kv_head + tl.program_id(1) // group, first, last, width, KEYS, WIDTH
    )
    for_keys = tl.zeros([WIDTH, KEYS], dtype=tl.float32)
    for_values = tl.zeros([WIDTH, KEYS], dtype=tl.float32)
    for at in range(start, end, TILE):
        tokens = at + tl.arange(0, TILE)
        real = tokens < end
        here = real[:, None] & wide[None, :]
        queries = tl.load(_at(query, of_query, row, head, tokens, columns), mask=here, other=0.0)
        given = tl.load(_at(grad, of_grad, row, head, tokens, columns), mask=here, other=0.0)
        attended = tl.load(_at(out, of_out, row, head, tokens, columns), mask=here, other=0.0)
        to_lse = _row(lse, of_lse, row, head) + tokens * of_lse[2]
        total = tl.load(to_lse, mask=real, other=0.0)
        mean = tl.sum(given.to(tl.float32) * attended.to(tl.float32), 1)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        weights = tl.where(real[:, None] & seen[None, :], tl.exp(scores - total[:, None]), 0.0)
        inner = tl.dot(given, tl.trans(values), input_precision="ieee")
        scores = weights * (inner - mean[:, None]) * scale
        to_dq = _at(dq, of_dq, row, head, tokens, columns)
        own = tl.load(to_dq, mask=here, other=0.0).to(tl.float32)
        own += tl.dot(scores.to(keys.dtype), keys, input_precision="ieee")
        tl.store(to_dq, own.to(dq.dtype.element_ty), mask=here)
        for_keys += tl.dot(tl.trans(queries), scores.to(queries.dtype), input_precision="ieee")
        for_values += tl.dot(tl.trans(given), weights.to(given.dtype), input_precision="ieee")
    index = tl.arange(0, KEYS)
    to_sums = sums + tl.program_id(0).to(tl.int64) * of_sums[1] + tl.program_id(1).to(tl.int64) * of_sums[2]
    to_sums += index[None, :] * of_sums[3] + columns[:, None]
    kept = (index < most)[None, :] & wide[:, None]
    tl.store(to_sums, for_keys, mask=kept)
    tl.store(to_sums + of_sums[0], for_values, mask=kept)


@triton.jit(do_not_specialize=COUNTS)
def _add_sums(  # type: ignore[no-untyped-def]
    dk,
    dv,
    sums,
    documents,
    of_dk,
    of_dv,
    of_sums,
    width,
    first_kv_head,
    group,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, first, last, before, after = _numbers(documents)
    key = first + tl.program_id(2)
    columns = tl.arange(0, WIDTH)
    wide = columns < tl.where(key < last, width, 0)
    for_key = tl.zeros([WIDTH], dtype=tl.float32)
    for_value = tl.zeros([WIDTH], dtype=tl.float32)
    for at in range(before * group, after * group, ROWS):
        index = at + tl.arange(0, ROWS)
        stretch, head = index // group, tl.program_id(1) * group + index % group
        to_sums = sums + stretch.to(tl.int64)[:, None] * of_sums[1] + head.to(tl.int64)[:, None] * of_sums[2]
        to_sums += tl.program_id(2) * of_sums[3] + columns[None, :]
        here = (index < after * group)[:, None] & wide[None, :]
        for_key += tl.sum(tl.load(to_sums, mask=here, other=0.0), 0)
        for_value += tl.sum(tl.load(to_sums + of_sums[0], mask=here, other=0.0), 0)
    head = first_kv_head + tl.program_id(1)
    to_dk = _row(dk, of_dk, row, head) + key.to(tl.int64) * of_dk[2] + columns
    to_dv = _row(dv, of_dv, row, head) + key.to(tl.int64) * of_dv[2] + columns
    tl.store(to_dk, (tl.load(to_dk, mask=wide) + for_key).to(dk.dtype.element_ty), mask=wide)
    tl.store(to_dv, (tl.load(to_dv, mask=wide) + for_value).to(dv.dtype.element_ty), mask=wide)
