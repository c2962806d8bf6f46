"""FlexAttention: for scores that something is done to, softcap (Gemma 2) and learned sinks (gpt-oss).

Its blocks follow from the segments; nothing of the size of a mask is computed. What it needs for each block of queries
is a list of blocks of keys, `(S / 128)^2` numbers for each part: 8 MiB at 131,072 tokens.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..autocast import as_autocast
from ..segments import Part, Segment
from .in_place import heads_of

BLOCK = 128


def flex_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    learned_sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention within segments: `[B, H, S, D]`, `[B, H_kv, E + S, D]` -> `[B, S, H, D_v]`, 0 in padding.

    `softcap` and `learned_sinks` as in `hf_longlora.attention.reference`.
    """
    query, key, value = as_autocast(query, key, value)
    outs = []
    for heads, kv_heads, rows in parts:
        q, k, v = heads_of(query, heads), heads_of(key, kv_heads), heads_of(value, kv_heads)
        out, aux = _flex(query.device.type)(
            q,
            k,
            v,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=block_mask(rows, query.shape[2], key.shape[2] - query.shape[2], query.device),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=learned_sinks is not None),
        )
        if learned_sinks is not None:
            # A sink adds exp(sink) to what the softmax divides by.
            share = torch.sigmoid(aux.lse - learned_sinks[heads[0] : heads[1], None].float())
            out = out * share[..., None].to(out.dtype)
        outs.append(out.transpose(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


@lru_cache(maxsize=2)
def _flex(device: str) -> Callable[..., Any]:
    """Compiled where that makes a kernel; elsewhere the function as it is, which spells out the scores."""
    attend: Callable[..., Any] = flex_attention
    return torch.compile(attend, dynamic=False) if device == "cuda" else attend


@lru_cache(maxsize=8)
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@lru_cache(maxsize=16)
def block_mask(rows: tuple[tuple[Segment, ...], ...], length: int, before: int, device: torch.device) -> BlockMask:
    """The mask of one part: which block of queries meets which blocks of keys, and which of these in full.

    `before` keys stand before the first query.
    """
    blocks, key_blocks = -(-length // BLOCK), -(-(before + length) // BLOCK)
    first = torch.arange(length).repeat(len(rows), 1)  # where a token's segment begins; padding sees itself ...
    real = torch.zeros(len(rows), length, dtype=torch.bool)  # ... and not even that
    spans = max((len(segment.seen) for row in rows for segment in row), default=0)
    seen = torch.zeros(spans, 2, len(rows), length, dtype=torch.long)  # what else it sees, from where to where
    met = torch.zeros(len(rows), blocks, key_blocks, dtype=torch.bool)
    for row, cut in enumerate(rows):
        for start, end, others in cut:
            first[row, start:end], real[row, start:end] = start, True
            for span, (begin, stop) in enumerate(others):
                seen[span, 0, row, start:end], seen[span, 1, row, start:end] = begin, stop
                of_keys = slice((before + begin) // BLOCK, (before + stop - 1) // BLOCK + 1)
                met[row, start // BLOCK : (end - 1) // BLOCK + 1, of_keys] = True
    rest = blocks * BLOCK - length
    lowest = torch.nn.functional.pad(first, (0, rest), value=length).unflatten(1, (blocks, BLOCK)).amin(-1)
    highest = torch.nn.functional.pad(first, (0, rest), value=-1).unflatten(1, (blocks, BLOCK)).amax(-1)
    alone = torch.nn.functional.pad(real, (0, rest), value=False).unflatten(1, (blocks, BLOCK)).all(-1)
    query, key = torch.arange(blocks)[:, None] * BLOCK, torch.arange(key_blocks) * BLOCK - before  # the first of each
    met |= (key + BLOCK > lowest[..., None]) & (key < query + BLOCK)
    # In full: blocks that end before the queries begin, all of one segment that begins no later than the keys.
    full = (key + BLOCK <= query) & ((lowest == highest) & alone)[..., None] & (key >= lowest[..., None])
    first, real, seen = first.to(device), real.to(device), seen.to(device)

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k - before
        visible = (k <= q) & (k >= first[b, q])
        for span in range(spans):
            visible = visible | ((k >= seen[span, 0, b, q]) & (k < seen[span, 1, b, q]))
        return visible & real[b, q]

    return BlockMask.from_kv_blocks(
        *_listed(met & ~full, device), *_listed(full, device), BLOCK, mask_mod, (length, before + length)
    )


def _listed(chosen: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, Q, K]` bool -> how many are chosen, `[B, 1, Q]`, and which, those first, `[B, 1, Q, K]`."""
    which = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
    return chosen.sum(-1, dtype=torch.int32)[:, None].to(device), which[:, None].to(device)
