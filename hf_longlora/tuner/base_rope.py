"""The RoPE of a base model that carries adapters: resolved for them, put on, and given back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .. import rope
from ..rope import RopeScaling
from .config import LongLoraConfig

# On the base model, so that it outlives the tuner: transformers' own `load_adapter` builds one per adapter.
_BASE_ROPE = "_longlora_base_rope"
_FOLLOWER = "_longlora_follower"
_DORA = "_longlora_dora"
"""On the base model, too: the adapters of DoRA that were loaded on it, unless by a PeftModel."""
_TRANSFORMERS_KEEPS_ALL = Version(transformers.__version__) >= Version("5.18")


def rope_of_base(model: nn.Module) -> RopeScaling:
    """The RoPE of the base model, whatever an adapter has made of it.

    Raises:
        ValueError: the model has none.
    """
    snapshot = getattr(model, _BASE_ROPE, None)
    return snapshot if snapshot is not None else rope.current_rope(getattr(model, "config", None))


def find_rope_of_base(model: nn.Module) -> RopeScaling | None:
    """`rope_of_base`, or `None` where there is no RoPE that can be read."""
    snapshot = getattr(model, _BASE_ROPE, None)
    return snapshot if snapshot is not None else rope.find_rope(getattr(model, "config", None))


def remember(model: nn.Module, base_length: int | None = None) -> None:
    """Keep the base's RoPE and native window on the model, before an adapter changes them."""
    setattr(model, _BASE_ROPE, rope_of_base(model))
    setattr(model, rope.NATIVE_WINDOW, rope.native_window(model, base_length))


def forget(model: nn.Module) -> None:
    """Leave nothing of it on a model without adapters."""
    for name in (_BASE_ROPE, rope.NATIVE_WINDOW):
        vars(model).pop(name, None)
    unfollow(model)


def resolve_rope(model: nn.Module, config: LongLoraConfig) -> None:
    """Write into an adapter's config the RoPE that it asks for and the base's, or check what is written there.

    Raises:
        ValueError: the adapter was trained on a base with another RoPE, or the model's can't be scaled as asked.
    """
    if config.rope is not None or config.base_rope is not None:
        refuse_other_base(config, rope_of_base(model))
    elif config.resolved:
        pass  # on a model without RoPE
    elif config.target_length is not None or config.rope_parameters is not None:
        base = rope_of_base(model)
        scaling = rope.scaled_rope(
            model.config,
            config.target_length,
            config.rope_type,
            config.rope_parameters,
            config.base_length,
            base=base,
        )
        config.rope, config.base_rope = None if scaling == base else scaling.to_dict(), base.to_dict()
    else:
        # Nothing to scale; what the adapter is trained on is written down all the same, if it can be read.
        found = find_rope_of_base(model)
        config.base_rope = found.to_dict() if found is not None else None


def refuse_other_base(config: LongLoraConfig, base: RopeScaling) -> None:
    """Raise a `ValueError` if the base that an adapter was trained on had another RoPE than this one."""
    trained = config.base_scaling
    if trained is not None and trained != base:
        raise ValueError(
            f"this adapter was trained on a base with another RoPE: {trained.rope_parameters} at "
            f"{trained.max_position_embeddings} tokens, but the model has {base.rope_parameters} at "
            f"{base.max_position_embeddings}. A merged or otherwise extended model is no base for it; load the "
            "original one. (A config that has been used on one model holds that model's RoPE: make a fresh one for "
            "another.)"
        )


def refuse_other_rope(configs: Mapping[str, Any], wanted: dict[str, Any] | None, adapter_name: str) -> None:
    """Raise a `ValueError` if another adapter on the model has another RoPE than the one that is `wanted`."""
    for name, other in configs.items():
        if name != adapter_name and getattr(other, "rope", None) != wanted:
            raise ValueError(
                f"adapter {adapter_name!r} has another RoPE than {name!r}, which is on the model already, and one "
                "model has one RoPE. Unload the other first, or load this one on a model of its own."
            )


def put_rope(model: nn.Module, configs: Mapping[str, Any], active: list[str]) -> None:
    """Put on the model what its active adapters need: theirs, or the base's without any."""
    base = getattr(model, _BASE_ROPE, None)
    if base is None:
        return
    wanted = base
    for name in active:
        wanted = getattr(configs.get(name), "scaling", None) or wanted
    if rope.current_rope(model.config) != wanted:
        rope.apply_rope(model, wanted)


def warn_of_reference(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """An adapter in training is switched off: as TRL's trainers do for a reference, where they were given the base."""
    base: Any = getattr(model, _BASE_ROPE, None)  # there is one wherever an adapter has a scaling
    for config in configs.values():
        scaling = getattr(config, "scaling", None)
        if config.inference_mode or scaling in (None, base):
            continue
        warnings.warn(
            f"Without its adapter the model has its own RoPE, for {base.length:,} tokens. A trainer that "
            "takes its reference so (DPO, KTO, GRPO with a beta) compares with that, and not with the extended model "
            f"of {scaling.length:,}. Extend first, and give the trainer the "
            "PeftModel (it keeps a copy of the adapter as the reference), or the merged model with a LongLoraConfig "
            "that has no target_length.",
            stacklevel=6,
        )
        return


def follow(model: nn.Module, adapter_name: str, dora: bool) -> None:
    """See to it that the RoPE goes with the layers, for a model that no tuner may be told about.

    Args:
        model: The base.
        adapter_name: The adapter that has been put on it.
        dora: Whether it was stored, and DoRA's magnitudes with it.
    """
    if dora:
        vars(model).setdefault(_DORA, set()).add(adapter_name)
    if not hasattr(model, _FOLLOWER):
        setattr(model, _FOLLOWER, model.register_forward_pre_hook(_follow_layers))


def unfollow(model: nn.Module) -> None:
    """Undo `follow`: there is a tuner, and it is told of every switch."""
    vars(model).pop(_DORA, None)
    hook = vars(model).pop(_FOLLOWER, None)
    if hook is not None:
        hook.remove()


def _follow_layers(model: nn.Module, args: Any) -> None:
    """Before a forward: give the model the RoPE its LoRA layers call for.

    transformers' own `load_adapter` throws the tuner away, and its `disable_adapters`, `set_adapter` and
    `delete_adapter` speak to the layers alone; its `enable_adapters` to LoRA's alone.

    Raises:
        RuntimeError: this transformers has lost part of the adapter.
    """
    if not _TRANSFORMERS_KEEPS_ALL:
        raise RuntimeError(
            f"transformers {transformers.__version__} drops an adapter's norms and embeddings in its own adapter "
            "methods, with no more than a line in the log. Put the adapter on a fresh model by get_peft_model or "
            "PeftModel.from_pretrained, or use transformers 5.18 or newer."
        )
    configs = vars(model).get("peft_config", {})
    if lost := sorted(vars(model).get(_DORA, set()) & configs.keys()):
        raise RuntimeError(
            f"transformers' load_adapter, which from_pretrained uses as well, drops DoRA's magnitudes (of adapter "
            f"{lost[0]!r}), with no more than a line in the log. Load it by PeftModel.from_pretrained or "
            "AutoPeftModelForCausalLM."
        )
    layer = next((m for m in model.modules() if isinstance(m, LoraLayer)), None)
    active = [] if layer is None or layer.disable_adapters else layer.active_adapters
    whole = any(getattr(config, "modules_to_save", None) for config in configs.values())
    wrapper = next((m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)), None) if whole else None
    if wrapper is not None and layer is not None and wrapper.disable_adapters != layer.disable_adapters:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.enable_adapters(not layer.disable_adapters)
    put_rope(model, configs, active)
