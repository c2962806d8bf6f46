"""Which modules of a model LongLoRA trains, found by type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D


def unwrapped(module: Any) -> Any:
    """A module as the base has it, without an adapter's layer or wrapper around it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Named modules as the base model has them: adapters' layers and wrappers stand for what they wrap."""
    own = unwrapped(module)
    yield prefix, own
    if own is not module:
        return
    for name, child in module.named_children():
        yield from walk(child, f"{prefix}.{name}" if prefix else name)


def language_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules, or those of the language model where the model has others (vision, audio) beside it."""
    modules = list(walk(model))
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text_config is config:
        return modules
    for name, module in modules:
        if name and getattr(module, "config", None) is text_config:
            return [(n, m) for n, m in modules if n == name or n.startswith(f"{name}.")]
    return modules


def is_norm(module: nn.Module) -> bool:
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return False
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    name = type(module).__name__
    if re.search(r"(Batch|Group|Instance)Norm", name):
        return False
    return name.endswith("Norm") or re.search(r"(RMS|Layer)Norm", name) is not None


def is_projection(module: nn.Module) -> bool:
    # Quantised linears are subclasses of nn.Linear (bitsandbytes) or classes of their own (GPTQ, AWQ).
    linear = "Linear" in type(module).__name__ and hasattr(module, "in_features")
    return isinstance(module, (nn.Linear, Conv1D)) or linear


def _is_attention(module: nn.Module) -> bool:
    # A JambaAttentionDecoderLayer is a block that holds an attention module, and an MLP beside it.
    name = type(module).__name__
    return "Attention" in name and not name.endswith("DecoderLayer")


def attention_projections(model: nn.Module) -> set[str]:
    """The linear layers inside attention modules, as the shortest suffixes that match them and nothing else."""
    modules = language_modules(model)
    attentions = tuple(f"{name}." for name, module in modules if name and _is_attention(module))
    found = {name for name, module in modules if name.startswith(attentions) and is_projection(module)}
    return _shortest_suffixes(found, [name for name, _ in walk(model)])


def _shortest_suffixes(names: Iterable[str], every: list[str]) -> set[str]:
    wanted, suffixes = set(names), set()
    matches: dict[str, bool] = {}  # suffix -> whether all that ends with it is wanted
    for name in sorted(wanted):
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if suffix not in matches:
                matches[suffix] = all(n in wanted for n in every if n == suffix or n.endswith(f".{suffix}"))
            if matches[suffix]:
                suffixes.add(suffix)
                break
    return suffixes
