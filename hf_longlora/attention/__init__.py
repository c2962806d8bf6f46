"""Shifted sparse attention: config -> segments -> kernel. Knows nothing of PEFT or TRL."""

from .config import AttentionMode, S2AttentionConfig
from .interface import (
    check_supported,
    get_s2_attention,
    register,
    s2_attention,
    s2_attention_mode,
    set_attention_mode,
    set_s2_attention,
)
from .segments import Documents, segments

__all__ = [
    "AttentionMode",
    "Documents",
    "S2AttentionConfig",
    "check_supported",
    "get_s2_attention",
    "register",
    "s2_attention",
    "s2_attention_mode",
    "segments",
    "set_attention_mode",
    "set_s2_attention",
]
