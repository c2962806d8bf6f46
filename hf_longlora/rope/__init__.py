"""RoPE scaling: read it from a config, compute a longer one, put it on a live model, take it off again.

Arithmetic on configs (`state`, `scale`) plus one in-place operation (`live.apply_rope`). Lengths are in tokens; a
factor is a ratio of lengths. Total factors are cumulative and exact: `target_length / original_length`, never a
product of the steps that led there.
"""

from .live import apply_rope, forget_lengths, restore_frequencies, rotary_modules
from .scale import AUTO, check_rope_type, natural_type, only_reading, scaled_rope, vllm_overrides
from .state import (
    ABF,
    CARRY_ORIGINAL,
    GLOBAL_LAYERS,
    NATIVE_WINDOW,
    ROPE_TYPES,
    WITH_HISTORY,
    RopeScaling,
    current_rope,
    find_rope,
    native_window,
    reach,
    readings,
    rope_factor,
    type_over,
    write_length,
    write_rope,
)

__all__ = [
    "ABF",
    "AUTO",
    "CARRY_ORIGINAL",
    "GLOBAL_LAYERS",
    "NATIVE_WINDOW",
    "ROPE_TYPES",
    "WITH_HISTORY",
    "RopeScaling",
    "apply_rope",
    "check_rope_type",
    "current_rope",
    "find_rope",
    "forget_lengths",
    "native_window",
    "natural_type",
    "only_reading",
    "reach",
    "readings",
    "restore_frequencies",
    "rope_factor",
    "rotary_modules",
    "scaled_rope",
    "type_over",
    "vllm_overrides",
    "write_length",
    "write_rope",
]
