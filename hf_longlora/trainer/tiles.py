"""MLPs that take a long sequence by tiles of tokens, one after the other.

The class of an MLP is replaced by a subclass of it, as FSDP2 does, so that names, weights and state dicts stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations import is_deepspeed_zero3_enabled

from ..modules import decoder_layers, is_mlp


def tile_mlps(model: nn.Module, tile: int) -> None:
    """Run the MLP of each decoder layer on `tile` tokens at a time, in place.

    What an MLP computes and its gradients stay the same to rounding; its intermediates take the memory of a tile, not
    of the sequence. Beside gradient checkpointing it costs no computation: a tile's intermediates are computed in the
    backward, and nowhere else.

    Raises:
        ValueError: if the model has no decoder layers, or one of them no MLP or one with dropout.
    """
    for layer in decoder_layers(model):
        found = [m for m in layer.children() if is_mlp(m)]
        if len(found) != 1:
            raise ValueError(
                f"`mlp_tile` needs layers with one MLP; {type(layer).__name__} has "
                f"{sorted(type(m).__name__ for m in layer.children())}. Leave it out."
            )
        mlp: Any = found[0]
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in mlp.modules()):
            raise ValueError(f"`mlp_tile` does not support dropout in {type(mlp).__name__}. Set it to 0.")
        if not isinstance(mlp, TiledMLP):
            mlp.__class__ = _tiled(mlp.__class__)
        mlp.mlp_tile = tile
        if is_deepspeed_zero3_enabled():
            # ZeRO-3 fetches the weights of each module that is called: those of the MLP at once, not for each tile.
            # Processes with more tiles than others would wait for these in vain.
            from deepspeed.utils import set_z3_leaf_module  # type: ignore[import-not-found]

            set_z3_leaf_module(mlp, True)


class TiledMLP(nn.Module):
    """Mixed into the class of an MLP, which comes second in `type(self).__bases__`."""

    mlp_tile: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the MLP's own class: pickle finds classes by name, and the mixed class bears the same one."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_tiled, (type(self).__bases__[1],), *reduced[2:]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        run = super().forward
        if hidden_states.shape[-2] <= self.mlp_tile:
            return run(hidden_states)
        if not torch.is_grad_enabled():
            return _in_tiles(run, hidden_states, self.mlp_tile)
        parameters = [p for p in self.parameters() if p.requires_grad]
        return _Tiles.apply(_Keep.apply(hidden_states), self.mlp_tile, run, *parameters)


@functools.cache
def _tiled(cls: Any) -> type:
    return type(cls.__name__, (TiledMLP, cls), {"__module__": cls.__module__})


def _new_tiled(cls: Any) -> Any:
    tiled: Any = _tiled(cls)
    return tiled.__new__(tiled)


def _in_tiles(run: Callable[..., torch.Tensor], x: torch.Tensor, tile: int) -> torch.Tensor:
    """`run(x)`, a tile after the other, each written into its place."""
    out, at = None, 0
    for part in x.split(tile, dim=-2):
        done = run(part)
        if out is None:
            out = done.new_empty(*x.shape[:-1], done.shape[-1])
        out.narrow(-2, at, part.shape[-2]).copy_(done)
        at += part.shape[-2]
    assert out is not None
    return out


class _Keep(torch.autograd.Function):
    """Saves its input for `_Tiles`, which follows, and does nothing else.

    Gradient checkpointing recomputes a layer until it has all that was saved, and no further. If `_Tiles` saved its
    own input, that would be once its forward is done, and each backward would compute the whole MLP for nothing: a
    fifth of a step. (DeepSpeed's TiledMLP and Liger's pay that.)
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _Tiles(torch.autograd.Function):
    """`run(x)`, a tile of tokens after the other: `[..., S, D]` -> `[..., S, D]`.

    Gradients of the parameters are returned, not accumulated on the side, so that DDP, which waits for them, is told.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, tile: int, run: Callable[..., torch.Tensor], *parameters: nn.Parameter
    ) -> torch.Tensor:
        ctx.keep, ctx.tile, ctx.run, ctx.parameters = x.grad_fn, tile, run, parameters
        if ctx.keep is None:  # it needs no gradient, and only the parameters do
            ctx.save_for_backward(x)
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return _in_tiles(run, x, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors if ctx.keep is None else ctx.keep.saved_tensors
        into_x = None if ctx.keep is None else torch.empty_like(x)
        sums: list[torch.Tensor | None] = [None] * len(ctx.parameters)
        at = 0
        for part, incoming in zip(x.split(ctx.tile, -2), gradient.split(ctx.tile, -2), strict=True):
            part = part.detach().requires_grad_(into_x is not None)
            # A tile's intermediates live for a moment: an outer hook must not send them to the host.
            keep_here = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
            with torch.enable_grad(), torch.autocast(**ctx.autocast), keep_here:
                out = ctx.run(part)
            wanted = ([part] if into_x is not None else []) + list(ctx.parameters)
            found = list(torch.autograd.grad(out, wanted, incoming, allow_unused=True))
            if into_x is not None:
                into_x.narrow(-2, at, part.shape[-2]).copy_(found.pop(0))
            for i, value in enumerate(found):
                if value is not None:
                    sums[i] = value if sums[i] is None else sums[i] + value  # type: ignore[operator]
            at += part.shape[-2]
        return (into_x, None, None, *sums)
