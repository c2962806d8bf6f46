"""What vLLM derives from a saved model's `config.json`: the longest text, frequencies, attention factor.

Its rules written down from the source of 0.33: `_get_and_verify_max_len` (vllm/config/model.py), `get_rope` and the
classes that it chooses from (vllm/model_executor/layers/rotary_embedding/). `tests/third_party/vllm_serves.py` holds
them against vLLM itself.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Served:
    default_length: int
    """Tokens without --max-model-len."""
    longest: int
    """The largest --max-model-len that is taken."""
    positions: int
    """Positions for which there is a cosine: a longer text reads beyond the table."""
    inv_freq: torch.Tensor
    attention_factor: float


def served(config: Any, layer_type: str = "full_attention") -> Served:
    """What vLLM serves a loaded config's layers of a type with."""
    default_length, longest = lengths(config)
    parameters = config.rope_parameters
    if is_nested(parameters):
        parameters = parameters[layer_type]
    positions, inv_freq, factor = rotary(config, parameters)
    return Served(default_length, longest, positions, inv_freq, factor)


def is_nested(parameters: dict[str, Any]) -> bool:
    from transformers.configuration_utils import ALLOWED_LAYER_TYPES

    return set(parameters) <= set(ALLOWED_LAYER_TYPES)


def lengths(config: Any) -> tuple[int, int]:
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
    keys += ("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len")
    derived = min(value for key in keys if (value := getattr(config, key, None)) is not None)
    derived = getattr(config, "model_max_length", None) or derived
    entries = list(config.rope_parameters.values()) if is_nested(config.rope_parameters) else [config.rope_parameters]
    if "gemma3" not in config.model_type:
        factor = 1.0
        for entry in entries:
            if entry["rope_type"] not in ("longrope", "llama3", "yarn"):
                factor = entry.get("factor", factor)
        derived *= factor
    default = derived
    if any(entry["rope_type"] == "longrope" for entry in entries):
        default = getattr(config, "original_max_position_embeddings", derived)
    return int(default), int(derived)


def rotary(config: Any, parameters: dict[str, Any]) -> tuple[int, torch.Tensor, float]:
    kind, base = parameters["rope_type"], parameters["rope_theta"]
    latent = getattr(config, "kv_lora_rank", None) is not None
    if latent and kind != "default":
        kind = "deepseek_yarn"
    head = getattr(config, "qk_rope_head_dim", None) if latent else getattr(config, "head_dim", None)
    head = head or config.hidden_size // config.num_attention_heads
    dim = int(head * parameters.get("partial_rotary_factor", 1.0))
    length = config.max_position_embeddings

    def frequencies(base: float) -> torch.Tensor:
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))

    if kind == "default":
        return length, frequencies(base), 1.0
    if kind == "linear":  # positions are divided, not frequencies
        return int(length * parameters["factor"]), frequencies(base) / parameters["factor"], 1.0
    if kind == "dynamic":
        assert "alpha" not in parameters
        return length, frequencies(base), 1.0  # as if it were not scaled, though the length that is taken is
    original = parameters["original_max_position_embeddings"]
    if kind == "llama3":
        return length, llama3(frequencies(base), parameters, original), 1.0
    if kind == "longrope":
        scale = length / original
        mscale = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        mscale = parameters.get("long_mscale", mscale)
        return length, frequencies(base) / torch.tensor(parameters["long_factor"]), mscale
    assert kind in ("yarn", "deepseek_yarn"), kind
    factor = parameters["factor"]
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if kind == "deepseek_yarn":
        attention = get_mscale(factor, 1.0 if mscale is None else mscale) / get_mscale(factor, all_dim or 0.0)
    elif parameters.get("attention_factor") is not None:
        attention = parameters["attention_factor"]
    elif mscale and all_dim:
        attention = get_mscale(factor, mscale) / get_mscale(factor, all_dim)
    else:
        attention = get_mscale(factor)
    truncate = kind == "deepseek_yarn" or parameters.get("truncate", True)
    low, high = (
        dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))
        for rotations in (parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    plain = frequencies(base)
    return math.ceil(original * factor), plain / factor * (1 - kept) + plain * kept, attention


def get_mscale(scale: float, mscale: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def llama3(inv_freq: torch.Tensor, parameters: dict[str, Any], original: int) -> torch.Tensor:
    low, high, factor = (parameters[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low) if low != high else 0
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    stretched = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, stretched)
