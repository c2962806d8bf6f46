"""The truth: attention by an explicit mask, in fp32. O(n^2) memory; every kernel is compared with it."""

from collections.abc import Sequence

import torch

from .segments import Part, Segment


def segment_mask(rows: Sequence[Sequence[Segment]], length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Which query may see which key: a bool tensor `[B, S, S]`, causal and cut at the segments of each row."""
    mask = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for row, cut in enumerate(rows):
        for start, end, seen in cut:
            mask[row, start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            for first, last in seen:
                mask[row, start:end, first:last] = True
    return mask.to(device)


def reference_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    learned_sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention within segments; shapes as in `hf_longlora.attention.kernels`. Queries in no segment give 0.

    `softcap` bounds the scores by `softcap * tanh(scores / softcap)` (Gemma 2); `learned_sinks` `[H]` adds one score
    for each head that takes weight and gives nothing (gpt-oss).
    """
    heads, length = query.shape[1], query.shape[2]
    # Each query head's own keys and values: with one key/value head the parts share it, else the heads divide evenly.
    key, value = (x.repeat_interleave(heads // key.shape[1], dim=1).float() for x in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    masks = [segment_mask(part.rows, length, query.device)[:, None] for part in parts]
    visible = torch.cat([m.expand(-1, b - a, -1, -1) for m, ((a, b), _, _) in zip(masks, parts, strict=True)], dim=1)
    scores = scores.masked_fill(~visible, float("-inf"))
    # A row without a visible key has no softmax; let it see itself, and drop what it gives.
    alone = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(alone, 0.0)
    if learned_sinks is not None:
        sink = learned_sinks.float().view(1, heads, 1, 1).expand(scores.shape[0], -1, length, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = torch.nn.functional.dropout(weights.masked_fill(alone, 0.0), dropout_p)
    return (weights @ value).to(query.dtype).transpose(1, 2)
