"""fp32 masters for all that an adapter trains, and heads that stay tied to embeddings.

A norm's weights lie near 1.0, where bf16 steps by 2^-7: an update of 2e-5 rounds away and the norm never moves. PEFT
upcasts LoRA's weights but not the copies that are trained whole, so it is done here. What a copy computes is handed on
in the base's dtype, and what it saves is in the base's dtype, unless a run's own checkpoint asks for all bits.

TRL's trainers cast all of it down again where the base is quantized, and whoever calls `model.half()` does. The tuner
therefore asks for the masters anew whenever it is put in training mode, as each trainer does before a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..modules import is_norm

LOW_PRECISION = (torch.float16, torch.bfloat16)


_FULL_PRECISION = ContextVar("whether state dicts hold masters in fp32", default=False)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, state dicts hold masters in fp32, as a run's checkpoints do, and not in the base's dtype."""
    token = _FULL_PRECISION.set(True)
    try:
        yield
    finally:
        _FULL_PRECISION.reset(token)


@dataclass
class _Master:
    """What a promoted module carries along."""

    original: nn.Module  # the base's, whose dtype may change: `model.float()`
    hooks: list[Any]

    @property
    def dtype(self) -> torch.dtype | None:
        return base_dtype(self.original)


class MasterLinear(nn.Linear):
    """A linear layer with fp32 weights that computes in its input's dtype, with and without autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class TiedHead(nn.Module):
    """An output head without a weight of its own: it reads the embedding's, and so can't come untied.

    PEFT shares the parameter instead. Whoever then assigns a new one to the embedding (transformers' `load_adapter`,
    PEFT with `low_cpu_mem_usage`) leaves the head with the old; and the weight is saved twice.
    """

    bias = None

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it isn't registered as a child

    @property
    def weight(self) -> torch.Tensor:
        return self._embedding[0].weight  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(device=input.device, dtype=input.dtype))

    def to_linear(self) -> nn.Linear:
        """A plain layer that shares the embedding's parameter, as a base model's tied head does."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self._embedding[0].weight  # type: ignore[assignment]
        return linear.train(self.training)


def _inputs_to_weights(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # CUDA's layer_norm takes no mixed dtypes.
    dtype = base_dtype(module)
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def _mixes_dtypes(module: nn.Module) -> bool:
    """Whether a module takes its input in another dtype than its weights: transformers' norms and Liger's do.

    They compute in fp32 by themselves; an input that is cast for them stays fp32 in what is saved for the backward.
    """
    torchs = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    return is_norm(module) and not torchs and type(module).__module__.startswith(("transformers.", "liger_kernel."))


def _output_to_base(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        return output.to(vars(module)["_master"].dtype)
    return output


def _state_in_base_dtype(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if _FULL_PRECISION.get():
        return
    for name, _ in module.named_parameters():
        value = state_dict.get(prefix + name)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            state_dict[prefix + name] = value.to(vars(module)["_master"].dtype)


def adapter_parameters(layer: BaseTunerLayer, adapter_name: str) -> list[nn.Parameter]:
    """What an adapter has put on a layer: LoRA's matrices, or the tokens that are trained."""
    held = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    found = (items[adapter_name] for items in held if items is not None and adapter_name in items)
    return [p for item in found for p in ([item] if isinstance(item, nn.Parameter) else item.parameters())]


def base_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's floating parameters; None without any."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def refuse_biases(model: nn.Module, bias: str) -> None:
    """Raise a `ValueError` where biases of the base would be trained (PEFT's `bias`) and are not fp32: no copies are
    made of them that could be."""
    if bias == "none":
        return
    low = (name for name, p in model.named_parameters() if name.endswith("bias") and p.dtype in LOW_PRECISION)
    name = next(low, None)
    if name is not None:
        raise ValueError(
            f"bias={bias!r} would train {name} in {model.get_parameter(name).dtype}, in which small steps round away. "
            'Load the base in float32, or leave biases as they are (bias="none").'
        )


def of_deepspeed(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO keeps the parameter: it has fp32 masters of its own, and stage 3 no mixed dtypes."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def upcast(parameters: Iterable[nn.Parameter]) -> None:
    """Make parameters fp32, in place: an optimizer may hold them already. DDP and FSDP must not."""
    for parameter in parameters:
        if is_low(parameter):
            parameter.data = parameter.data.float()
            parameter.grad = None if parameter.grad is None else parameter.grad.float()


def is_low(parameter: nn.Parameter) -> bool:
    return parameter.dtype in LOW_PRECISION and not of_deepspeed(parameter)


def promote(copy: nn.Module, original: nn.Module) -> None:
    """Make the weights of a copy fp32, in place; `original`, the base's module, says in which dtype it takes part."""
    upcast(copy.parameters())
    plain = base_dtype(original) not in LOW_PRECISION or any(of_deepspeed(p) for p in copy.parameters())
    if plain or "_master" in vars(copy) or isinstance(copy, TiedHead):
        return
    hooks: list[Any] = [copy.register_state_dict_post_hook(_state_in_base_dtype)]
    if type(copy) is nn.Linear:
        copy.__class__ = MasterLinear
    else:
        hooks.append(copy.register_forward_hook(_output_to_base))
        if not isinstance(copy, nn.Embedding) and not _mixes_dtypes(copy):
            hooks.append(copy.register_forward_pre_hook(_inputs_to_weights))
    vars(copy)["_master"] = _Master(original, hooks)


def demote(copy: nn.Module, dtype: torch.dtype | None) -> None:
    """Undo `promote`, down to the class: what is left is a module as the base has it."""
    master = vars(copy).pop("_master", None)
    for hook in master.hooks if master is not None else ():
        hook.remove()
    if isinstance(copy, MasterLinear):
        setattr(copy, "__class__", nn.Linear)  # noqa: B010 (mypy takes the assignment for a narrowing)
    if dtype in LOW_PRECISION:
        for parameter in copy.parameters():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
