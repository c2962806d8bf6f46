"""Extend a model's context cheaply: LongLoRA (arXiv 2309.12307) for transformers, PEFT and TRL.

Importing it registers `attn_implementation="s2attn"` with transformers and the adapter type LONGLORA with PEFT.
"""

from . import attention, tuner
from .attention import S2AttentionConfig, s2_attention, s2_attention_mode, set_s2_attention
from .evaluation import loss_by_position, passkey_accuracy, perplexity_by_length
from .hub import PushAdapterCallback, export_adapter
from .planning import plan_run
from .trainer import ContextStage, LongLoraSFTConfig, LongLoraSFTTrainer
from .tuner import LongLoraConfig, LongLoraModel

__version__ = "0.1.0"

attention.register()
tuner.register()

__all__ = [
    "ContextStage",
    "LongLoraConfig",
    "LongLoraModel",
    "LongLoraSFTConfig",
    "LongLoraSFTTrainer",
    "PushAdapterCallback",
    "S2AttentionConfig",
    "export_adapter",
    "loss_by_position",
    "passkey_accuracy",
    "perplexity_by_length",
    "plan_run",
    "s2_attention",
    "s2_attention_mode",
    "set_s2_attention",
]
