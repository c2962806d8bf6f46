"""Keys that segments see beside their own: their document's first tokens.

The launches of an in-place call attend to each segment's own keys. What the few others add is merged into their output
by the logarithms of what the softmax divided by (log-sum-exp): with `own` that of a query's own keys and `s_j` the
scores of the others, `total = log(exp(own) + sum_j exp(s_j))` and

    out = exp(own - total) * out + sum_j exp(s_j - total) * value_j

The launches' backward, run on the merged output and `total`, gives what the own keys give and get; the others' share
is added to it. Nothing is copied. Neighbouring segments that see the same are one piece of work. Here it is in plain
torch; on a GPU `seen_triton` does the same for first tokens. What a shard's queries see of a group that began in
earlier shards is more than it is made for, up to half the group's square: torch's operators attend to that.

These keys are tokens of the text. Sinks that a model has learned (gpt-oss's `s_aux`) are another thing, called
`learned_sinks` everywhere here.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from typing import NamedTuple

import torch
from transformers.utils import logging

from ..segments import Part, Span
from . import operators

logger = logging.get_logger(__name__)

CHUNK = 2**22
"""Elements of queries, or of scores if these are more, that are in work at a time: 16 MiB in fp32."""


Tensors = tuple[torch.Tensor, ...]


class Call(NamedTuple):
    """The tensors that attention reads and writes: those of a whole call, or views of the part that a launch serves.

    Args:
        query: `[B, H, S, D]`; of a launch, as its engine wants it.
        key, value: `[B, H_kv, E + S, D]`.
        out: The output, filled by the forward, as `query`.
        lse: Logarithms of what the softmax divided by, filled by the forward: `[B, H, S]`, not contiguous.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    def own(self) -> "Call":
        """The same with the keys and values of the queries' own tokens alone, as views."""
        return self._replace(key=own_keys(self.query, self.key), value=own_keys(self.query, self.value))


class Piece(NamedTuple):
    """Queries of a row, `start` to `end`, that all see the keys `first` to `last` before them.

    Args:
        heads: Query heads.
        kv_heads: Their key/value heads.
        row: Of the batch.
        start: The first query.
        end: After the last.
        first: The first key; negative as in a segment's `seen`.
        last: After the last.
    """

    heads: Span
    kv_heads: Span
    row: int
    start: int
    end: int
    first: int
    last: int

    @property
    def adjoins(self) -> bool:
        """Whether the keys end where the queries begin: their group began in an earlier shard."""
        return self.last == self.start

    def views(self, of_queries: Sequence[torch.Tensor], of_keys: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What lies at the queries of `[B, H, S, D]` and at the keys of `[B, H_kv, E + S, D]`: `[1, h, tokens, D]`."""
        before = of_keys[0].shape[2] - of_queries[0].shape[2]
        queries = [x[self.row, None, slice(*self.heads), self.start : self.end] for x in of_queries]
        keys = [x[self.row, None, slice(*self.kv_heads), before + self.first : before + self.last] for x in of_keys]
        return *queries, *keys


@lru_cache(maxsize=64)
def encoded(parts: tuple[Part, ...]) -> list[int]:
    """The pieces of a call as a flat list of numbers, which is what a custom operator takes."""
    found: list[int] = []
    for heads, kv_heads, rows in parts:
        for row, segments in enumerate(rows):
            # What is seen begins where the document does, so that equal neighbours are of one document.
            for seen, alike in groupby(segments, key=lambda segment: segment.seen):
                same = list(alike)
                for span in seen:
                    found += [*heads, *kv_heads, row, same[0].start, same[-1].end, *span]
    return found


def pieces(numbers: Sequence[int]) -> Iterator[Piece]:
    """The pieces that `encoded` gave."""
    for at in range(0, len(numbers), 9):
        a, b, c, d, *rest = numbers[at : at + 9]
        yield Piece((a, b), (c, d), *rest)


def rounds(found: Iterable[Piece]) -> list[list[Piece]]:
    """The pieces of a part, those together that can be worked on at once: no query is in two of them."""
    taken: list[list[Piece]] = []
    for _, alike in groupby(found, key=lambda piece: (piece.row, piece.start)):
        for number, piece in enumerate(alike):
            if number == len(taken):
                taken.append([])
            taken[number].append(piece)
    return taken


@lru_cache(maxsize=64)
def _by_adjoining(numbers: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The numbers of the pieces that don't adjoin, and of those that do."""
    found: tuple[list[int], list[int]] = [], []
    for at, piece in enumerate(pieces(numbers)):
        found[piece.adjoins].extend(numbers[9 * at : 9 * at + 9])
    return found


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        logger.warning(
            "Triton is not installed: sink tokens are merged by plain torch, which takes several times longer."
        )
    return found


def merge(numbers: Sequence[int], call: Call, scale: float) -> None:
    """Merge what the pieces' keys give into `call.out` and `call.lse`, in place.

    Args:
        numbers: What `encoded` gave.
        call: The whole.
        scale: Factor of the scores.
    """
    query, key, value, out, lse = call
    if query.is_cuda and _has_triton():
        from . import seen_triton

        few, numbers = _by_adjoining(tuple(numbers))
        seen_triton.merge(few, call.own(), scale)
    for piece in pieces(numbers):
        if piece.adjoins and operators.serve(query, value):
            queries, keys, values = piece.views((query,), (key, value))
            given, normalizer = operators.forward(queries, keys, values, False, scale)
            _merge_given(piece, given, normalizer, out, lse)
            continue
        keys, values = (_of_keys(piece, query, x).to(wide(x)) for x in (key, value))
        for tokens in _chunks(piece, query):
            own, attended = _queries(piece, tokens, lse[..., None]), _queries(piece, tokens, out)
            scores = _queries(piece, tokens, query).to(keys.dtype) @ keys.mT * scale
            total = torch.logaddexp(own, scores.logsumexp(-1, keepdim=True))
            given = (scores - total).exp() @ values
            attended.copy_(attended * (own - total).exp() + given)
            own.copy_(total)


def _merge_given(
    piece: Piece, given: torch.Tensor, normalizer: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge what an operator has given, `[1, h, tokens, D]` with its log-sum-exp `[1, h, tokens]`, in place."""
    at = piece.row, None, slice(*piece.heads), slice(piece.start, piece.end)
    size = max(1, CHUNK // (given.shape[1] * given.shape[3]))
    pieces = zip(*(x.split(size, dim=2) for x in (given, normalizer, out[at], lse[at])), strict=True)
    for part, others, merged, own in pieces:
        total = torch.logaddexp(own, others)
        merged.copy_(merged * (own - total).exp()[..., None] + part * (others - total).exp()[..., None])
        own.copy_(total)


def add_gradients(numbers: Sequence[int], grad: torch.Tensor, call: Call, gradients: Tensors, scale: float) -> None:
    """Add what the pieces' keys give and get to the gradients of queries, keys and values, in place.

    Args:
        numbers: What `encoded` gave.
        grad: The output's gradient, `[B, H, S, D]`.
        call: The whole, with the merged output.
        gradients: Of queries, keys and values, of their shapes.
        scale: Factor of the scores.
    """
    query, key, value, out, lse = call
    dq, dk, dv = gradients
    if query.is_cuda and _has_triton():
        from . import seen_triton

        few, numbers = _by_adjoining(tuple(numbers))
        of_keys = (own_keys(query, x) for x in (dk, dv))
        seen_triton.add_gradients(few, grad, call.own(), (dq, *of_keys), scale)
    for piece in pieces(numbers):
        if piece.adjoins and operators.serve(query, value):
            given, queries, merged, keys, values = piece.views((grad, query, out), (key, value))
            total = lse[piece.row, None, slice(*piece.heads), piece.start : piece.end]
            found = operators.backward(given, queries, keys, values, merged, total, False, scale)
            for gradient, part in zip(piece.views((dq,), (dk, dv)), found, strict=True):
                gradient.add_(part)
            continue
        keys, values = (_of_keys(piece, query, x).to(wide(x)) for x in (key, value))
        for_keys, for_values = torch.zeros_like(keys), torch.zeros_like(values)
        for tokens in _chunks(piece, query):
            queries, given = (_queries(piece, tokens, x).to(keys.dtype) for x in (query, grad))
            weights = (queries @ keys.mT * scale - _queries(piece, tokens, lse[..., None])).exp()
            mean = (given * _queries(piece, tokens, out)).sum(-1, keepdim=True)
            scores = weights * (given @ values.mT - mean) * scale
            _queries(piece, tokens, dq).add_(scores @ keys)
            for_keys += (scores.mT @ queries).sum(1, keepdim=True)
            for_values += (weights.mT @ given).sum(1, keepdim=True)
        for gradient, sums in ((dk, for_keys), (dv, for_values)):
            _of_keys(piece, query, gradient).add_(sums)


def own_keys(query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The keys or values of the queries' own tokens, a view: `[B, H_kv, E + S, D]` -> `[B, H_kv, S, D]`."""
    return x[:, :, x.shape[2] - query.shape[2] :]


def wide(x: torch.Tensor) -> torch.dtype:
    """What sums over `x` are kept in: fp32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _of_keys(piece: Piece, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What lies at the keys of a piece, a view: `[B, H_kv, E + S, D]` -> `[h_kv, 1, keys, D]`."""
    before = x.shape[2] - query.shape[2]
    return x[piece.row, slice(*piece.kv_heads), None, before + piece.first : before + piece.last]


def _queries(piece: Piece, tokens: slice, x: torch.Tensor) -> torch.Tensor:
    """What lies at some queries of a piece, a view: `[B, H, S, D]` -> `[h_kv, h / h_kv, tokens, D]`."""
    return x[piece.row, slice(*piece.heads), tokens].unflatten(0, (len(range(*piece.kv_heads)), -1))


def _chunks(piece: Piece, query: torch.Tensor) -> Iterator[slice]:
    width = max(query.shape[-1], piece.last - piece.first)
    tokens = max(1, CHUNK // (len(range(*piece.heads)) * width))
    for start in range(piece.start, piece.end, tokens):
        yield slice(start, min(start + tokens, piece.end))
