"""Documents as token ids, and the windows that are cut from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

W = TypeVar("W")


class Window(NamedTuple):
    """Tokens `[start, end)` of one document."""

    document: int
    start: int
    end: int


def as_token_ids(documents: Any, tokenizer: Any, vocabulary: int | None) -> list[torch.Tensor]:
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


def check_long_enough(token_ids: list[torch.Tensor], length: int) -> None:
    short = sum(len(ids) < length for ids in token_ids)
    if short == len(token_ids):
        longest = max(len(ids) for ids in token_ids)
        raise ValueError(f"no document has {length} tokens: the longest of {len(token_ids)} has {longest}")
    if short:
        logger.warning_once(f"{short:,} of {len(token_ids):,} documents have fewer than {length:,} tokens: left out.")


def window_ends(tokens: int, first_end: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield `(end, new)`: where each window of a document ends, and how many of its last tokens are new."""
    if tokens < first_end:
        return
    yield first_end, stride
    for previous in range(first_end, tokens, stride):
        # The last window ends with the document and scores what is left.
        end = min(previous + stride, tokens)
        yield end, end - previous


def side_by_side(token_ids: list[torch.Tensor], length: int) -> list[Window]:
    """Windows of `length` tokens that don't overlap; what is left of a document after its last one is not used.

    Raises:
        ValueError: no document is that long.
    """
    check_long_enough(token_ids, length)
    return [
        Window(index, start, start + length)
        for index, ids in enumerate(token_ids)
        for start in range(0, len(ids) - length + 1, length)
    ]


def spread(windows: list[W], most: int | None) -> list[W]:
    """At most `most` of the windows, evenly spaced, so that a short run still sees every part of the data."""
    if most is None or len(windows) <= most:
        return windows
    return [windows[index * len(windows) // most] for index in range(most)]


def batches(windows: list[W], size: int) -> Iterator[list[W]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def input_ids(token_ids: list[torch.Tensor], batch: list[Window], device: str | torch.device) -> torch.Tensor:
    """`[B, length]`; all windows of a batch have one length, so nothing is padded."""
    return torch.stack([token_ids[window.document][window.start : window.end] for window in batch]).to(device)


def bucket_edges(buckets: int | Sequence[int], length: int) -> list[int]:
    if isinstance(buckets, int):
        if not 1 <= buckets <= length:
            raise ValueError(f"buckets must lie between 1 and length={length}, got {buckets}")
        return [index * length // buckets for index in range(buckets + 1)]
    edges = list(buckets)
    rising = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or not rising or edges[0] < 0 or edges[-1] > length or edges[-1] < 2:
        raise ValueError(f"bucket edges must be at least two rising positions within [0, {length}], got {edges}")
    return edges
