"""What the modules of a model are (attention, MLP, norm, projection), by type, and the way through them.

An adapter's layers and wrappers are passed through: what is found are the modules as the base has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


def meta_model(config: PreTrainedConfig, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model of a config on the meta device, where tensors have shapes and no numbers; `auto` makes it."""
    with torch.device("meta"):
        return auto.from_config(config, **options)


def base_model(model: Any) -> Any:
    """The model within the wrappers of PEFT and DDP."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def input_embedding(model: nn.Module) -> Any:
    """The module of the input embeddings, or what wraps it; `None` where the model names none."""
    get_embedding: Any = getattr(model, "get_input_embeddings", None)
    return get_embedding() if get_embedding is not None else None


def output_head(model: nn.Module) -> Any:
    """The module of the output head, or what wraps it; `None` where the model names none."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head is not None else None


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


def is_attention(module: nn.Module) -> bool:
    """By transformers' own rule: the class is called `*Attention*`. A `JambaAttentionDecoderLayer` is a layer that has
    such a module, and an MLP beside it."""
    name = type(module).__name__
    return "Attention" in name and not name.endswith("DecoderLayer") and not isinstance(module, PreTrainedModel)


def is_mlp(module: nn.Module) -> bool:
    return type(module).__name__.endswith("MLP")


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules of a transformers model, copies that an adapter trains among them."""
    return ((name, m) for name, m in model.named_modules() if is_attention(m) and hasattr(m, "config"))


def sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The window of each layer with softmax attention, by a text model's config; `None`: it sees all tokens."""
    kinds: Any = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not kinds:
        sliding = window if getattr(config, "use_sliding_window", True) else None
        return (sliding,) * getattr(config, "num_hidden_layers", 1)
    return tuple(window if "sliding" in kind or "chunked" in kind else None for kind in kinds if "linear" not in kind)


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that gradient checkpointing works on, by transformers' own mark.

    Raises:
        ValueError: if the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers that transformers marks as such.")
    return layers


def attention_projections(model: nn.Module) -> set[str]:
    """The linear layers inside attention modules, as the shortest suffixes that match them and nothing else."""
    modules = language_modules(model)
    attentions = tuple(f"{name}." for name, module in modules if name and is_attention(module))
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
