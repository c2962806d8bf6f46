"""Norms, attention modules and MLPs of a model's decoder layers, compiled for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.interface import NAME
from ..modules import decoder_layers, is_attention, is_mlp, is_norm, walk
from .tiles import TiledMLP


@contextmanager
def compiled_layers(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside, the norms, the attention modules and the MLPs of the decoder layers are compiled.

    These and not whole layers or the model: the trainer's loss replaces the model's forward, and checkpointing runs a
    layer that can't be one graph without compiling any of it. The attention function is left out of the graphs: it
    is one of kernels already, and documents' ends would be constants of a graph. Nor are tiled MLPs compiled.

    Raises:
        ValueError: if the model has no decoder layers.
    """
    if not active:
        yield
        return
    found = [child for layer in decoder_layers(model) for child in layer.children()]
    parts = [m for m in found if is_attention(m) or is_mlp(m) or any(is_norm(part) for _, part in walk(m))]
    parts = [m for m in parts if not isinstance(m, TiledMLP)]
    before = [(part, part._compiled_call_impl) for part in parts]
    attention = ALL_ATTENTION_FUNCTIONS[NAME]
    try:
        AttentionInterface.register(NAME, torch.compiler.disable(attention))
        for part in parts:
            part.compile()
        yield
    finally:
        for part, compiled in before:
            part._compiled_call_impl = compiled
        AttentionInterface.register(NAME, attention)
