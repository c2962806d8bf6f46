"""Extend a model's context cheaply: LongLoRA (arXiv 2309.12307) for transformers, PEFT and TRL.

Importing this package registers `attn_implementation="s2attn"` with transformers and the adapter type LONGLORA with PEFT.
"""

from . import attention
from .attention import S2AttentionConfig, s2_attention, s2_attention_mode, set_s2_attention


__version__ = "0.1.0"

attention.register()

__all__ = ["S2AttentionConfig", "s2_attention", "s2_attention_mode", "set_s2_attention"]
