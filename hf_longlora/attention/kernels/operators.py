"""torch's attention operators as they are: an output, and the logarithms of what the softmax divided by (log-sum-exp).

`scaled_dot_product_attention` gives no log-sum-exp, and its backward takes none. What is cut into pieces needs both.
"""

from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ..autocast import computed_in


def serve(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch has the operators for a call, without padding it first."""
    width = query.shape[-1]
    if width != value.shape[-1]:
        return False
    if query.device.type == "cpu":
        return True
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    return (
        computed_in(query) in (torch.float16, torch.bfloat16)
        and width % 8 == 0
        and width <= 128  # wider heads: FlashAttention's backward has them on some devices only
        and (torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled())
    )


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> bool:
    """Whether `scaled_dot_product_attention` would take cuDNN here, and not FlashAttention."""
    choice = torch._fused_sdp_choice(query, key, value, is_causal=causal, enable_gqa=True)
    return choice == SDPBackend.CUDNN_ATTENTION.value


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `[B, H, S, D]` to `[B, H_kv, T, D]`: the output, and its log-sum-exp `[B, H, S]`.

    Args:
        causal: Whether a query sees the keys up to its own; `S` and `T` are equal then.
    """
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    elif _cudnn(query, key, value, causal):
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    return found[0], found[1].view(query.shape[:3])


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values.

    Where `out` and `lse` are of more keys than these, the queries' is what these keys give of it.
    """
    lse, lengths = lse.contiguous(), (query.shape[2], key.shape[2])
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=scale
        )
    if _cudnn(query, key, value, causal):
        seed = torch.zeros((), dtype=torch.int64, device=query.device)  # of dropout, which there is none of
        rest: tuple[Any, ...] = (seed, seed, None, None, None, *lengths, 0.0, causal)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, lse[..., None], *rest, scale=scale
        )
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    rest = (None, None, *lengths, 0.0, causal, seed, seed[:0])
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, *rest, scale=scale
    )
