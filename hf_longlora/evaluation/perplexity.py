"""Sliding-window perplexity by context length, and mean loss by position inside one long window.

A window is `length` consecutive tokens of one document. `perplexity_by_length` moves it by `stride` tokens and scores
its last `stride` tokens, so that every scored token has at least `length - stride` tokens of left context. 256 is the
stride of the LongLoRA paper (arXiv 2309.12307, section 4.1). No window is padded and none crosses a document.

    length 8, stride 2      . . . . . . s s
    the next window             . . . . . . s s        . context    s scored
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..values import check_whole
from .scoring import embedding_device, evaluating, perplexity, position_nll, suffix_nll, vocabulary_size
from .windows import (
    Window,
    as_token_ids,
    batches,
    bucket_edges,
    check_long_enough,
    input_ids,
    side_by_side,
    spread,
    window_ends,
)


def perplexity_by_length(
    model: nn.Module,
    documents: Sequence[str] | Sequence[Sequence[int]] | Sequence[torch.Tensor],
    lengths: int | Sequence[int],
    stride: int | None = None,
    *,
    tokenizer: Any = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Perplexity of `model` at each context length, over the same tokens: those that the longest length can score.

    Logits are computed for the scored tokens only where the model's forward takes `logits_to_keep`, so memory grows
    with `batch_size * stride * vocabulary` and not with the length. Compare only models that share a tokenizer.

    Args:
        model: any causal language model whose forward takes `input_ids [B, S]` and returns `.logits [B, S, V]`, on its
            device; a `PeftModel` too.
        documents: texts (then `tokenizer` is required; no special tokens are added) or token ids, one sequence or 1-D
            integer tensor per document.
        lengths: context lengths in tokens, each at least 2.
        stride: tokens by which a window moves, and so the tokens scored in each. Default: 256 (the paper's), or half
            of the shortest length where that is less. A smaller stride gives every token more context and costs more.
        tokenizer: turns texts into ids.
        batch_size: windows per forward.
        max_windows: at most this many windows per length, spread evenly over the documents. Default: all.

    Returns:
        One record per length, in the order given: `length`, `perplexity` (`exp(nll)`), `nll` (nats per token, the mean
        over all scored tokens of all documents), `tokens` (scored), `documents` (of `max(lengths)` tokens or more)
        and `windows`.

    Raises:
        ValueError: a length below 2; a stride below 1 or above the shortest length; no documents, or an empty one; no
            document long enough; texts without a tokenizer; a token id outside the model's vocabulary.
    """
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    if not lengths:
        raise ValueError("lengths is empty: give at least one context length")
    if min(lengths) < 2:
        raise ValueError(f"every length must be at least 2 (one token of context, one to predict), got {lengths}")
    if stride is None:
        stride = min(256, min(lengths) // 2)
    if not 1 <= stride <= min(lengths):
        raise ValueError(f"stride must lie between 1 and the shortest length, {min(lengths)}; got {stride}")
    check_whole(1, batch_size=batch_size)
    check_whole(1, none=True, max_windows=max_windows)

    token_ids = as_token_ids(documents, tokenizer, vocabulary_size(model))
    longest = max(lengths)
    check_long_enough(token_ids, longest)
    # A window's first token has nothing to predict it from: one token less is scored where the stride is a window.
    most = min(stride, min(lengths) - 1)
    scored = [  # at the end of a window of a document: of each length the same
        (document, end, min(new, most))
        for document, ids in enumerate(token_ids)
        for end, new in window_ends(len(ids), longest, stride)
    ]
    scored = spread(scored, max_windows)
    tokens = sum(count for _, _, count in scored)

    records = []
    total = len(lengths) * len(scored)
    with evaluating(model), logging.tqdm(total=total, desc="perplexity", unit="window", disable=not progress) as bar:
        for length in lengths:
            nll = 0.0
            for batch in batches(scored, batch_size):
                windows = [Window(document, end - length, end) for document, end, _ in batch]
                keep = max(count for _, _, count in batch)
                nll_BK = suffix_nll(model, input_ids(token_ids, windows, embedding_device(model)), keep)
                for row, (_, _, count) in zip(nll_BK, batch, strict=True):
                    nll += row[keep - count :].double().sum().item() / tokens
                bar.update(len(batch))
            record = {
                "length": length,
                "perplexity": perplexity(nll),
                "nll": nll,
                "tokens": tokens,
                "documents": len({document for document, _, _ in scored}),
                "windows": len(scored),
            }
            bar.set_postfix_str(f"{length}: {record['perplexity']:.2f}")
            records.append(record)
    return records


def loss_by_position(
    model: nn.Module,
    documents: Sequence[str] | Sequence[Sequence[int]] | Sequence[torch.Tensor],
    length: int,
    *,
    buckets: int | Sequence[int] = 8,
    tokenizer: Any = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    positions_per_window: int = 2048,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Mean loss by position in windows of `length` tokens: where it stops falling, further context stopped helping.

    Windows do not overlap; what is left of a document after its last full window is not used. Where a window has more
    targets than `positions_per_window`, evenly spaced ones stand for all, so that the logits stay small.

    Args:
        model, documents, tokenizer, batch_size, max_windows, progress: as in `perplexity_by_length`.
        length: tokens per window.
        buckets: how many equal buckets to cut positions `[0, length)` into, or the rising edges themselves, for
            instance `[1, 256, 1024, 4096]` for three buckets.
        positions_per_window: most targets scored in one window.

    Returns:
        One record per bucket that holds a target: `start`, `end` (positions `[start, end)` of the predicted tokens),
        `nll` (nats per token), `nll_error` (its standard error, tokens taken as independent), `perplexity`, `tokens`.
        Position 0 is never predicted.

    Raises:
        ValueError: as `perplexity_by_length`; buckets that do not rise or do not fit into `[0, length]`.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}")
    check_whole(1, batch_size=batch_size, positions_per_window=positions_per_window)
    check_whole(1, none=True, max_windows=max_windows)
    edges = bucket_edges(buckets, length)
    token_ids = as_token_ids(documents, tokenizer, vocabulary_size(model))
    windows = spread(side_by_side(token_ids, length), max_windows)
    first = max(edges[0], 1)
    count = min(positions_per_window, edges[-1] - first)
    targets_K = torch.tensor([first + index * (edges[-1] - first) // count for index in range(count)])
    bucket_K = torch.bucketize(targets_K, torch.tensor(edges[1:-1], dtype=torch.long), right=True)

    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64)  # of the losses, and of their squares
    with evaluating(model), logging.tqdm(total=len(windows), desc="loss", unit="window", disable=not progress) as bar:
        for batch in batches(windows, batch_size):
            nll_BK = position_nll(model, input_ids(token_ids, batch, embedding_device(model)), targets_K)
            nll_BK = nll_BK.double().cpu()
            sums.index_add_(1, bucket_K, torch.stack([nll_BK.sum(dim=0), nll_BK.square().sum(dim=0)]))
            bar.update(len(batch))
    counts = torch.bincount(bucket_K, minlength=len(edges) - 1) * len(windows)
    records = []
    for start, end, loss, square, tokens in zip(edges[:-1], edges[1:], *sums.tolist(), counts.tolist(), strict=True):
        if tokens:
            nll = loss / tokens
            error = math.sqrt(max(square / tokens - nll**2, 0.0) / tokens)
            record = {"start": start, "end": end, "nll": nll, "nll_error": error, "perplexity": perplexity(nll)}
            records.append(record | {"tokens": tokens})
    return records


def far_context(records: Sequence[dict[str, Any]]) -> str:
    """One line: does the farthest context help or hurt, by `loss_by_position`'s last two buckets?

    They differ if their losses are two standard errors of the difference apart.

    Raises:
        ValueError: with fewer than two records.
    """
    if len(records) < 2:
        raise ValueError("to compare the far context with a nearer one, at least two buckets are needed")
    near, far = records[-2:]
    change, error = far["nll"] - near["nll"], math.hypot(far["nll_error"], near["nll_error"])
    verdict = "makes no difference that shows" if abs(change) <= 2 * error else "helps" if change < 0 else "hurts"
    return (
        f"Context beyond {far['start']:,} tokens {verdict}: loss {far['nll']:.3f} at positions {far['start']:,} to "
        f"{far['end']:,}, {near['nll']:.3f} at {near['start']:,} to {near['end']:,} ({change:+.3f}, standard error "
        f"{error:.3f})."
    )
