"""What an adapter does to the base's own weights: by its start, and by a merge."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..modules import input_embedding, output_head


def changes_base(config: Any) -> bool:
    """Whether LoRA's start takes a part out of the base's weights."""
    start = getattr(config, "init_lora_weights", True)
    taking = isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    return taking or getattr(config, "kasa_config", None) is not None


def warn_of_changed_base(configs: dict[str, Any]) -> None:
    for name, config in configs.items():
        if changes_base(config):
            start = getattr(config, "init_lora_weights", None)
            warnings.warn(
                f"the start of adapter {name!r} ({start!r}) took a part out of the base's weights: "
                "what is left without the adapter is not the base. Load the base again to have it.",
                stacklevel=4,
            )


def adapters_to_merge(tuner: BaseTuner, names: Sequence[str] | None) -> list[str]:
    """The adapters that a merge takes: those that are named, or the active ones.

    Raises:
        TypeError: names are no list.
        ValueError: none is named, one is not there, or several train whole modules, of which a model has one each.
    """
    if isinstance(names, str):
        raise TypeError(f"adapter_names must be a list of names, got {names!r}.")
    found = list(tuner.active_adapters if names is None else names)
    if not found and names is not None:
        raise ValueError("adapter_names names no adapter to merge; unload() gives the base.")
    if unknown := [name for name in found if name not in tuner.peft_config]:
        raise ValueError(f"there is no adapter {unknown[0]!r} to merge; there are {', '.join(tuner.peft_config)}.")
    whole = [name for name in found if name in _with_copies(tuner.model)]
    if len(whole) > 1:
        raise ValueError(
            f"adapters {' and '.join(map(repr, whole))} each have norms or embeddings of their own, and a merged "
            "model has one of each: merge one of them."
        )
    return found


def under_others(tuner: BaseTuner, names: Sequence[str]) -> bool:
    """Whether PEFT would merge the LoRA of the named adapters under the norms and embeddings of others."""
    return set(names) != set(tuner.active_adapters) and bool(_with_copies(tuner.model))


def merged_adapters(model: nn.Module) -> set[str]:
    """The adapters that are merged into the base's weights at present."""
    return {name for module in model.modules() for name in getattr(module, "merged_adapters", ())}


def _with_copies(model: nn.Module) -> set[str]:
    """The adapters that train whole modules."""
    return {
        name
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for name in module.modules_to_save
    }


def part_from_head(model: nn.Module) -> None:
    """Give an embedding that LoRA is about to be merged into weights of its own, apart from a head tied to it."""
    embedding, head = input_embedding(model), output_head(model)
    if isinstance(embedding, LoraLayer) and head is not None:
        base: Any = embedding.get_base_layer()
        if base.weight is head.weight:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)


def refuse_repacked(model: nn.Module) -> None:
    """bitsandbytes repacks 4-bit weights for some CPUs when they first evaluate, and PEFT then reads them wrongly.

    Seen with bitsandbytes 0.50.2 and PEFT 0.21.2, on a CPU with AVX512-BF16.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            state = getattr(getattr(module.get_base_layer(), "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise RuntimeError(
                    "bitsandbytes has repacked the 4-bit weights for this CPU, and a merge would garble them. "
                    "Load the adapter on the base without quantization and merge there (it is more exact, too)."
                )
