"""One autograd node for a whole call, whose launches read and write where their heads and tokens lie.

Under plain autograd each slice of q, k and v gets a gradient of its own, which is put together with the others by a
copy, and so are the outputs: at groups of 2,048 that was a fifth of the call (24.6 ms against 19.0 ms of the launches
alone, one H100, `benchmarks/LOG.md`). Here the output and the gradients are allocated once, and an engine, a pair of
functions that serve one launch each way, fills its share of them. The node is a pair of custom operators, opaque to
`torch.compile`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

Tensors = tuple[torch.Tensor, ...]


class Engine(NamedTuple):
    """How one kind of launch is served.

    Args:
        launches: Reads a plan, a flat list of numbers: heads, key/value heads, tokens for each head, and what else
            the engine wants to know, for each launch.
        forward: `(launch, query, key, value, out, lse, scale)`; fills the launch's part of `out` and `lse`.
        backward: `(launch, grad, query, key, value, out, lse, dq, dk, dv, scale, add)`; fills the launch's part of the
            gradients, or, if `add`, adds to `dk` and `dv`.
    """

    launches: Callable[[Sequence[int]], Iterator[Any]]
    forward: Callable[..., None]
    backward: Callable[..., None]


ENGINES: dict[str, Engine] = {}


def attend_in_place(
    engine: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Sequence[int], scale: float | None
) -> torch.Tensor:
    """Attention by the launches of a plan: `[B, H, S, D]`, `[B, H_kv, S, D]` -> `[B, S, H, D]`, else 0."""
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _forward(query, key, value, plan, factor, engine)[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def heads_of(x: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    return x[:, heads[0] : heads[1]]


@torch.library.custom_op("hf_longlora::attend_in_place", mutates_args=())
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Sequence[int], scale: float, engine: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    launches = list(ENGINES[engine].launches(plan))
    sizes = [launch.tokens * (launch.heads[1] - launch.heads[0]) for launch in launches]
    whole = sum(sizes) == batch * heads * length
    allocate = query.new_empty if whole else query.new_zeros
    out = allocate(batch, length, heads, value.shape[-1])
    lse = query.new_empty(sum(sizes), dtype=_wide(query.dtype))  # in the order of the launches
    for launch, part in zip(launches, lse.split(sizes), strict=True):
        ENGINES[engine].forward(launch, query, key, value, out.transpose(1, 2), part, scale)
    return out, lse


@torch.library.custom_op("hf_longlora::attend_in_place_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Sequence[int],
    scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if grad.stride(-1) != 1 or grad.stride() != out.stride():
        grad = torch.empty_like(out).copy_(grad)
    launches = list(ENGINES[engine].launches(plan))
    sizes = [launch.tokens * (launch.heads[1] - launch.heads[0]) for launch in launches]
    whole = sum(sizes) == query.shape[0] * query.shape[1] * query.shape[2]
    # Two parts of the query heads may share one key/value head; then the second adds to the first's gradients.
    add = len({(launch.heads, launch.kv_heads) for launch in launches}) > len({launch.kv_heads for launch in launches})
    dq = torch.empty_like(query) if whole else torch.zeros_like(query)
    dk, dv = (torch.empty_like(x) if whole and not add else torch.zeros_like(x) for x in (key, value))
    saved = (query, key, value, out.transpose(1, 2))
    for launch, part in zip(launches, lse.split(sizes), strict=True):
        ENGINES[engine].backward(launch, grad.transpose(1, 2), *saved, part, dq, dk, dv, scale, add)
    return dq, dk, dv


@_forward.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Sequence[int], scale: float, engine: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    tokens = sum(launch.tokens * (launch.heads[1] - launch.heads[0]) for launch in ENGINES[engine].launches(plan))
    out = query.new_empty(batch, length, heads, value.shape[-1])
    return out, query.new_empty(tokens, dtype=_wide(query.dtype))


@_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    query, key, value, ctx.plan, ctx.scale, ctx.engine = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    return (*_backward(grad, *ctx.saved_tensors, ctx.plan, ctx.scale, ctx.engine), None, None, None)


_forward.register_autograd(_gradients, setup_context=_save)
