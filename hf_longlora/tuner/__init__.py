"""LongLoRA as a PEFT method: `LongLoraConfig`, `LongLoraModel`, and their registration with PEFT."""

from __future__ import annotations

from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

# The config class names its type when it is built, so the enum has to know it before the modules below are used.
if "LONGLORA" not in PeftType.__members__:
    extend_enum(PeftType, "LONGLORA", "LONGLORA")

from .config import LongLoraConfig
from .hotswap import hotswap_adapter
from .model import LongLoraModel, longlora_tuner


def register() -> None:
    """Make LONGLORA known to PEFT. Idempotent.

    The prefix is LoRA's, as AdaLoRA's is: the layers are LoRA's layers. Not for `PeftMixedModel`, which can't hold
    adapters that train whole modules or change the RoPE.
    """
    longlora = PeftType["LONGLORA"]
    if PEFT_TYPE_TO_TUNER_MAPPING.get(longlora) is LongLoraModel:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(longlora, None)
    PEFT_TYPE_TO_TUNER_MAPPING.pop(longlora, None)
    register_peft_method(name="longlora", config_cls=LongLoraConfig, model_cls=LongLoraModel, prefix="lora_")


__all__ = ["LongLoraConfig", "LongLoraModel", "hotswap_adapter", "longlora_tuner", "register"]
