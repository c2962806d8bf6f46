"""All segments of a part in one launch of torch's FlashAttention for variable lengths (`torch.nn.attention.varlen`).

One launch whatever the documents' lengths, where `sdpa` takes several for each. FlashAttention 2, unless
`torch.nn.attention.activate_flash_attention_impl` has put a later one in its place.
"""

from collections.abc import Sequence

import torch

from ..segments import Part
from .in_place import ENGINES
from .ragged import Launch, attend_ragged, engine


def varlen_kernel(
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
        raise ValueError("The varlen kernel has neither dropout nor softcap nor sinks.")
    return attend_ragged("varlen", query, key, value, parts, scale)


def _forward(
    launch: Launch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    q, k, v = launch.of(query, launch.heads), launch.of(key, launch.kv_heads), launch.of(value, launch.kv_heads)
    edges, longest = launch.edges(q.device), max(launch.lengths)
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, edges, edges, longest, longest, 0.0, True, False, scale=scale
    )
    launch.clear(found[0])
    launch.of(out, launch.heads).copy_(found[0])
    lse.view(q.shape[1], q.shape[0]).copy_(found[1])


def _backward(
    launch: Launch,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
    add: bool,
) -> None:
    q, k, v = launch.of(query, launch.heads), launch.of(key, launch.kv_heads), launch.of(value, launch.kv_heads)
    edges, longest = launch.edges(q.device), max(launch.lengths)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    pieces = torch.ops.aten._flash_attention_backward(
        launch.of(grad, launch.heads),
        q,
        k,
        v,
        launch.of(out, launch.heads),
        lse.view(q.shape[1], q.shape[0]),
        edges,
        edges,
        longest,
        longest,
        0.0,
        True,
        seed,
        seed[:0],
        scale=scale,
    )
    launch.clear(*pieces)
    launch.of(dq, launch.heads).copy_(pieces[0])
    for whole, piece in ((dk, pieces[1]), (dv, pieces[2])):
        part = launch.of(whole, launch.kv_heads)
        _ = part.add_(piece) if add else part.copy_(piece)


ENGINES["varlen"] = engine(_forward, _backward)
