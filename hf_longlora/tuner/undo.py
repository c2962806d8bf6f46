"""An adapter is put on a model as a whole, or the model is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .base_rope import forget


@contextmanager
def undone_on_failure(
    model: nn.Module, configs: dict[str, Any], adapter_name: str
) -> Iterator[list[tuple[nn.Parameter, torch.Tensor]]]:
    """Take an adapter off again if putting it on fails: modules, what is trained, its config and the RoPE's traces.

    Args:
        model: The base.
        configs: Those of the adapters on it, and of this one.
        adapter_name: This one.

    Yields:
        A list for the parameters whose numbers are to be given back too, each with a copy of them.

    Raises:
        ValueError: in the place of whatever a damaged or foreign adapter_config.json sets off.
    """
    config = configs[adapter_name]
    before = copy.deepcopy(vars(config))
    children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    weights: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        yield weights
    except Exception as error:
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
            if isinstance(module, AuxiliaryTrainingWrapper):
                module._adapters.discard(adapter_name)
        for parameter, weight in weights:
            parameter.data.copy_(weight)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        vars(config).clear()
        vars(config).update(before)
        configs.pop(adapter_name, None)
        if not configs:
            forget(model)
        from_file = "_stored_shapes" in before
        if from_file and not isinstance(error, (ImportError, ValueError, torch.OutOfMemoryError)):
            raise ValueError(
                f"the adapter_config.json does not go with this model ({type(error).__name__}: {error}). It is "
                "damaged, or of another version of PEFT."
            ) from error
        raise
