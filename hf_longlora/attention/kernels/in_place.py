"""One autograd node for a whole call, whose launches read and write where their heads and tokens lie.

Under plain autograd each slice of q, k and v gets a gradient of its own, which is put together with the others by a
copy, and so are the outputs: at groups of 2,048 that was a fifth of the call (24.6 ms against 19.0 ms of the launches
alone, one H100, `benchmarks/LOG.md`). Here the output and the gradients are allocated once, and an engine, a pair of
functions that serve one launch each way, fills its share of them. The node is a pair of custom operators, opaque to
`torch.compile`. Their names have "flash_attn" in them: by that TRL's selective checkpointing knows what to keep.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..segments import Span

Tensors = tuple[torch.Tensor, ...]


class Call(NamedTuple):
    """What a launch reads and writes: views of its heads and tokens, in the layout that its engine wants.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        out: The output, filled by the forward.
        lse: Logarithms of what the softmax divided by, filled by the forward; flat.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


class Engine(NamedTuple):
    """How one kind of launch is served.

    Args:
        launches: Reads a plan, a flat list of numbers: `heads`, `kv_heads` and `tokens` of each launch, and what else
            the engine wants to know.
        view: `(launch, x, heads)`: the launch's tokens of some heads of `[B, H, S, D]`, as a view.
        forward: `(launch, call, scale)`; fills `call.out` and `call.lse`.
        backward: `(launch, grad, call, gradients, scale)`; fills the gradients of queries, keys and values.
    """

    launches: Callable[[Sequence[int]], Iterator[Any]]
    view: Callable[[Any, torch.Tensor, Span], torch.Tensor]
    forward: Callable[[Any, Call, float], None]
    backward: Callable[[Any, torch.Tensor, Call, Tensors, float], None]

    def calls(
        self,
        plan: Sequence[int],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> Iterator[tuple[Any, Call]]:
        """The launches of a plan and what each works on; `out` is `[B, S, H, D]`."""
        at = 0
        for launch in self.launches(plan):
            size = scores(launch)
            yield (
                launch,
                Call(
                    self.view(launch, query, launch.heads),
                    self.view(launch, key, launch.kv_heads),
                    self.view(launch, value, launch.kv_heads),
                    self.view(launch, out.transpose(1, 2), launch.heads),
                    lse[at : at + size],
                ),
            )
            at += size


def scores(launch: Any) -> int:
    """Rows of the softmax in a launch."""
    return launch.tokens * (launch.heads[1] - launch.heads[0])


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


def heads_of(x: torch.Tensor, heads: Span) -> torch.Tensor:
    return x[:, heads[0] : heads[1]]


@torch.library.custom_op("hf_longlora::flash_attn_in_place", mutates_args=())
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Sequence[int], scale: float, engine: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    found = ENGINES[engine]
    rows = sum(map(scores, found.launches(plan)))
    allocate = query.new_empty if rows == batch * heads * length else query.new_zeros
    out = allocate(batch, length, heads, value.shape[-1])
    lse = query.new_empty(rows, dtype=_wide(query.dtype))  # in the order of the launches
    for launch, call in found.calls(plan, query, key, value, out, lse):
        found.forward(launch, call, scale)
    return out, lse


@torch.library.custom_op("hf_longlora::flash_attn_in_place_backward", mutates_args=())
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
    found = ENGINES[engine]
    whole = lse.numel() == query.shape[0] * query.shape[1] * query.shape[2]
    # Two parts of the query heads may share one key/value head; then the second adds to the first's gradients.
    parts = {(launch.heads, launch.kv_heads) for launch in found.launches(plan)}
    add = len(parts) > len({kv_heads for _, kv_heads in parts})
    dq = torch.empty_like(query) if whole else torch.zeros_like(query)
    dk, dv = (torch.empty_like(x) if whole and not add else torch.zeros_like(x) for x in (key, value))
    for launch, call in found.calls(plan, query, key, value, out, lse):
        shared = [found.view(launch, x, launch.kv_heads) for x in (dk, dv)]
        own = [torch.empty_like(x) for x in shared] if add else shared
        gradients = found.view(launch, dq, launch.heads), *own
        found.backward(launch, found.view(launch, grad.transpose(1, 2), launch.heads), call, gradients, scale)
        if add:
            for total, part in zip(shared, own, strict=True):
                total.add_(part)
    return dq, dk, dv


@_forward.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Sequence[int], scale: float, engine: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    rows = sum(map(scores, ENGINES[engine].launches(plan)))
    out = query.new_empty(batch, length, heads, value.shape[-1])
    return out, query.new_empty(rows, dtype=_wide(query.dtype))


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
