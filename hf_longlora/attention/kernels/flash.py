"""The flash-attn packages: FlashAttention 4, which writes in place; else 3 or 2, as transformers imports them.

Any segments in one launch for each part, as `varlen` does with what torch has built in.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import modeling_flash_attention_utils
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..segments import Part
from . import ragged
from .in_place import ENGINES, Call, Tensors
from .ragged import Launch, attend_ragged, engine, tokens_of


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
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention within segments: `[B, H, S, D]`, `[B, H_kv, S, D]` -> `[B, S, H, D]`, 0 in padding."""
    if dropout_p or softcap is not None or sinks is not None:
        raise ValueError("The flash kernel has neither dropout nor softcap nor sinks.")
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
    _interface()._flash_attn_fwd(
        query,
        key,
        value,
        **_bounds(launch, query.device),
        softmax_scale=scale,
        causal=True,
        return_lse=True,
        out=out,
        lse=lse.view(query.shape[1], query.shape[0]),
    )
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
        lse.view(query.shape[1], query.shape[0]),
        softmax_scale=scale,
        causal=True,
        **_bounds(launch, query.device),
        dq=dq,
        dk=dk,
        dv=dv,
    )
    launch.clear(*gradients)


def _bounds(launch: Launch, device: torch.device) -> dict[str, Any]:
    edges, longest = launch.edges(device), max(launch.lengths)
    return {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": longest, "max_seqlen_k": longest}


ENGINES["flash4"] = engine(_forward, _backward)


# --------------------------------------------------------------------------------------------------------------------
# FlashAttention 3 and 2


def _by_autograd(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Sequence[Part], scale: float | None
) -> torch.Tensor:
    batch, _, length, _ = query.shape
    (_, attend, *_), _ = modeling_flash_attention_utils.lazy_import_flash_attention(f"flash_attention_{version()}")
    outs = []
    for launch in ragged.launches(ragged.plan(tuple(parts), length, math.inf)):
        shared = (tokens_of(launch, x, launch.kv_heads) for x in (key, value))
        out = attend(
            tokens_of(launch, query, launch.heads),
            *shared,
            **_bounds(launch, query.device),
            softmax_scale=scale,
            causal=True,
        )
        out = out[0] if isinstance(out, tuple) else out  # version 3 gives the normaliser, too
        if launch.padding:
            out = out.clone()
            launch.clear(out)
        outs.append(out.unflatten(0, (batch, length)))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
