"""All segments of a part in one launch of torch's FlashAttention for variable lengths (`torch.nn.attention.varlen`).

One launch whatever the documents' lengths, where `sdpa` takes several for each. FlashAttention 2, unless
`torch.nn.attention.activate_flash_attention_impl("FA3")` has put the one of that package in its place.
"""

import torch

from . import operators
from .ragged import Launch, ragged_kernel
from .seen import Call, Tensors


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """What this machine lacks, in words."""
    return operators.missing("_flash_attention_forward", "_flash_attention_backward")


def _forward(launch: Launch, call: Call, scale: float) -> None:
    query, key, value, out, lse = call
    edges, longest = launch.edges(query.device), max(launch.lengths)
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, edges, edges, longest, longest, 0.0, True, False, scale=scale
    )
    out.copy_(found[0])
    launch.clear(out)
    lse.T.copy_(found[1])


def _backward(launch: Launch, grad: torch.Tensor, call: Call, gradients: Tensors, scale: float) -> None:
    query, key, value, out, lse = call
    lse = lse.T.contiguous()
    edges, longest = launch.edges(query.device), max(launch.lengths)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # for dropout, which is off
    rest = (edges, edges, longest, longest, 0.0, True, seed, seed[:0])
    found = torch.ops.aten._flash_attention_backward(grad, query, key, value, out, lse, *rest, scale=scale)
    for into, gradient in zip(gradients, found, strict=True):
        into.copy_(gradient)
    launch.clear(*gradients)


varlen_kernel = ragged_kernel("varlen", _forward, _backward)
