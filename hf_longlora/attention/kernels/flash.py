"""FlashAttention 4, of the package flash-attn-4: any segments of a part in one launch, as torch's own in `varlen`."""

from functools import lru_cache
from typing import Any

import torch

from .ragged import Launch, ragged_kernel
from .seen import Call, Tensors


@lru_cache(maxsize=1)
def _has_package() -> bool:
    try:
        _interface()
    except ImportError:
        return False
    return True


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """What this machine lacks, in words."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "a GPU of Hopper's generation or later: FlashAttention 4 has no backward before ('varlen' has)"
    return None if _has_package() else "the package flash-attn-4 (pip install 'hf-longlora[flash]')"


def is_fastest() -> bool:
    """Whether this is Hopper, where it is 10 to 13% faster than `sdpa` (`benchmarks/results`).

    Elsewhere nothing has been measured.
    """
    return missing() is None and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


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


flash_kernel = ragged_kernel("flash", _forward, _backward)
