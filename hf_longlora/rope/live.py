"""Another RoPE on a live model, in place."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from ..modules import is_attention
from .state import WITH_HISTORY, RopeScaling, current_rope, find_rope, text_config, write_rope

# Attributes a rotary module derives from its config; a value left from another RoPE would be read again.
_DERIVED = ("inv_freq", "max_seq_len_cached", "original_max_seq_len", "attention_scaling", "rope_type")


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of the language model: they hold `*inv_freq` buffers and the config these come from."""
    language = text_config(model.config)
    found = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            continue
        # Vision and audio towers have rotary embeddings of their own, with configs of their own.
        if config is language or getattr(config, "rope_parameters", None) == language.rope_parameters:
            found.append(module)
    return found


def _reinitialise(module: nn.Module) -> None:
    """Give a rotary module the buffers and derived attributes its class computes from its (changed) config.

    A fresh instance is built on the CPU, where `from_pretrained` computes frequencies too: the same numbers to the
    last bit. Hooks, device and training mode of the live module stay.
    """
    device = next(module.buffers(recurse=False)).device
    with torch.device("cpu"):
        fresh = type(module)(config=module.config)
    for name in [n for n in vars(module) if n.endswith(_DERIVED)]:
        delattr(module, name)
    for name in list(module._buffers):
        if name.endswith("inv_freq"):
            delattr(module, name)
    for name, value in vars(fresh).items():
        if name.endswith(_DERIVED) or name == "rope_init_fn":
            setattr(module, name, value.to(device) if isinstance(value, torch.Tensor) else value)
    for name, buffer in fresh.named_buffers(recurse=False):
        if buffer.device.type != "meta":
            module.register_buffer(name, buffer.to(device), persistent=False)


def forget_lengths(model: nn.Module) -> None:
    """Put RoPE that changes with the lengths it has seen in the state of a model that has seen none, in place.

    transformers' dynamic RoPE keeps the frequencies of the longest sequence so far for all that is longer than the
    original length: the same tokens then have other numbers after a longer text.
    """
    found = find_rope(getattr(model, "config", None))
    if found is not None and found.rope_type in WITH_HISTORY:
        for module in rotary_modules(model):
            _reinitialise(module)


def restore_frequencies(model: nn.Module) -> None:
    """Compute the frequencies anew that a cast of the model has rounded: in bf16 they are off by up to 0.4%, which is
    whole turns at a long distance."""
    for module in rotary_modules(model):
        buffers = [buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        if any(buffer.dtype in (torch.float16, torch.bfloat16) for buffer in buffers):
            _reinitialise(module)


def _scales_softmax(module: nn.Module, *scalings: RopeScaling) -> bool:
    """Whether it is an attention module that folds RoPE's `mscale_all_dim` into its softmax scale (DeepSeek's)."""
    if not any(scaling.parameters.get("mscale_all_dim") for scaling in scalings):
        return False
    return is_attention(module) and isinstance(getattr(module, "scaling", None), float)


def _rescale_softmax(module: nn.Module) -> None:
    """Give an attention module the softmax scale its class computes from its (changed) config."""
    with torch.device("meta"):
        fresh: Any = type(module)(config=module.config, layer_idx=module.layer_idx)
    module.scaling = fresh.scaling


def apply_rope(model: nn.Module, scaling: RopeScaling) -> None:
    """Put `scaling` on a live model: config fields, rotary buffers and softmax scales, equal to saving and loading to
    the last bit. Where generation stops at the model's length (`generation_config.max_length`), it stops at the
    new one.

    Raises:
        ValueError: no rotary module, or one that does not take this RoPE. The model is unchanged then.
    """
    config = text_config(model.config)
    before = current_rope(config)
    modules = rotary_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no rotary module (inv_freq buffers with a config): its RoPE can't be scaled "
            "in place."
        )
    configs = {id(c): c for c in [config, *(m.config for m in modules)]}.values()
    scaled = [m for m in model.modules() if _scales_softmax(m, scaling, before)]
    try:
        for each in configs:
            write_rope(each, scaling)
        for module in modules:
            _reinitialise(module)
        for module in scaled:
            _rescale_softmax(module)
    except Exception as error:
        for each in configs:
            write_rope(each, before)
        for module in modules:
            _reinitialise(module)
        for module in scaled:
            with contextlib.suppress(Exception):  # one that can't be built anew was not changed
                _rescale_softmax(module)
        raise ValueError(f"RoPE {scaling.to_dict()} can't be put on {type(model).__name__}: {error}") from error
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and generation.max_length == before.length:
        generation.max_length = scaling.length
