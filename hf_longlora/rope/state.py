"""The state of a model's RoPE: read from a config, written to one, and the lengths it stands for."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

ABF = "abf"
"""A larger `rope_theta` and nothing else (adjusted base frequency): in a config it is the type "default"."""
ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope", ABF)
"""The names of the ways to scale; all but `ABF` are transformers' `rope_type`, too."""
# Types whose parameters carry the original length; max_position_embeddings is then the extended one.
CARRY_ORIGINAL = ("yarn", "llama3", "longrope")
# Types whose rotary modules change their frequencies with the lengths they have seen.
WITH_HISTORY = ("dynamic", "longrope")
# The layer type that is scaled where `rope_parameters` is nested: sliding layers never see beyond their window.
GLOBAL_LAYERS = "full_attention"


@dataclass(frozen=True)
class RopeScaling:
    """A resolved state of a model's RoPE. Holds plain JSON values only; compare with `==`."""

    rope_parameters: dict[str, Any]
    """As `config.rope_parameters`: flat, or nested by layer type where the base's is."""
    max_position_embeddings: int
    original_max_position_embeddings: int | None = None
    """The config attribute of that name (Phi-3 has it, and it overrides the parameters'), which says of a linear RoPE
    that `max_position_embeddings` does not count the factor, or that it does; None where there is none."""
    counts_factor: bool = False
    """Whether `max_position_embeddings` includes a linear factor already (the Gemma 3 convention)."""
    model_max_length: int | None = None
    """The config attribute of that name (Command R has it, and vLLM reads it first); None where there is none."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RopeScaling:
        return cls(**copy.deepcopy(values))

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the layers that are scaled (a view, flat)."""
        if is_nested(self.rope_parameters):
            return self.rope_parameters[GLOBAL_LAYERS]
        return self.rope_parameters

    @property
    def rope_type(self) -> str:
        return self.parameters.get("rope_type", "default")

    @property
    def length(self) -> int:
        """Tokens that it reaches."""
        return reach(self)[1]

    def with_parameters(self, parameters: dict[str, Any], max_position_embeddings: int) -> RopeScaling:
        nested = is_nested(self.rope_parameters)
        whole = {**self.rope_parameters, GLOBAL_LAYERS: parameters} if nested else parameters
        original = self.original_max_position_embeddings
        if original is not None and "original_max_position_embeddings" in parameters:
            original = parameters["original_max_position_embeddings"]
        longest = None if self.model_max_length is None else max_position_embeddings
        return RopeScaling(copy.deepcopy(whole), max_position_embeddings, original, self.counts_factor, longest)


def is_nested(parameters: dict[str, Any]) -> bool:
    return "rope_type" not in parameters and any(isinstance(v, dict) for v in parameters.values())


def text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def current_rope(config: Any) -> RopeScaling:
    """A deep-copied snapshot of the RoPE a config describes.

    Raises:
        ValueError: the config has no RoPE, no length, no `rope_theta`, or nests its parameters without a
            `full_attention` entry.
    """
    config = text_config(config)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ValueError(
            f"model type {getattr(config, 'model_type', type(config).__name__)!r} has no RoPE (no `rope_parameters` "
            "in its config), so there is no RoPE to scale: its length is fixed by position embeddings, or free. "
            "Shifted sparse attention works on it; leave target_length and rope_parameters unset."
        )
    if getattr(config, "max_position_embeddings", None) is None:
        raise ValueError(
            f"model type {config.model_type!r} has RoPE and no `max_position_embeddings` in its config: the length "
            "that it reaches is not known, so its RoPE can't be scaled. Leave target_length and rope_parameters unset."
        )
    parameters = copy.deepcopy(dict(parameters))
    if is_nested(parameters) and not isinstance(parameters.get(GLOBAL_LAYERS), dict):
        raise ValueError(
            f"`rope_parameters` is nested by layer type ({', '.join(parameters)}) without a {GLOBAL_LAYERS!r} entry: "
            "no layer's RoPE can be scaled."
        )
    for entry in parameters.values() if is_nested(parameters) else [parameters]:
        if entry is None:  # a layer type without RoPE
            continue
        entry.setdefault("rope_type", entry.pop("type", "default"))
        if entry.get("rope_theta") is None:
            raise ValueError(
                "`rope_parameters` has no rope_theta (assigning `config.rope_scaling` drops it), and frequencies "
                "would fall back to another base silently. Set config.rope_parameters['rope_theta'] explicitly; this "
                f"model class's default is {getattr(config, 'default_theta', 'unknown')}."
            )
    return RopeScaling(
        rope_parameters=parameters,
        max_position_embeddings=int(config.max_position_embeddings),
        original_max_position_embeddings=getattr(config, "original_max_position_embeddings", None),
        counts_factor="gemma3" in getattr(config, "model_type", ""),
        model_max_length=getattr(config, "model_max_length", None),
    )


def find_rope(config: Any) -> RopeScaling | None:
    """`current_rope`, or `None` where there is no RoPE that can be read."""
    try:
        return current_rope(config)
    except ValueError:
        return None


def reach(config_or_scaling: Any, base_length: int | None = None) -> tuple[int, int]:
    """The original length and the length reached by now, both in tokens.

    The original length is `original_max_position_embeddings` for yarn, llama3, longrope and linear (the config's
    attribute first, as transformers does), `max_position_embeddings` (or a larger `model_max_length`) for default and
    dynamic, and for linear without the other. `base_length` overrides. Where a linear RoPE leaves it open, `readings`
    has both.
    """
    scaling = config_or_scaling if isinstance(config_or_scaling, RopeScaling) else current_rope(config_or_scaling)
    parameters, longest = scaling.parameters, max(scaling.max_position_embeddings, scaling.model_max_length or 0)
    stated = scaling.original_max_position_embeddings or parameters.get("original_max_position_embeddings")
    if scaling.rope_type in CARRY_ORIGINAL:
        original = int(base_length or stated or longest)
        if scaling.rope_type == "yarn":
            longest = round(original * (parameters.get("factor") or longest / original))
        return original, longest
    factor = parameters.get("factor") or 1.0
    original = stated if scaling.rope_type == "linear" and stated else longest
    if scaling.counts_factor:
        original = round(longest / factor)
    original = int(base_length or original)
    return original, longest if scaling.counts_factor else round(original * factor)


def readings(config: Any, scaling: RopeScaling | None = None, base_length: int | None = None) -> list[tuple[int, int]]:
    """What `reach` may be: one pair, or two where a config leaves open which it is.

    A linear RoPE of factor 4 beside 16,384 positions may reach 65,536 tokens (as LongLoRA's own models and Vicuna are
    written) or 16,384 (DeepSeek-Coder): transformers computes nothing from that number, so publishers write either. A
    number that the factor divides is no evidence. `original_max_position_embeddings` is, and so is a
    `max_sequence_length` of the product. Of the other types transformers or the family's convention says what it is.

    Args:
        config: The model's, which may hold evidence beside its RoPE.
        scaling: The RoPE; the config's by default.
        base_length: As for `reach`; it decides.
    """
    config = text_config(config)
    scaling = scaling if scaling is not None else current_rope(config)
    found = reach(scaling, base_length)
    factor = scaling.parameters.get("factor") or 1.0
    clear = base_length is not None or scaling.rope_type != "linear" or factor == 1 or scaling.counts_factor
    stated = scaling.original_max_position_embeddings or scaling.parameters.get("original_max_position_embeddings")
    if clear or stated or getattr(config, "max_sequence_length", None) == found[1]:
        return [found]
    return [found, (round(found[0] / factor), found[0])]


NATIVE_WINDOW = "_longlora_native_window"
"""On a model whose RoPE an adapter has changed: the `native_window` that it had before."""


def native_window(model_or_config: Any, base_length: int | None = None) -> int | None:
    """The length that a model was trained at before any scaling, in tokens; `None` where nothing says it.

    Args:
        model_or_config: A model, with a LONGLORA adapter or without, or a config.
        base_length: What is known better than by the config.
    """
    base_length = base_length or getattr(model_or_config, NATIVE_WINDOW, None)
    if base_length is not None:
        return base_length
    config = text_config(getattr(model_or_config, "config", model_or_config))
    rope = find_rope(config)
    if rope is None:
        return getattr(config, "max_position_embeddings", None)
    found = readings(config, rope)
    return found[0][0] if len(found) == 1 else None


def type_over(scaling: RopeScaling, base: RopeScaling) -> str:
    """The name among `ROPE_TYPES` of a RoPE made from another; "default" if it is unscaled."""
    theta, before = (each.parameters.get("rope_theta") for each in (scaling, base))
    return ABF if scaling.rope_type == base.rope_type == "default" and theta != before else scaling.rope_type


def rope_factor(scaling: RopeScaling, base: RopeScaling | None = None, base_length: int | None = None) -> float:
    """The total factor by which the original length is stretched, for logs; 1.0 for an unscaled RoPE.

    A larger theta (`ABF`) is told by the `base` that it was made from, and is a factor over that one's length.
    """
    if scaling.rope_type == "default":
        extended = base is not None and type_over(scaling, base) == ABF
        return scaling.length / reach(base, base_length)[0] if extended else 1.0
    factor = scaling.parameters.get("factor")
    original, longest = reach(scaling)
    return float(factor) if factor else longest / original


def write_rope(config: Any, scaling: RopeScaling) -> None:
    """Put `scaling` in a config, for a model that is loaded with it later; on a live model: `apply_rope`."""
    config = text_config(config)
    config.rope_parameters = copy.deepcopy(scaling.rope_parameters)
    config.max_position_embeddings = scaling.max_position_embeddings
    if scaling.original_max_position_embeddings is not None:
        config.original_max_position_embeddings = scaling.original_max_position_embeddings
    else:
        vars(config).pop("original_max_position_embeddings", None)
    if scaling.model_max_length is not None:
        config.model_max_length = scaling.model_max_length
    # For these types transformers multiplies by `head_dim`, set or not (Mixtral's is None): say it outright.
    if scaling.rope_type in ("dynamic", "yarn", "longrope") and getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads


def write_length(processing_class: Any, scaling: RopeScaling) -> None:
    """Let a tokenizer, or a processor's, take texts as long as a model of this RoPE: they are cut to what it says."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if getattr(tokenizer, "model_max_length", None) is not None:
        tokenizer.model_max_length = max(tokenizer.model_max_length, scaling.length)
