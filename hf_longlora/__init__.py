"""Extend a model's context cheaply: LongLoRA (arXiv 2309.12307) for transformers, PEFT and TRL.

Importing it registers `attn_implementation="s2attn"` with transformers and the adapter type LONGLORA with PEFT. What
needs more than these two (TRL, datasets, rich) is imported when its name is first used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import S2AttentionConfig, s2_attention, s2_attention_mode, set_s2_attention
    from .evaluation import long_perplexity, loss_by_position, passkey_accuracy, perplexity_by_length, ruler_accuracy
    from .hub import PushAdapterCallback, export_adapter
    from .planning import plan_run
    from .schedule import ContextStage
    from .trainer import LongLoraSFTConfig, LongLoraSFTTrainer
    from .tuner import LongLoraConfig, LongLoraModel

__version__ = "0.1.0"

__all__ = [
    "ContextStage",
    "LongLoraConfig",
    "LongLoraModel",
    "LongLoraSFTConfig",
    "LongLoraSFTTrainer",
    "PushAdapterCallback",
    "S2AttentionConfig",
    "export_adapter",
    "long_perplexity",
    "loss_by_position",
    "passkey_accuracy",
    "perplexity_by_length",
    "plan_run",
    "ruler_accuracy",
    "s2_attention",
    "s2_attention_mode",
    "set_s2_attention",
]

ROOMS = ("attention", "schedule", "tuner", "planning", "evaluation", "hub", "trainer")
"""Where public names live, those first that load least."""


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return import_module(f".{name}", __name__)
    if name in __all__:
        for room in ROOMS:
            if name in (module := import_module(f".{room}", __name__)).__all__:
                return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *ROOMS})


def register() -> None:
    """Make "s2attn" and LONGLORA known to transformers and PEFT, as the import does. Idempotent."""
    from . import attention, tuner

    attention.register()
    tuner.register()


if "hf_longlora_command" not in sys.modules:  # which registers before a command runs, and not to show its help
    register()
