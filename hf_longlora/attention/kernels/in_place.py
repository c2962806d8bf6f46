"""One autograd node for a whole call, whose launches read and write where their heads and tokens lie.

Under plain autograd each slice of q, k and v gets a gradient of its own, which is put together with the others by a
copy, and so are the outputs: at groups of 2,048 that was a fifth of the call (24.6 ms against 19.0 ms of the launches
alone, one H100, `benchmarks/LOG.md`). Here the output and the gradients are allocated once, and an engine, a pair of
functions that serve one launch each way, fills its share of them. What segments see beside their own keys is merged
into that afterwards, for all engines alike (`seen`). The node is a pair of custom operators, opaque to
`torch.compile`. Their names have "flash_attn" in them: by that TRL's selective checkpointing knows what to keep.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd.forward_ad import unpack_dual

from ..autocast import as_autocast
from ..segments import Part, Span
from . import seen
from .seen import Call, Tensors, own_keys


class Engine(NamedTuple):
    """How one kind of launch is served.

    Args:
        decode: Reads launches off a flat list of numbers: `heads`, `kv_heads` and `tokens` of each, whether it
            `joins_rows` (goes through several as one run of tokens), and what else the engine wants to know.
        view: `(launch, x, heads)`: the launch's tokens of some heads of `[B, H, S, D]`, as a view.
        forward: `(launch, call, scale)`; fills `call.out` and `call.lse`.
        backward: `(launch, grad, call, gradients, scale)`; fills the gradients of queries, keys and values.
    """

    decode: Callable[[Sequence[int]], Iterator[Any]]
    view: Callable[[Any, torch.Tensor, Span], torch.Tensor]
    forward: Callable[[Any, Call, float], None]
    backward: Callable[[Any, torch.Tensor, Call, Tensors, float], None]

    def calls(self, launches: Iterable[Any], call: Call) -> Iterator[tuple[Any, Call]]:
        """Each launch and its part of a whole call; the call's keys are those of the queries' own tokens."""
        for launch in launches:
            query, out = (self.view(launch, x, launch.heads) for x in (call.query, call.out))
            key, value = (self.view(launch, x, launch.kv_heads) for x in (call.key, call.value))
            lse = self.view(launch, call.lse[..., None], launch.heads).squeeze(-1)
            yield launch, Call(query, key, value, out, lse)


ENGINES: dict[str, Engine] = {}


def attend_in_place(
    engine: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    launches: Sequence[int],
    parts: Sequence[Part],
    scale: float | None,
) -> torch.Tensor:
    """Attention by launches: `[B, H, S, D]`, `[B, H_kv, E + S, D]` -> `[B, S, H, D]`, else 0.

    These cover the segments of `parts`; what segments see beside their own keys is read off `parts`.
    """
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in (query, key, value)):
        raise NotImplementedError(
            "This attention kernel has no forward-mode derivatives (torch.func.jvp, jacfwd): its tangents would be 0. "
            "Use kernel='reference', which has them, or reverse mode."
        )
    query, key, value = as_autocast(query, key, value)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _forward(query, key, value, launches, seen.encoded(tuple(parts)), factor, engine)[0]


def cover(launches: Sequence[Any], query: torch.Tensor) -> bool:
    """Whether launches reach every query of `[B, H, S, D]`."""
    return sum(each.tokens * (each.heads[1] - each.heads[0]) for each in launches) == query.shape[:3].numel()


def heads_of(x: torch.Tensor, heads: Span) -> torch.Tensor:
    return x[:, heads[0] : heads[1]]


# --------------------------------------------------------------------------------------------------------------------
# Memory


def rows_follow(*tensors: torch.Tensor) -> bool:
    """Whether each row of `[B, H, S, D]` begins where the one before it ends in memory, as in `[B, S, H, D]`."""
    return all(x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.stride(2) for x in tensors)


def _allocate(like: torch.Tensor, *, zeros: bool) -> torch.Tensor:
    """Something to fill of the shape `[B, H, S, D]`, in memory `[B, S, H, D]`: what every launch has a view of.

    Never `empty_like`, which keeps strides that launches can't write through (those of a tensor that is expanded).
    """
    batch, heads, length, width = like.shape
    make = like.new_zeros if zeros else like.new_empty
    return make(batch, length, heads, width).transpose(1, 2)


def _readable(x: torch.Tensor, joined: bool) -> torch.Tensor:
    """`x` if engines can read it where it lies, else a copy, made anew by the backward so that none is kept.

    They want widths without gaps, on a GPU in pieces of 16 bytes, each number in a place of its own (nothing expanded,
    no windows over one another), and rows that follow one another where launches join them.
    """
    unit = 1 if x.device.type == "cpu" else 16 // x.element_size()
    steps = sorted((step, n) for step, n in zip(x.stride(), x.shape, strict=True) if n > 1)
    lies = (
        (x.stride(-1) == 1 or x.shape[-1] == 1)
        and all(step * n <= outer for (step, n), (outer, _) in pairwise([(1, 1), *steps]))
        and all(step % unit == 0 for step, _ in steps if step > 1)
        and x.data_ptr() % (unit * x.element_size()) == 0
        and (rows_follow(x) or not joined)
    )
    return x if lies else _allocate(x, zeros=False).copy_(x)


# --------------------------------------------------------------------------------------------------------------------
# The operators


@torch.library.custom_op("hf_longlora::flash_attn_in_place", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    launches: Sequence[int],
    others: Sequence[int],
    scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    found = ENGINES[engine]
    decoded = list(found.decode(launches))
    joined = any(launch.joins_rows for launch in decoded)
    query, key, value = (_readable(x, joined) for x in (query, key, value))
    out = _allocate(query, zeros=not cover(decoded, query))
    lse = query.new_empty(heads, batch, length, dtype=seen.wide(query)).transpose(0, 1)
    whole = Call(query, key, value, out, lse)
    with torch.autocast(query.device.type, enabled=False):
        for launch, call in found.calls(decoded, whole.own()):
            found.forward(launch, call, scale)
        seen.merge(others, whole, scale)
    return out.transpose(1, 2), lse


@torch.library.custom_op("hf_longlora::flash_attn_in_place_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    launches: Sequence[int],
    others: Sequence[int],
    scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = ENGINES[engine]
    decoded = list(found.decode(launches))
    joined = any(launch.joins_rows for launch in decoded)
    query, key, value = (_readable(x, joined) for x in (query, key, value))
    out, grad = _readable(out.transpose(1, 2), joined), grad.transpose(1, 2)
    # Some engines want the output's gradient to lie as the output does.
    grad = _readable(grad, joined) if grad.stride() == out.stride() else _allocate(grad, zeros=False).copy_(grad)
    # Two parts of the query heads may share one key/value head; then the second adds to the first's gradients.
    parts = {(launch.heads, launch.kv_heads) for launch in decoded}
    add = len(parts) > len({kv_heads for _, kv_heads in parts})
    gaps = not cover(decoded, query)
    others_only = key.shape[2] > query.shape[2]  # keys that no launch reaches
    dq = _allocate(query, zeros=gaps)
    dk, dv = (_allocate(x, zeros=gaps or add or others_only) for x in (key, value))
    own_dk, own_dv = (own_keys(query, x) for x in (dk, dv))
    whole = Call(query, key, value, out, lse)
    with torch.autocast(query.device.type, enabled=False):
        for launch, call in found.calls(decoded, whole.own()):
            shared = [found.view(launch, x, launch.kv_heads) for x in (own_dk, own_dv)]
            own = [torch.empty_like(x) for x in shared] if add else shared
            gradients = found.view(launch, dq, launch.heads), *own
            found.backward(launch, found.view(launch, grad, launch.heads), call, gradients, scale)
            if add:
                for total, part in zip(shared, own, strict=True):
                    total.add_(part)
        seen.add_gradients(others, grad, whole, (dq, dk, dv), scale)
    return dq, dk, dv


@_forward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    lse = query.new_empty(heads, batch, length, dtype=seen.wide(query)).transpose(0, 1)
    return _allocate(query, zeros=False).transpose(1, 2), lse


@_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (_allocate(x, zeros=False) for x in (query, key, value))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    query, key, value, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * len(ctx.rest)
    if grad is None:
        return None, None, None, *nothing
    return *_backward(grad, *ctx.saved_tensors, *ctx.rest), *nothing


_forward.register_autograd(_gradients, setup_context=_save)
