"""Attention of layers with a sliding window or chunks: memory and time grow with length times window.

Queries come in blocks of half a window. What one of them sees lies in its block or less than a window before. So the
blocks become the batch of one call of dense attention, each with the keys of its own and of the window before it. What
is seen of these is what transformers' mask function says, of which the whole mask, `[B, 1, S, S]`, would be made.
"""

import math
from collections.abc import Callable, Iterator
from inspect import getclosurevars, isfunction
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import masking_utils as transformers_masks

ALIGNMENT = 16
"""Blocks, and what stands before them, are multiples of so many tokens: kernels copy a mask of other widths."""

PER_WINDOW = 2
"""Blocks in a window. Of fewer, more pairs are computed and hidden; of more, keys and values are read more often."""

MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""Of transformers' kind: whether, in a row of the batch and a head, a query sees a key; indices, which broadcast."""


# --------------------------------------------------------------------------------------------------------------------
# What is seen


def _codes(function: MaskFunction) -> Iterator[CodeType | None]:
    """The code of a mask function, and of those that it is made of: two closures of one `def` share theirs."""
    yield getattr(function, "__code__", None)  # what is callable and no function has none
    for held in getclosurevars(function).nonlocals.values() if isfunction(function) else ():
        for inner in held if isinstance(held, tuple) else (held,):
            if callable(inner):
                yield from _codes(inner)


_CAUSAL = transformers_masks.causal_mask_function.__code__
_SPANS = {
    transformers_masks.sliding_window_overlay(1).__code__,
    transformers_masks.chunked_overlay(1, torch.zeros(1)).__code__,
}
_NARROWING = {
    transformers_masks.and_masks(transformers_masks.causal_mask_function).__code__,
    transformers_masks.packed_sequence_mask_function(torch.zeros(1)).__code__,
}
_remap = getattr(transformers_masks, "remap_positions_for_packed_sequence", None)  # newer; always with the one above
if _remap is not None:
    _NARROWING.add(_remap(transformers_masks.causal_mask_function, torch.zeros(1)).__code__)


def within_span(function: MaskFunction) -> bool:
    """Whether nothing shapes a mask but causality, a window or chunks, and packing.

    What is not known to narrow a mask may widen it: blocks that see each other both ways (`or_masks`).
    """
    found = set(_codes(function))
    return _CAUSAL in found and not found.isdisjoint(_SPANS) and found <= {_CAUSAL, *_SPANS, *_NARROWING}


def documents_of(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Which document each token of a packed row belongs to: `[length]`."""
    index = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], index, right=True, out_int32=True)


def by_position(window: int, cu_seqlens: torch.Tensor, position_ids: torch.Tensor) -> MaskFunction:
    """The mask function of a layer with a sliding window where positions skip.

    What a token sees follows from positions within its document, as it does without skips: of the tokens before
    one, those fewer than `window` positions away. (transformers would hide all that stands before a skip.)

    Args:
        cu_seqlens: `[documents + 1]`, ends of the documents packed into the one row.
        position_ids: `[1, S]`, rising within each document.
    """
    position = position_ids[0].int()
    document = documents_of(cu_seqlens, position.shape[0])

    def seen(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        at, of = position[query], position[key]
        return (of <= at) & (of > at - window) & (document[query] == document[key])

    return seen


def seen_in_blocks(
    function: MaskFunction, batch: int, length: int, window: int, device: torch.device | str
) -> torch.Tensor:
    """What each block sees: bool `[B or 1, N, 1, C, E + C]`, of the `E` tokens before it and of its own.

    Args:
        function: Causal; shows a query no more than the `window` tokens up to its own.
    """
    size, before = _aligned(window / PER_WINDOW), _aligned(window - 1)
    if length <= window:
        size, before = length, 0
    start = torch.arange(-(-length // size), device=device)[:, None] * size
    keys = start + torch.arange(-before, size, device=device)
    # Queries that only fill up the last block see what the last one sees; what they give is dropped.
    queries = (start + torch.arange(size, device=device)).clamp(max=length - 1)
    rows = torch.arange(batch, device=device)[:, None, None, None, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    seen = function(rows, head, queries[None, :, None, :, None], keys.clamp(0, length - 1)[None, :, None, None, :])
    return seen & ((keys >= 0) & (keys < length))[None, :, None, None, :]


def _aligned(tokens: float) -> int:
    return math.ceil(tokens / ALIGNMENT) * ALIGNMENT


# --------------------------------------------------------------------------------------------------------------------
# Attention


def attend_in_blocks(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Attention of as many keys as queries: `[B, H, S, D]`, `[B, H_kv, S, D]` -> `[B, S, H, D_v]`.

    Args:
        attend: Dense attention by a mask, called once: queries, keys and values of `B * N` rows, and the mask
            `[B * N, 1, C, E + C]`, to `[B * N, C, H, D_v]`.
        seen: What `seen_in_blocks` gave.
    """
    batch, length = query.shape[0], query.shape[2]
    _, count, _, size, span = seen.shape
    missing = count * size - length

    def blocks(x: torch.Tensor, before: int) -> torch.Tensor:
        """`[B, H, S, D]` -> `[B * N, H, before + C, D]`, for one row a view of the padded tensor."""
        x = F.pad(x, (0, 0, before, missing)) if before or missing else x
        return x.unfold(2, before + size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)

    mask = seen.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    out = attend(blocks(query, 0), blocks(key, span - size), blocks(value, span - size), mask)
    return out.unflatten(0, (batch, count)).flatten(1, 2)[:, :length]
