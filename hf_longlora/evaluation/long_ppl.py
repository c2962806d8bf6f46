"""LongPPL (arXiv 2410.23771): perplexity over the tokens for which the long context matters.

Most tokens of a text follow from the few before them, and a mean over all hides the others. Key tokens are those that
an evaluator finds likely by the long context and much less so by a short one (section 3.2 there):

    LSD = log p(x | long) - log p(x | short) > alpha,    LCL = log p(x | long) > beta

with a short context of 4,096 tokens, alpha 2 and beta -2. LongPPL is the perplexity of the evaluated model over them.

As in the authors' code the short context is cut anew every `stride` tokens, so that it has `short` to
`short + stride - 1` of them, and the first `short` tokens of a text are no candidates. Unlike there, the evaluator is
the evaluated model itself unless another is given (theirs is Llama-3.1-8B for all), it shares the tokenizer, and of a
long text evenly spaced tokens may stand for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..values import check_whole
from .scoring import embedding_device, evaluating, perplexity, position_nll, vocabulary_size
from .windows import as_token_ids, batches, input_ids, side_by_side, spread

SHORT = 4096
STRIDE = 1024


def long_perplexity(
    model: nn.Module,
    documents: Sequence[str] | Sequence[Sequence[int]] | Sequence[torch.Tensor],
    lengths: int | Sequence[int],
    *,
    evaluator: nn.Module | None = None,
    short: int = SHORT,
    alpha: float = 2.0,
    beta: float = -2.0,
    stride: int = STRIDE,
    tokenizer: Any = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    positions_per_window: int = 8192,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """LongPPL of `model` at each context length.

    Two models are to be compared by one evaluator: by itself each is asked about tokens of its own choice, and one
    that makes no use of the long context has hardly any.

    Args:
        model, documents, tokenizer, batch_size, max_windows, progress: as in `perplexity_by_length`. Windows
            do not overlap.
        lengths: context lengths in tokens, each above `short`.
        evaluator: finds the key tokens; a model with the same tokenizer that reaches the longest length. Default: the
            model itself.
        short: tokens in the short context, at least.
        alpha, beta: the thresholds, in nats.
        stride: tokens that share the begin of their short context. 1 is the definition to the letter, and costs a
            forward of `short` tokens for each.
        positions_per_window: most candidates in a window, evenly spaced, so that the logits stay small.

    Returns:
        One record per length, in the order given: `length`, `short`, `perplexity` (over key tokens; `None` if there
        are none), `nll` (likewise), `key_tokens`, `tokens` (candidates), `documents`, `windows`.

    Raises:
        ValueError: a length of `short` or fewer; a count below 1; else as `perplexity_by_length`.
    """
    check_whole(1, short=short, stride=stride, batch_size=batch_size, positions_per_window=positions_per_window)
    check_whole(1, none=True, max_windows=max_windows)
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    if not lengths or min(lengths) <= short:
        raise ValueError(f"each length must be above that of the short context, {short}; got {lengths}")
    judge = model if evaluator is None else evaluator
    vocabularies = [size for size in map(vocabulary_size, (model, judge)) if size is not None]
    token_ids = as_token_ids(documents, tokenizer, min(vocabularies, default=None))
    by_length = {length: spread(side_by_side(token_ids, length), max_windows) for length in lengths}

    records = []
    total = sum(map(len, by_length.values()))
    bar = logging.tqdm(total=total, desc="LongPPL", unit="window", disable=not progress)
    with evaluating(model), evaluating(judge), bar:
        for length, windows in by_length.items():
            count = min(positions_per_window, length - short)
            targets_K = torch.tensor([short + i * (length - short) // count for i in range(count)])
            nll, keys = 0.0, 0
            for batch in batches(windows, batch_size):
                ids_BS = input_ids(token_ids, batch, embedding_device(judge))
                long_BK = position_nll(judge, ids_BS, targets_K).cpu()
                short_BK = _short_nll(judge, ids_BS, targets_K, short, stride)
                key_BK = (short_BK - long_BK > alpha) & (-long_BK > beta)
                if evaluator is not None:
                    ids_BS = input_ids(token_ids, batch, embedding_device(model))
                    long_BK = position_nll(model, ids_BS, targets_K).cpu()
                nll += long_BK[key_BK].double().sum().item()
                keys += int(key_BK.sum())
                bar.update(len(batch))
            records.append(
                {
                    "length": length,
                    "short": short,
                    "perplexity": perplexity(nll / keys) if keys else None,
                    "nll": nll / keys if keys else None,
                    "key_tokens": keys,
                    "tokens": count * len(windows),
                    "documents": len({window.document for window in windows}),
                    "windows": len(windows),
                }
            )
    return records


def _short_nll(
    model: nn.Module, ids_BS: torch.Tensor, targets_K: torch.Tensor, short: int, stride: int
) -> torch.Tensor:
    """Negative log likelihood of tokens at `targets_K`, by `short` to `short + stride - 1` before each: `[B, K]`."""
    starts_K = (targets_K - short) // stride * stride
    parts = []
    for start in starts_K.unique().tolist():
        targets = targets_K[starts_K == start] - start
        parts.append(position_nll(model, ids_BS[:, start : start + short + stride], targets).cpu())
    return torch.cat(parts, dim=1)
