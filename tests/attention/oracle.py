"""The pattern written once more, from the paper's words, so that the package's definition can be wrong."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def visible(
    length: int, documents: list[tuple[int, int]], group_size: int | None, shift: int, sink_tokens: int = 0
) -> torch.Tensor:
    """Which token sees which, by the formula: `[S, S]` bool."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for start, end in documents:
        dense = group_size is None or end - start <= group_size
        for i in range(end - start):
            for j in range(i + 1):
                if dense or (i + shift) // group_size == (j + shift) // group_size or j < sink_tokens:
                    seen[start + i, start + j] = True
    return seen


def oracle(
    query, key, value, rows, group_size, scale=None, shift="half", softcap=None, learned_sinks=None, sink_tokens=0
):
    """Shifted sparse attention in fp64 by brute force. `[B, H, S, D]` -> `[B, H, S, D_v]`, 0 in padding."""
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if kv_heads > 1:
        shifted = [h // group >= kv_heads - kv_heads // 2 for h in range(heads)]
    else:
        shifted = [h >= heads - heads // 2 for h in range(heads)]
    if shift != "half":
        shifted = [shift == "all"] * heads
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, length, value.shape[-1], dtype=torch.float64)
    out = out.to(query.device)
    for b in range(batch):
        masks = [visible(length, rows[b], group_size, by, sink_tokens) for by in (0, (group_size or 0) // 2)]
        for h in range(heads):
            mask = masks[shifted[h]].to(query.device)
            scores = query[b, h].double() @ key[b, h // group].double().T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~mask, float("-inf"))
            if learned_sinks is not None:
                scores = torch.cat([scores, learned_sinks[h].double().expand(length, 1)], dim=-1)
            weights = scores.softmax(-1).nan_to_num(0.0)[:, :length]
            out[b, h] = weights @ value[b, h // group].double()
    return out


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out
