"""Keys, values and heads on their way between the processes of a group, there and back.

Every process calls the same functions in the same order, whether it has something to send or not: what goes where
follows from documents that all of them know. Gradients go back to the owners of what was sent and are added up in the
order of ranks, so that equal runs give equal numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..attention.segments import Part, Span
from .shards import LocalPart, Shards, localize

Tokens = tuple[torch.Tensor, torch.Tensor]
"""Rows and indices of tokens, `[tokens]` each."""


def linked(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """`out`, such that its backward reaches `inputs` though nothing of `out` depends on them.

    Where all of a shard is padding a kernel gives zeros, and the exchange before it would wait for this process.
    """
    return out if out.requires_grad else _Linked.apply(out, *inputs)


class _Linked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.count = len(inputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        return (None,) * (1 + ctx.count)


# --------------------------------------------------------------------------------------------------------------------
# Halo: what a shard's queries see of earlier shards


@dataclass(frozen=True)
class Routes:
    """Who sends which tokens to whom, for one part of the heads.

    Args:
        local: What this process computes.
        sent: For each rank, the tokens of this shard that it needs.
        received: For each rank, where among the keys before this shard's own its tokens go.
        moves: Whether any process sends anything.
    """

    local: LocalPart
    sent: tuple[Tokens, ...]
    received: tuple[Tokens, ...]
    moves: bool

    @classmethod
    def of(cls, part: Part, shards: Shards, device: torch.device) -> "Routes":
        """The routes for the heads of one part."""
        locals_ = [localize(part, span) for span in shards.spans]
        sent = tuple(_tokens(_held(local, shards.spans[shards.rank], own=True), device) for local in locals_)
        mine = locals_[shards.rank]
        received = tuple(_tokens(_held(mine, span, own=False), device) for span in shards.spans)
        return cls(mine, sent, received, any(local.keys for local in locals_))


def _held(local: LocalPart, shard: Span, *, own: bool) -> list[tuple[int, Span]]:
    """The part of a halo in one shard: rows, and spans counted in that shard (`own`) or among the halo's keys."""
    found = []
    for row, at, (start, end) in local.slots():
        low, high = max(start, shard[0]), min(end, shard[1])
        if low < high:
            origin = shard[0] if own else start - at
            found.append((row, (low - origin, high - origin)))
    return found


def _tokens(spans: Sequence[tuple[int, Span]], device: torch.device) -> Tokens:
    none = torch.empty(0, dtype=torch.long)
    rows = [torch.full((end - start,), row) for row, (start, end) in spans]
    tokens = [torch.arange(start, end) for _, (start, end) in spans]
    return torch.cat([none, *rows]).to(device), torch.cat([none, *tokens]).to(device)


class Halo:
    """One exchange of a layer: `start` sends what others need, `finish` gives the keys and values of the shard.

    What is computed between the two goes on while the tokens are on their way, in the backward as in the forward. The
    graph holds this object until its backward, so keys and values pass through it and don't stay: a layer that is
    computed again in the backward would have them in memory until then.

    Args:
        routes: Who sends which tokens to whom.
        group: The processes.
    """

    def __init__(self, routes: Routes, group: dist.ProcessGroup) -> None:
        self.routes = routes
        self.group = group
        self._work: Any
        self._sent: torch.Tensor
        self._coming: torch.Tensor

    def start(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Send off tokens of `[B, H_kv, S, D]`; what it gives, `finish` takes."""
        return _Start.apply(self, key, value) if self.routes.moves else (key, value)

    def finish(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, H_kv, E + S, D]`, the halo's before the shard's own."""
        return _Finish.apply(self, key, value) if self.routes.moves else (key, value)

    def send(self, tensors: Sequence[torch.Tensor], *, back: bool = False) -> None:
        """Set off tokens of `[B, H, T, D]` tensors, to those who need them or `back`; `receive` waits for theirs."""
        gone, come = (self.routes.received, self.routes.sent) if back else (self.routes.sent, self.routes.received)
        rows, tokens = (torch.cat(x) for x in zip(*gone, strict=True))
        self._sent = torch.cat([x[rows, :, tokens].flatten(1) for x in tensors], dim=1)  # kept until it is gone
        counts = [len(tokens) for _, tokens in come]
        self._coming = self._sent.new_empty(sum(counts), self._sent.shape[1])
        self._work = dist.all_to_all_single(
            self._coming, self._sent, counts, [len(tokens) for _, tokens in gone], group=self.group, async_op=True
        )

    def receive(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tokens that `send` has set off towards this process: `[tokens, H, D]` of each of `[B, H, S, D]`."""
        self._work.wait()
        sizes = [x.shape[1] * x.shape[3] for x in like]
        found = [
            part.unflatten(1, (x.shape[1], x.shape[3]))
            for part, x in zip(self._coming.split(sizes, dim=1), like, strict=True)
        ]
        del self._work, self._sent, self._coming
        return found


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halo: Halo, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.halo = halo
        halo.send((key, value))
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = tuple(gradient.clone() for gradient in gradients)
        sizes = [len(tokens) for _, tokens in ctx.halo.routes.sent]
        for gradient, returned in zip(found, ctx.halo.receive(found), strict=True):
            for (rows, tokens), part in zip(ctx.halo.routes.sent, returned.split(sizes), strict=True):
                gradient[rows, :, tokens] += part  # each token once a rank, and so sums are of one order
        return None, *found


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halo: Halo, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.halo = halo
        received = halo.receive((key, value))
        before = halo.routes.local.keys
        if before == 0:
            return key.view_as(key), value.view_as(value)
        rows, slots = (torch.cat(x) for x in zip(*halo.routes.received, strict=True))
        found = []
        for x, part in zip((key, value), received, strict=True):
            batch, heads, length, width = x.shape
            # Keys that a row has not, for another has more, are seen by nobody, but are not to be NaN.
            make = x.new_empty if len(slots) == batch * before else x.new_zeros
            whole = make(batch, before + length, heads, width).transpose(1, 2)
            whole[:, :, before:] = x
            whole[rows, :, slots] = part
            found.append(whole)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        before = ctx.halo.routes.local.keys
        ctx.halo.send([gradient[:, :, :before] for gradient in gradients], back=True)
        return None, *(gradient[:, :, before:] for gradient in gradients)


# --------------------------------------------------------------------------------------------------------------------
# Heads: each process gets whole rows of some heads (DeepSpeed Ulysses, arXiv 2309.14509)


def to_heads(x: torch.Tensor, heads: Sequence[Span], shards: Shards, group: dist.ProcessGroup) -> torch.Tensor:
    """Whole rows of some heads for a shard of all of them: `[B, H, S, D]` -> `[B, h, n, D]`.

    Args:
        heads: Those of each rank; they may overlap.
    """
    return _ToHeads.apply(x, heads, shards, group)


def to_tokens(x: torch.Tensor, heads: Sequence[Span], shards: Shards, group: dist.ProcessGroup) -> torch.Tensor:
    """A shard of all heads for whole rows of some: `[B, h, n, D]` -> `[B, H, S, D]`. The other way round."""
    return _ToTokens.apply(x, heads, shards, group)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, heads: Any, shards: Shards, group: Any) -> torch.Tensor:
        ctx.rest = heads, shards, group, x.shape[1]
        return _heads(x, heads, shards, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _shard(gradients[0], *ctx.rest), None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, heads: Any, shards: Shards, group: Any) -> torch.Tensor:
        ctx.rest = heads, shards, group
        return _shard(x, heads, shards, group, max(end for _, end in heads))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _heads(gradients[0], *ctx.rest), None, None, None


def _heads(x: torch.Tensor, heads: Sequence[Span], shards: Shards, group: dist.ProcessGroup) -> torch.Tensor:
    """`[B, H, S, D]` -> `[B, h, n, D]`, in memory `[B, n, h, D]`."""
    batch, _, _, width = x.shape
    first, last = heads[shards.rank]
    sizes = [(batch, length, last - first, width) for length in shards.lengths]
    found = _swap([x[:, a:b].transpose(1, 2) for a, b in heads], sizes, group)
    return torch.cat(found, dim=1).transpose(1, 2)


def _shard(
    x: torch.Tensor, heads: Sequence[Span], shards: Shards, group: dist.ProcessGroup, total: int
) -> torch.Tensor:
    """`[B, h, n, D]` -> `[B, H, S, D]`, in memory `[B, S, H, D]`; of heads that several have, the sum."""
    batch, _, _, width = x.shape
    length = shards.lengths[shards.rank]
    sizes = [(batch, length, b - a, width) for a, b in heads]
    found = _swap([part.transpose(1, 2) for part in x.split(shards.lengths, dim=2)], sizes, group)
    whole = x.new_zeros(batch, length, total, width)
    for (a, b), part in zip(heads, found, strict=True):
        whole[:, :, a:b] += part
    return whole.transpose(1, 2)


def _swap(
    parts: Sequence[torch.Tensor], sizes: Sequence[tuple[int, ...]], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Give each rank its part, and get one of `sizes` from each."""
    sent = torch.cat([part.flatten() for part in parts])
    counts = [torch.Size(size).numel() for size in sizes]
    received = sent.new_empty(sum(counts))
    dist.all_to_all_single(received, sent, counts, [part.numel() for part in parts], group=group)
    return [part.view(size) for part, size in zip(received.split(counts), sizes, strict=True)]
