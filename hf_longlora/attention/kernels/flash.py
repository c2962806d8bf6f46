"""The flash-attn packages: FlashAttention 4, which writes in place; else 3 or 2, as transformers imports them.

Any segments in one launch for each part, as `varlen` does with what torch has built in.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import modeling_flash_attention_utils
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..autocast import as_autocast
from ..segments import Part
from .in_place import ENGINES, heads_of
from .ragged import Launch, attend_ragged, edges, engine
from .runs import Run, keys_of, runs
from .seen import Call, Tensors


@torch.compiler.assume_constant_result
@lru_cache(maxsize=1)
def version() -> int:
    """The newest FlashAttention that this machine can train with: 4, 3 or 2; 0: none."""
    # 4 has no backward before Hopper.
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0):
        try:
            _interface()
        except ImportError:
            pass
        else:
            return 4
    return 3 if is_flash_attn_3_available() else 2 if is_flash_attn_2_available() else 0


def is_fastest() -> bool:
    """Whether this is FlashAttention 4 on Hopper, 10 to 13% faster than `sdpa` there (`benchmarks/results`).

    Elsewhere nothing has been measured.
    """
    return version() == 4 and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """What this machine lacks, in words."""
    if version():
        return None
    return "the package flash-attn-4 (from Hopper on; pip install 'hf-longlora[flash]') or flash-attn"


def flash_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Sequence[Part],
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention within segments: `[B, H, S, D]`, `[B, H_kv, E + S, D]` -> `[B, S, H, D]`, 0 in padding."""
    if version() == 4:
        return attend_ragged("flash4", query, key, value, parts, scale)
    return _by_autograd(query, key, value, parts, scale)


# --------------------------------------------------------------------------------------------------------------------
# FlashAttention 4, in place


def _interface() -> Any:
    from flash_attn.cute import interface

    return interface


def _forward(launch: Launch, call: Call, scale: float) -> None:
    query, key, value, out, lse = call
    found = torch.empty_like(lse.T, memory_format=torch.contiguous_format)
    _interface()._flash_attn_fwd(
        query,
        key,
        value,
        **_bounds(launch, query.device),
        softmax_scale=scale,
        causal=True,
        return_lse=True,
        out=out,
        lse=found,
    )
    lse.T.copy_(found)
    launch.clear(out)


def _backward(launch: Launch, grad: torch.Tensor, call: Call, gradients: Tensors, scale: float) -> None:
    query, key, value, out, lse = call
    dq, dk, dv = gradients
    _interface()._flash_attn_bwd(
        query,
        key,
        value,
        out,
        grad,
        lse.T.contiguous(),
        softmax_scale=scale,
        causal=True,
        **_bounds(launch, query.device),
        dq=dq,
        dk=dk,
        dv=dv,
    )
    launch.clear(*gradients)


def _bounds(launch: Launch, device: torch.device) -> dict[str, Any]:
    ends, longest = launch.edges(device), max(launch.lengths)
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}


ENGINES["flash4"] = engine(_forward, _backward)


# --------------------------------------------------------------------------------------------------------------------
# FlashAttention 3 and 2


def _by_autograd(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Sequence[Part], scale: float | None
) -> torch.Tensor:
    batch, _, length, _ = query.shape
    query, key, value = as_autocast(query, key, value)
    (_, attend, *_), _ = modeling_flash_attention_utils.lazy_import_flash_attention(f"flash_attention_{version()}")
    outs = []
    for heads, kv_heads, rows in parts:
        by_row = [list(runs(cut, length)) for cut in rows]
        every = [run for row in by_row for run in row]
        # With more keys than queries the causal mask ends with both: keys before a segment's own are seen by all.
        queries = tuple(run.length for run in every for _ in range(max(run.segments, 1)))
        keys = tuple(run.length + run.others for run in every for _ in range(max(run.segments, 1)))
        out = attend(
            heads_of(query, heads).transpose(1, 2).flatten(0, 1),
            *(_gathered(by_row, heads_of(x, kv_heads)) for x in (key, value)),
            cu_seqlens_q=edges(queries, query.device),
            cu_seqlens_k=edges(keys, query.device),
            max_seqlen_q=max(queries),
            max_seqlen_k=max(keys),
            softmax_scale=scale,
            causal=True,
        )
        out = out[0] if isinstance(out, tuple) else out  # version 3 gives the normaliser, too
        out = out.unflatten(0, (batch, length))
        if any(run.segments == 0 for run in every):
            out = out.clone()
            for row, found in enumerate(by_row):
                for run in found:
                    if run.segments == 0:
                        out[row, run.start : run.start + run.length] = 0
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _gathered(by_row: Sequence[Sequence[Run]], x: torch.Tensor) -> torch.Tensor:
    """Keys or values segment by segment: `[B, h, E + S, D]` -> `[keys, h, D]`, a view where none is seen twice."""
    if not any(run.seen for row in by_row for run in row):
        return x[:, :, x.shape[2] - sum(run.tokens for run in by_row[0]) :].transpose(1, 2).flatten(0, 1)
    rows = zip(by_row, x.split(1), strict=True)
    return torch.cat([keys[0].flatten(1, 2).transpose(0, 1) for found, row in rows for keys in keys_of(found, row)])
