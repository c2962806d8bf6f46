"""An adapter is put on a model as a whole, its weights with it, or the model is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..modules import base_model
from .base_rope import forget, put_rope

_UNDO = "_longlora_undo"
"""On the base model, from when an adapter of a file is on it until its weights are: how to take it off again."""


class Undo:
    """What a model, what is trained in it, and an adapter's config are before the adapter is put on."""

    def __init__(self, model: nn.Module, configs: dict[str, Any], adapter_name: str) -> None:
        self.model, self.configs, self.adapter_name = model, configs, adapter_name
        self.config = configs[adapter_name]
        self.before = copy.deepcopy(vars(self.config))
        self.children = [(module, dict(module._modules)) for module in model.modules()]
        self.trainable = [(p, p.requires_grad) for p in model.parameters()]
        self.weights: list[tuple[nn.Parameter, torch.Tensor]] = []
        """Parameters whose numbers are to be given back too, each with a copy of them."""

    def __call__(self) -> None:
        for module, modules in self.children:
            module._modules.clear()
            module._modules.update(modules)
            if isinstance(module, AuxiliaryTrainingWrapper):
                module._adapters.discard(self.adapter_name)
        for parameter, weight in self.weights:
            parameter.data.copy_(weight)
        for parameter, requires_grad in self.trainable:
            parameter.requires_grad_(requires_grad)
        vars(self.config).clear()
        vars(self.config).update(self.before)
        self.configs.pop(self.adapter_name, None)
        if not self.configs:
            put_rope(self.model, {}, [])
            forget(self.model)


@contextmanager
def undone_on_failure(model: nn.Module, configs: dict[str, Any], adapter_name: str) -> Iterator[Undo]:
    """Take an adapter off again if putting it on fails; the arguments are `Undo`'s.

    Raises:
        ValueError: in the place of whatever a damaged or foreign adapter_config.json sets off.
    """
    undo = Undo(model, configs, adapter_name)
    from_file = undo.config.stored_shapes is not None
    try:
        yield undo
    except Exception as error:
        undo()
        if from_file and not isinstance(error, (ImportError, ValueError, torch.OutOfMemoryError)):
            raise ValueError(
                f"the adapter_config.json does not go with this model ({type(error).__name__}: {error}). It is "
                "damaged, or of another version of PEFT."
            ) from error
        raise
    if from_file:
        vars(model)[_UNDO] = undo


@contextmanager
def undone_if_refused(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Take an adapter off again if its weights, the first since it was put on, are refused."""
    undo = vars(base_model(model)).pop(_UNDO, None)
    try:
        yield
    except ValueError:
        if undo is not None and undo.adapter_name == adapter_name:
            undo()
        raise
