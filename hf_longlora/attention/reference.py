"""The truth: attention by an explicit mask, in fp32 at least. O(n^2) memory; every kernel is compared with it."""

from collections.abc import Sequence

import torch

from .autocast import as_autocast
from .segments import Part, Segment


def segment_mask(
    rows: Sequence[Sequence[Segment]], length: int, before: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which query may see which key: a bool tensor `[B, S, E + S]`, causal and cut at the segments of each row.

    `before` is `E`, how many keys stand before the first query.
    """
    mask = torch.zeros(len(rows), length, before + length, dtype=torch.bool)
    for row, cut in enumerate(rows):
        for start, end, seen in cut:
            within = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            mask[row, start:end, before + start : before + end] = within
            for first, last in seen:
                mask[row, start:end, before + first : before + last] = True
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
    query, key, value = as_autocast(query, key, value)
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, length, before = query.shape[1], query.shape[2], key.shape[2] - query.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        key, value = (_for_each_query_head(x, parts).to(wide) for x in (key, value))
        scores = query.to(wide) @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        masks = (
            segment_mask(rows, length, before, query.device)[:, None].expand(-1, b - a, -1, -1)
            for (a, b), _, rows in parts
        )
        visible = torch.cat(list(masks), dim=1)
        # A row without a visible key has no softmax; let it see itself, and drop what it gives.
        alone = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, float("-inf")).masked_fill(alone, 0.0)
        if learned_sinks is not None:
            sink = learned_sinks.to(wide).view(1, heads, 1, 1).expand(scores.shape[0], -1, length, 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = torch.nn.functional.dropout(weights.masked_fill(alone, 0.0), dropout_p)
        return (weights @ value).to(query.dtype).transpose(1, 2)


def _for_each_query_head(x: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Keys or values, those of each query head: `[B, H_kv, E + S, D]` -> `[B, H, E + S, D]`."""
    own = (x[:, c:d].repeat_interleave((b - a) // (d - c), dim=1) for (a, b), (c, d), _ in parts)
    return torch.cat(list(own), dim=1)
