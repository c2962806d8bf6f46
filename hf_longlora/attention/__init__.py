"""Shifted sparse attention: config -> segments -> kernel. Knows nothing of PEFT or TRL."""

from .config import AttentionMode, S2AttentionConfig
from .functional import s2_attention
from .interface import register
from .segments import Documents, segments
from .switch import (
    check_skipping,
    check_supported,
    get_s2_attention,
    s2_attention_mode,
    set_attention_mode,
    set_s2_attention,
)

__all__ = [
    "AttentionMode",
    "Documents",
    "S2AttentionConfig",
    "check_skipping",
    "check_supported",
    "get_s2_attention",
    "register",
    "s2_attention",
    "s2_attention_mode",
    "segments",
    "set_attention_mode",
    "set_s2_attention",
]
