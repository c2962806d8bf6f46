"""Shifted sparse attention as a function, for modules that are not from transformers."""

import torch

from .config import check_group_size, check_sink_tokens
from .kernels import select_kernel
from .segments import Documents


def s2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group_size: int | None,
    sink_tokens: int = 4,
    cu_seqlens: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Shifted sparse attention, for modules that are not from transformers (LongLoRA, section 3.2).

    Causal. The last half of the key/value heads, with all their query heads, works on groups shifted by half a group;
    with a single key/value head, the last half of the query heads.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, S, D_v]`.
        group_size: Tokens in a group, at least 2; `None` for dense causal attention within the documents.
        sink_tokens: First tokens of a document that every group sees beside its own; 0 is the paper's pattern.
        cu_seqlens: `[documents + 1]`, ends of the documents packed into the one row (`B` is 1).
        attention_mask: `[B, S]`, 0 where a token is padding.
        scale: Factor of the scores; `D ** -0.5` if `None`.
        kernel: Name of a kernel, or `"auto"`.

    Returns:
        `[B, H, S, D_v]`; 0 where the query is padding.

    Raises:
        ValueError: on shapes that don't fit, a group below 2, sink tokens below 0, or a kernel that can't serve.
    """
    check_group_size(group_size)
    check_sink_tokens(sink_tokens)
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError("query, key and value must be [B, H, S, D].")
    if query.shape[2] != key.shape[2] or key.shape[:3] != value.shape[:3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query, key and value must have one length and H a multiple of H_kv, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    documents = Documents.find(
        query.shape[0], query.shape[2], cu_seqlens=cu_seqlens, attention_mask=attention_mask, position_ids=None
    )
    parts = documents.parts(query.shape[1], key.shape[1], group_size, sink_tokens=sink_tokens)
    return select_kernel(kernel, query, value)(query, key, value, parts, scale=scale).transpose(1, 2)
