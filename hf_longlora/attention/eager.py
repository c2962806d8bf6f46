"""Dense attention for layers with softcap or attention sinks, which `scaled_dot_product_attention` lacks.

The mathematics is the family's own: the `eager_attention_forward` beside its attention class, run over pieces of the
batch and of the queries, so that only the scores of one piece are in memory. Rows of a softmax don't depend on each
other, so that the pieces change nothing. Time grows with the square of the length, as in any dense attention.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

BLOCK_SCORES = 2**27
"""Scores held at a time, over all heads: 512 MiB in fp32. A piece is whole rows, or queries of one: one at least."""


def eager_function(module: nn.Module, *, softcap: bool, sinks: bool) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The eager attention of the family that an attention module belongs to.

    Raises:
        ValueError: transformers has none for it, or one without what the layer asks for.
    """
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is None:
            continue
        takes = inspect.signature(function).parameters
        # gpt-oss reads the sinks off the module.
        if (not softcap or "softcap" in takes) and (not sinks or "s_aux" in takes or hasattr(module, "sinks")):
            return function
        break
    asked = " and ".join(["softcap"] * softcap + ["attention sinks"] * sinks)
    raise ValueError(
        f"{type(module).__name__} asks for {asked}, which dense attention by sdpa lacks, and its family has no "
        "`eager_attention_forward` with it. Use the model with the attention implementation it is made for."
    )


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    **kwargs: Any,
) -> torch.Tensor:
    """The family's eager attention: `[B, H, S, D]`, `[B, H_kv, S_kv, D]` -> `[B, S, H, D_v]`.

    Args:
        mask: `[B or 1, 1, S, S_kv]`, True where a key is seen, or a float mask to add; `None` for none but causality.
        causal: whether a missing mask stands for a causal one.
        kwargs: what the family's function takes: `scaling`, `dropout`, `softcap`, `s_aux`, ...

    Raises:
        ValueError: the family has no eager attention with what the layer asks for.
    """
    softcap, sinks = (kwargs.get(name) is not None for name in ("softcap", "s_aux"))
    function = eager_function(module, softcap=softcap, sinks=sinks)
    batch, heads, length = query.shape[:3]
    fit = max(1, BLOCK_SCORES // max(1, heads * key.shape[2]))  # queries
    rows, block = max(1, fit // max(1, length)), min(fit, max(1, length))
    whole = rows >= batch and block >= length

    def attend(row: int, start: int, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        added = _additive(mask, causal, row, start, queries, key)
        return function(module, queries, key, value, added, **kwargs)[0]

    outs = []
    # `split` and not slices: its backward is one concatenation, that of a slice a zero-filled tensor of full size.
    for at, (own, keys, values) in enumerate(zip(query.split(rows), key.split(rows), value.split(rows), strict=True)):
        parts = []
        for number, queries in enumerate(own.split(block, dim=2)):
            piece = at * rows, number * block, queries, keys, values
            if torch.is_grad_enabled() and not whole:  # else each piece's scores would be kept for backward
                parts.append(checkpoint(attend, *piece, use_reentrant=False))
            else:
                parts.append(attend(*piece))
        outs.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _additive(
    mask: torch.Tensor | None, causal: bool, row: int, start: int, queries: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The float mask of queries from `row` and `start` on: `[rows or 1, 1, block, S_kv]`, 0 where a key is seen."""
    rows, block, keys = queries.shape[0], queries.shape[2], key.shape[2]
    if mask is None:
        if not causal:
            return None
        at = torch.arange(start, start + block, device=queries.device)[:, None]
        mask = (torch.arange(keys, device=queries.device)[None, :] <= at)[None, None]
    else:
        mask = mask[row if mask.shape[0] > 1 else 0 :][:rows, :, start : start + block, :keys]
    if mask.dtype != torch.bool:
        return mask
    # Families' softmax is in fp32 whatever the model, where what is lower would be -inf, and rows of it NaN.
    lowest = max(torch.finfo(queries.dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros(mask.shape, dtype=queries.dtype, device=mask.device).masked_fill_(~mask, lowest)
