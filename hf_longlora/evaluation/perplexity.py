"""Sliding-window perplexity by context length, and mean loss by position inside one long window.

A window is `length` consecutive tokens of one document. `perplexity_by_length` moves it by `stride` tokens and scores
its last `stride` tokens, so that every scored token has at least `length - stride` tokens of left context. 256 is the
stride of the LongLoRA paper (arXiv 2309.12307, section 4.1). No window is padded and none crosses a document.

    length 8, stride 2      . . . . . . s s
    the next window             . . . . . . s s        . context    s scored
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Rows of logits turned to fp32 at a time: 512 rows of a 128k vocabulary are 256 MiB.
LOSS_CHUNK = 512


class Window(NamedTuple):
    """Tokens `[start, end)` of one document, of which the last `scored` are targets."""

    document: int
    start: int
    end: int
    scored: int


def perplexity_by_length(
    model: nn.Module,
    documents: Sequence[str] | Sequence[Sequence[int]] | Sequence[torch.Tensor],
    lengths: int | Sequence[int],
    stride: int | None = None,
    *,
    tokenizer: Any = None,
    align: bool = True,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = True,
    device: str | torch.device | None = None,
) -> list[dict[str, Any]]:
    """Perplexity of `model` at each context length, over the same target tokens.

    Logits are computed for the scored tokens only where the model's forward takes `logits_to_keep`, so memory grows
    with `batch_size * stride * vocabulary` and not with the length. The model is put into eval mode and every
    submodule's training flag is restored afterwards. Only models that share a tokenizer can be compared.

    Args:
        model: any causal language model whose forward takes `input_ids [B, S]` and returns `.logits [B, S, V]`, on its
            device; a `PeftModel` too.
        documents: texts (then `tokenizer` is required; no special tokens are added) or token ids, one sequence or 1-D
            integer tensor per document.
        lengths: context lengths in tokens, each at least 2.
        stride: tokens by which a window moves, and so the tokens scored in each. Default: 256 (the paper's), or half
            of the shortest length where that is less. A smaller stride gives every token more context and costs more.
        tokenizer: turns texts into ids.
        align: score exactly the same tokens at every length: those that the longest length can score, in documents of
            at least `max(lengths)` tokens. Without it each length uses every document that is long enough for it, and
            the numbers of two lengths speak of different text.
        batch_size: windows per forward.
        max_windows: at most this many windows per length, spread evenly over the documents. Default: all.
        progress: show a progress bar.
        device: where the ids are put. Default: the device of the model's embeddings.

    Returns:
        One record per length, in the order given: `length`, `perplexity` (`exp(nll)`), `nll` (nats per token, the mean
        over all scored tokens of all documents), `tokens` (scored), `documents` (used) and `windows`.

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
    _check_counts(batch_size=batch_size, max_windows=max_windows)

    token_ids = _as_token_ids(documents, tokenizer, _vocabulary_size(model))
    # A window's first token has nothing to predict it from: with stride == length one token less is scored, and under
    # `align` at every length.
    needed = {length: max(lengths) if align else length for length in lengths}
    scored = {length: min(stride, (min(lengths) if align else length) - 1) for length in lengths}
    for length in lengths:
        _check_long_enough(token_ids, needed[length])
    plan = {
        length: _spread(
            [
                Window(index, end - length, end, min(new, scored[length]))
                for index, ids in enumerate(token_ids)
                for end, new in _window_ends(len(ids), needed[length], stride)
            ],
            max_windows,
        )
        for length in lengths
    }

    records = []
    total = sum(len(windows) for windows in plan.values())
    with _evaluating(model), logging.tqdm(total=total, desc="perplexity", unit="window", disable=not progress) as bar:
        for length in lengths:
            windows = plan[length]
            nll_sum = 0.0
            for batch in _batches(windows, batch_size):
                keep = max(window.scored for window in batch)
                nll_BK = _suffix_nll(model, _input_ids(token_ids, batch, device or _device(model)), keep)
                for row, window in zip(nll_BK, batch, strict=True):
                    nll_sum += row[keep - window.scored :].double().sum().item()
                bar.update(len(batch))
            tokens = sum(window.scored for window in windows)
            record = {
                "length": length,
                "perplexity": _exp(nll_sum / tokens),
                "nll": nll_sum / tokens,
                "tokens": tokens,
                "documents": len({window.document for window in windows}),
                "windows": len(windows),
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
    device: str | torch.device | None = None,
) -> list[dict[str, Any]]:
    """Mean loss by position in windows of `length` tokens: where it stops falling, further context stopped helping.

    Windows do not overlap; what is left of a document after its last full window is not used. Where a window has more
    targets than `positions_per_window`, evenly spaced ones stand for all, so that the logits stay small.

    Args:
        model, documents, tokenizer, batch_size, max_windows, progress, device: as in `perplexity_by_length`.
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
    _check_counts(batch_size=batch_size, max_windows=max_windows, positions_per_window=positions_per_window)
    edges = _bucket_edges(buckets, length)
    token_ids = _as_token_ids(documents, tokenizer, _vocabulary_size(model))
    _check_long_enough(token_ids, length)
    windows = _spread(
        [
            Window(index, start, start + length, length - 1)
            for index, ids in enumerate(token_ids)
            for start in range(0, len(ids) - length + 1, length)
        ],
        max_windows,
    )
    first = max(edges[0], 1)
    count = min(positions_per_window, edges[-1] - first)
    targets_K = torch.tensor([first + index * (edges[-1] - first) // count for index in range(count)])
    bucket_K = torch.bucketize(targets_K, torch.tensor(edges[1:-1], dtype=torch.long), right=True)

    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64)  # of the losses, and of their squares
    with _evaluating(model), logging.tqdm(total=len(windows), desc="loss", unit="window", disable=not progress) as bar:
        for batch in _batches(windows, batch_size):
            nll_BK = _position_nll(model, _input_ids(token_ids, batch, device or _device(model)), targets_K)
            nll_BK = nll_BK.double().cpu()
            sums.index_add_(1, bucket_K, torch.stack([nll_BK.sum(dim=0), nll_BK.square().sum(dim=0)]))
            bar.update(len(batch))
    counts = torch.bincount(bucket_K, minlength=len(edges) - 1) * len(windows)
    records = []
    for start, end, loss, square, tokens in zip(edges[:-1], edges[1:], *sums.tolist(), counts.tolist(), strict=True):
        if tokens:
            nll = loss / tokens
            error = math.sqrt(max(square / tokens - nll**2, 0.0) / tokens)
            record = {"start": start, "end": end, "nll": nll, "nll_error": error, "perplexity": _exp(nll)}
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


# ----- the model --------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's own training flag is back, also on an exception."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), _autocast(model):
            yield
    finally:
        for module, training in flags:
            module.training = training


def _autocast(model: nn.Module) -> Any:
    """Autocast where fp32 weights (norms and embeddings under training) stand between half-precision ones.

    A fp32 norm hands fp32 activations to a bf16 projection, which raises. LoRA weights do not count: PEFT casts for
    them.
    """
    dtypes = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    half = dtypes & {torch.bfloat16, torch.float16}
    if torch.float32 in dtypes and half:
        return torch.autocast(_device(model).type, dtype=half.pop())
    return nullcontext()


def _suffix_logits(model: nn.Module, input_ids_BS: torch.Tensor, keep: int) -> torch.Tensor:
    """The logits that predict the last `keep` tokens of each row: `[B, keep, V]`."""
    # The token before the first target predicts it; the last token's own logits predict nothing here.
    extra = {"logits_to_keep": keep + 1} if _takes_logits_to_keep(model) else {}
    return model(input_ids=input_ids_BS, use_cache=False, **extra).logits[:, -keep - 1 : -1]


def _suffix_nll(model: nn.Module, input_ids_BS: torch.Tensor, keep: int) -> torch.Tensor:
    """Negative log likelihood in nats of the last `keep` tokens of each row: `[B, keep]`, fp32."""
    return _cross_entropy(_suffix_logits(model, input_ids_BS, keep), input_ids_BS[:, -keep:])


def _position_nll(model: nn.Module, input_ids_BS: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood in nats of the tokens at positions `targets_K` (all >= 1): `[B, K]`, fp32."""
    targets_K = targets_K.to(input_ids_BS.device)
    if _takes_logits_to_keep(model):
        logits_BKV = model(input_ids=input_ids_BS, use_cache=False, logits_to_keep=targets_K - 1).logits
    else:
        logits_BKV = model(input_ids=input_ids_BS, use_cache=False).logits[:, -input_ids_BS.shape[1] :]
        logits_BKV = logits_BKV[:, (targets_K - 1).to(logits_BKV.device)]
    return _cross_entropy(logits_BKV, input_ids_BS[:, targets_K])


def _cross_entropy(logits_BKV: torch.Tensor, labels_BK: torch.Tensor) -> torch.Tensor:
    labels_BK = labels_BK.to(logits_BKV.device)
    losses = [
        F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
        for logits, labels in zip(logits_BKV.split(LOSS_CHUNK, 1), labels_BK.split(LOSS_CHUNK, 1), strict=True)
    ]
    return torch.cat(losses, dim=1)


def _takes_logits_to_keep(model: Any) -> bool:
    """Whether the innermost model's forward names `logits_to_keep`; wrappers (PEFT, DDP) pass it on in `**kwargs`."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return "logits_to_keep" in inspect.signature(model.forward).parameters


def _vocabulary_size(model: Any) -> int | None:
    """Entries of the model's vocabulary, or `None` where neither its config nor its embeddings tell."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    return getattr(config, "vocab_size", None)


def _device(model: Any) -> torch.device:
    """The device of the input embeddings (under a device map, that of the first layers), else of any parameter."""
    try:
        return model.get_input_embeddings().weight.device
    except (AttributeError, NotImplementedError):
        return next(model.parameters()).device


# ----- documents and windows --------------------------------------------------------------------


def _as_token_ids(documents: Any, tokenizer: Any, vocabulary: int | None) -> list[torch.Tensor]:
    """Each document as a 1-D tensor of int64 ids on the CPU, checked."""
    if isinstance(documents, str):
        raise ValueError("documents must be a sequence of documents; wrap a single text in a list")
    documents = list(documents)
    if not documents:
        raise ValueError("documents is empty: nothing to evaluate")
    token_ids = []
    for index, document in enumerate(documents):
        if isinstance(document, str):
            if tokenizer is None:
                raise ValueError(f"document {index} is text: pass tokenizer=, or token ids in place of texts")
            # `verbose=False`: a document is meant to be longer than `model_max_length`.
            document = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.as_tensor(document).cpu()
        if ids.numel() == 0:
            raise ValueError(f"document {index} is empty")
        if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            shape, dtype = tuple(ids.shape), ids.dtype
            raise ValueError(f"document {index} must be one row of integer token ids, got shape {shape} of {dtype}")
        ids = ids.long()
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            bad = low if low < 0 else high
            raise ValueError(
                f"document {index} holds token id {bad}, outside the model's vocabulary of {vocabulary} entries: "
                "was it tokenized with this model's tokenizer?"
            )
        token_ids.append(ids)
    return token_ids


def _check_long_enough(token_ids: list[torch.Tensor], length: int) -> None:
    short = sum(len(ids) < length for ids in token_ids)
    if short == len(token_ids):
        longest = max(len(ids) for ids in token_ids)
        raise ValueError(f"no document has {length} tokens: the longest of {len(token_ids)} has {longest}")
    if short:
        logger.info(f"{short} of {len(token_ids)} documents have fewer than {length} tokens and are not used")


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _window_ends(tokens: int, first_end: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield `(end, new)`: where each window of a document ends, and how many of its last tokens are new."""
    if tokens < first_end:
        return
    yield first_end, stride
    for previous in range(first_end, tokens, stride):
        # The last window ends with the document and scores what is left.
        end = min(previous + stride, tokens)
        yield end, end - previous


def _spread(windows: list[Window], most: int | None) -> list[Window]:
    """At most `most` of the windows, evenly spaced, so that a short run still sees every part of the data."""
    if most is None or len(windows) <= most:
        return windows
    return [windows[index * len(windows) // most] for index in range(most)]


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _input_ids(token_ids: list[torch.Tensor], batch: list[Window], device: str | torch.device) -> torch.Tensor:
    """`[B, length]`; all windows of a batch have one length, so nothing is padded."""
    return torch.stack([token_ids[window.document][window.start : window.end] for window in batch]).to(device)


def _bucket_edges(buckets: int | Sequence[int], length: int) -> list[int]:
    if isinstance(buckets, int):
        if not 1 <= buckets <= length:
            raise ValueError(f"buckets must lie between 1 and length={length}, got {buckets}")
        return [index * length // buckets for index in range(buckets + 1)]
    edges = list(buckets)
    rising = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or not rising or edges[0] < 0 or edges[-1] > length or edges[-1] < 2:
        raise ValueError(f"bucket edges must be at least two rising positions within [0, {length}], got {edges}")
    return edges


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 709 else math.inf  # exp overflows a double from 709.8 on
