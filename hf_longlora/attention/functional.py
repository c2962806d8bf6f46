"""Shifted sparse attention as a function, for modules that are not from transformers."""

import torch

from ..values import check_whole
from .autocast import computed_in
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
        ValueError: on shapes, dtypes or devices that don't fit, a group below 2, sink tokens below 0, or a kernel that
            can't serve.
        NotImplementedError: on forward-mode derivatives, which only the reference has.
    """
    check_whole(2, none=True, group_size=group_size)
    check_whole(0, sink_tokens=sink_tokens)
    check_tensors(query, key, value)
    documents = Documents.find(
        query.shape[0], query.shape[2], cu_seqlens=cu_seqlens, attention_mask=attention_mask, position_ids=None
    )
    parts = documents.parts(query.shape[1], key.shape[1], group_size, sink_tokens=sink_tokens)
    return select_kernel(kernel, query, value)(query, key, value, parts, scale=scale).transpose(1, 2)


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise a `ValueError` unless queries, keys and values fit together."""
    tensors = (query, key, value)
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
    if any(x.ndim != 4 for x in tensors):
        raise ValueError(f"query, key and value must be [B, H, S, D], got {shapes}.")
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2] or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query, key and value must have one batch and one length, key and value as many heads, got {shapes}."
        )
    if 0 in (*query.shape, *key.shape, *value.shape):
        raise ValueError(f"query, key and value must not be empty, got {shapes}.")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query must have a multiple of the heads of key and value, got {shapes}.")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must be of one width, got {shapes}.")
    if len({x.device for x in tensors}) > 1:
        raise ValueError(f"query, key and value must be on one device, got {[str(x.device) for x in tensors]}.")
    dtypes = {computed_in(x) for x in tensors}
    if len(dtypes) > 1 or not query.is_floating_point():
        raise ValueError(f"query, key and value must be of one floating dtype, got {[str(x.dtype) for x in tensors]}.")
