"""torch's attention operators as they are: an output, and the logarithms of what the softmax divided by (log-sum-exp).

`scaled_dot_product_attention` gives no log-sum-exp, and its backward takes none. What is cut into pieces needs both.
These operators are private, and torch may change them: none is called before its signature has been looked at, and
where it is another one, the function serves (`serve`), or nothing (`missing`).
"""

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from transformers.utils import logging

from ..autocast import computed_in

logger = logging.get_logger(__name__)

_FORWARD, _BACKWARD, _VARLEN = (
    "query key value",
    "grad_out query key value out logsumexp",
    "cum_seq_q cum_seq_k max_q max_k",
)
ARGUMENTS = {
    "_fused_sdp_choice": _FORWARD,
    "_scaled_dot_product_flash_attention_for_cpu": f"{_FORWARD} dropout_p is_causal",
    "_scaled_dot_product_flash_attention_for_cpu_backward": f"{_BACKWARD} dropout_p is_causal",
    "_scaled_dot_product_flash_attention": f"{_FORWARD} dropout_p is_causal",
    "_scaled_dot_product_flash_attention_backward": (
        f"{_BACKWARD} {_VARLEN} dropout_p is_causal philox_seed philox_offset"
    ),
    "_scaled_dot_product_cudnn_attention": f"{_FORWARD} attn_bias compute_log_sumexp dropout_p is_causal",
    "_scaled_dot_product_cudnn_attention_backward": (
        f"{_BACKWARD} philox_seed philox_offset attn_bias {_VARLEN} dropout_p is_causal"
    ),
    "_flash_attention_forward": f"{_FORWARD} {_VARLEN} dropout_p is_causal return_debug_mask",
    "_flash_attention_backward": f"{_BACKWARD} {_VARLEN} dropout_p is_causal rng_state unused",
}
"""What each operator is given by place; behind that `scale`, by name. As torch 2.11 to 2.13 have them."""
_ON_CPU = tuple(name for name in ARGUMENTS if "_for_cpu" in name)
_ON_GPU = tuple(name for name in ARGUMENTS if name.startswith(("_fused", "_scaled")) and name not in _ON_CPU)


@lru_cache
def missing(*names: str) -> str | None:
    """The first of the operators that this torch lacks or has with other arguments, in words; `None` if it has all."""
    for name in names:
        operator = getattr(torch.ops.aten, name, None)
        arguments = operator.default._schema.arguments if operator is not None else []
        given = ARGUMENTS[name].split()
        by_place = [argument.name for argument in arguments if not argument.kwarg_only]
        rest = [argument for argument in arguments if argument.name not in given]
        if (
            by_place[: len(given)] != given
            or not all(argument.has_default_value() for argument in rest)
            or "scale" not in (argument.name for argument in rest)
        ):
            return f"the operator aten::{name}, which torch {torch.__version__} lacks, or has with other arguments"
    return None


@torch.compiler.assume_constant_result
def _missing_on(device: str) -> bool:
    """Whether a type of device lacks operators of `forward` and `backward`; says so, once."""
    lack = missing(*(_ON_CPU if device == "cpu" else _ON_GPU))
    if lack is not None:
        logger.warning_once(
            f"s2attn lacks {lack}: its kernel `sdpa` goes through scaled_dot_product_attention, which is right and "
            "takes more time and memory. A later hf_longlora may know this torch."
        )
    return lack is not None


def serve(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch has the operators for a call, without padding it first. Where not, its public function may."""
    width = query.shape[-1]
    if width != value.shape[-1]:
        return False
    if query.device.type == "cpu":
        return not _missing_on("cpu")
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    return (
        computed_in(query) in (torch.float16, torch.bfloat16)
        and width % 8 == 0
        and width <= 128  # wider heads: FlashAttention's backward has them on some devices only
        and (torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled())
        and not _missing_on("cuda")
    )


PLANNED = 8192
"""Tokens from which a launch is cuDNN's, whatever its segments' length. It makes a plan for each shape it meets, and
lengths of short documents are always others; a multiple of `CHOSEN` is one that somebody has set, and comes again."""
CHOSEN = 256


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> bool:
    """Whether cuDNN is to attend, as `scaled_dot_product_attention` would have it, and not FlashAttention."""
    segments, tokens = query.shape[0], query.shape[2]
    if segments * tokens < PLANNED and tokens % CHOSEN and torch.backends.cuda.flash_sdp_enabled():
        return False
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


def _lying_as(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` with the strides of `like`, copied if it has others; those of a single row or token say nothing."""
    if all(a == b for a, b, n in zip(x.stride(), like.stride(), x.shape, strict=True) if n > 1):
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


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
        # torch keeps cuDNN's plans by the strides of queries, keys and values: those of the output have to follow.
        query = _lying_as(out, query)
        seed = torch.zeros((), dtype=torch.int64, device=query.device)  # for dropout, which is off
        rest: tuple[Any, ...] = (seed, seed, None, None, None, *lengths, 0.0, causal)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, lse[..., None], *rest, scale=scale
        )
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    rest = (None, None, *lengths, 0.0, causal, seed, seed[:0])
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, *rest, scale=scale
    )
