"""A longer RoPE for a model: computed from the base's, checked, and written as its readers will read it.

What is written follows what readers of `config.json` derive (vLLM's rule beside transformers'):

| type             | `max_position_embeddings` | `original_max_position_embeddings` | length a reader derives   |
|------------------|---------------------------|------------------------------------|---------------------------|
| linear, dynamic  | the original length       | -                                  | original x factor         |
| yarn, llama3,    | the target length         | the original length                | `max_position_embeddings` |
| longrope         |                           |                                    |                           |
| abf ("default")  | the target length         | -                                  | `max_position_embeddings` |

A linear RoPE's original length is in the config as `original_max_position_embeddings` too, which these readers don't
look at: it says to this module which of the two a linear config's `max_position_embeddings` is.

Gemma 3 is the exception: its `max_position_embeddings` counts the factor already, and vLLM knows that family by
name. Command R's `model_max_length` overrides `max_position_embeddings` in vLLM, so that both are written.

vLLM reads longrope's attention factor off the two lengths and not off `attention_factor`, and serves short text by the
long factors, too, once it is let beyond the original length. Of dynamic RoPE it takes the length and nothing else: no
config says it to both (`vllm_overrides`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from transformers.utils import logging

from .state import (
    ABF,
    CARRY_ORIGINAL,
    GLOBAL_LAYERS,
    ROPE_TYPES,
    RopeScaling,
    current_rope,
    is_nested,
    readings,
    text_config,
    write_rope,
)

logger = logging.get_logger(__name__)

AUTO = "auto"
"""The base's own type where it is scaled already, else a larger theta (`natural_type`)."""
ABF_EXPONENT = 1.5
"""The ratio of thetas is the ratio of lengths to this power, so that two extensions are one. Untrained, 1.0 and 2.0
are worse on SmolLM2-135M at 32,768 and at 65,536 tokens, over the last 2,048 (`benchmarks/results/pretrained.csv`)."""
# What a RoPE has besides its scaling, and keeps under any.
_LASTING = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


def natural_type(base: RopeScaling) -> str:
    """The RoPE type that "auto" stands for: the base's own where it is scaled already, else "abf", a larger theta.

    Trained densely, SmolLM2-135M (8,192 -> 32,768 and 65,536 tokens, books and math, test text) ends 0.3 to 1.3% below
    its perplexity by YaRN, over the last 2,048 tokens 0.2 to 1.8%, with each of two or three seeds
    (benchmarks/results/pretrained.csv); and any reader serves it, RoPE staying of the plain kind. Untrained, YaRN is
    the better one by far. A config with an original length of its own, Phi-3's, takes longrope only.
    """
    if base.rope_type != "default":
        return base.rope_type
    return ABF if base.original_max_position_embeddings is None else "longrope"


def check_rope_type(rope_type: str) -> None:
    """Raise a `ValueError` unless it is "auto" or one of `ROPE_TYPES`."""
    if rope_type not in (AUTO, *ROPE_TYPES):
        raise ValueError(f"unknown rope_type {rope_type!r}; supported: {AUTO}, {', '.join(ROPE_TYPES)}.")


def scaled_rope(
    config: Any,
    target_length: int | None = None,
    rope_type: str = AUTO,
    rope_parameters: dict[str, Any] | None = None,
    base_length: int | None = None,
    *,
    base: RopeScaling | None = None,
) -> RopeScaling:
    """The RoPE that stretches a model to `target_length` tokens.

    Args:
        config: the model's config (its dimensions are needed for longrope and for validation).
        target_length: the length to reach, in tokens. May be left out if `rope_parameters` has a factor.
        rope_type: one of `ROPE_TYPES`, or "auto" for `natural_type`. A base that is scaled already is extended in its
            own type only; "abf" raises `rope_theta` by the ratio of lengths to the power of `ABF_EXPONENT`.
        rope_parameters: explicit parameters (with `rope_type`), merged over the base's `rope_theta` and
            `partial_rotary_factor`. They may name a type other than the base's.
        base_length: overrides the original length read from the config: the length that the RoPE of the config, its
            scaling aside, was trained at. A base that was extended by a larger theta was trained at what it reaches.
        base: the state to start from, if it is not the config's present one.

    Raises:
        ValueError: a target within reach already, another type than a scaled base's, incomplete parameters, or a
            linear base whose original length its config leaves open.
    """
    config = text_config(config)
    base = base if base is not None else current_rope(config)
    given = _flat(base, rope_parameters) if rope_parameters is not None else {}
    original, reached = only_reading(config, base, base_length or given.get("original_max_position_embeddings"))
    if rope_parameters is not None:
        return _explicit(config, base, original, target_length, given)

    if target_length is None:
        raise ValueError("RoPE scaling needs a target_length, or rope_parameters with a factor.")
    check_rope_type(rope_type)
    if rope_type == AUTO:
        rope_type = natural_type(base)
    if target_length <= reached:
        raise ValueError(
            f"target_length={target_length} is no extension: this base reaches {reached} tokens already "
            f"(original length {original}, RoPE type {base.rope_type!r}). Ask for more, leave target_length unset to "
            "train without a RoPE change, or pass base_length if the model was trained on shorter text."
        )
    _check_type(config, base, rope_type)
    if base.rope_type not in ("default", rope_type):
        raise ValueError(
            f"this base is scaled by {base.rope_type!r} RoPE; {rope_type!r} on top of it would replace the "
            "frequencies it was trained with (reported for linear over llama3: perplexity 10 -> 976). "
            f'Pass rope_type="{base.rope_type}" to extend it in its own type, or explicit rope_parameters.'
        )
    if rope_type == "dynamic" and base.counts_factor:
        raise ValueError(
            "dynamic RoPE computes from max_position_embeddings as the original length, and this family's readers "
            "take it for the extended one: no config says both. Pass another rope_type."
        )
    parameters = {k: v for k, v in base.parameters.items() if v is not None}
    if rope_type == ABF:
        parameters["rope_theta"] = parameters["rope_theta"] * (target_length / original) ** ABF_EXPONENT
        return _validated(config, base.with_parameters(parameters, target_length))
    factor = _factor(target_length, original)
    if base.rope_type != "default":
        parameters.pop("attention_factor", None)  # belonged to the old length; readers derive the new one
    parameters |= {"rope_type": rope_type, "factor": factor}
    if rope_type in CARRY_ORIGINAL:
        parameters["original_max_position_embeddings"] = original
    if rope_type == "llama3":
        parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | parameters
    if rope_type == "longrope":
        # From what a base has to what the target needs by the ratio of the ramps of both lengths, in which the lengths
        # between them cancel: the way to a length doesn't matter.
        before = _longrope_ramp(config, parameters, original, reached / original)
        after = _longrope_ramp(config, parameters, original, target_length / original)
        old = parameters.get("long_factor") or before
        parameters["long_factor"] = [a * c / b for a, b, c in zip(old, before, after, strict=True)]
        parameters.setdefault("short_factor", [1.0] * len(after))
    return _validated(config, _written(base, parameters, original, target_length))


def only_reading(config: Any, base: RopeScaling, base_length: int | None = None) -> tuple[int, int]:
    """The original length and the length reached by now, where a config says which they are (`readings`).

    Raises:
        ValueError: it leaves that open.
    """
    found = readings(config, base, base_length)
    if len(found) > 1:
        either = ", or ".join(f"{reached:,} tokens, from originally {original:,}" for original, reached in found)
        raise ValueError(
            f"this base has linear RoPE of factor {base.parameters['factor']:g} and {base.max_position_embeddings:,} "
            f"max_position_embeddings, and its config doesn't say whether they count the factor: it reaches {either}. "
            f"Its publisher does: pass base_length={found[0][0]} or base_length={found[1][0]}, or write that into its "
            "config as original_max_position_embeddings."
        )
    return found[0]


def _check_type(config: Any, base: RopeScaling, rope_type: str) -> None:
    """Raise a `ValueError` for what no RoPE type extends, and for a type that vLLM would serve as another one."""
    if base.rope_type not in ("default", *ROPE_TYPES):
        raise ValueError(
            f"this base has RoPE of type {base.rope_type!r}, whose frequencies each of {', '.join(ROPE_TYPES)} would "
            "replace. Leave target_length unset to train without a RoPE change."
        )
    if base.parameters.get("alpha") is not None:
        raise ValueError(
            "this base is scaled by a fixed NTK `alpha`, which readers take before any factor: it can't be extended "
            "by one. Leave target_length unset, or set alpha yourself in config.json."
        )
    if rope_type in ("yarn", ABF):
        return
    kept = f'{rope_type!r} RoPE would be served wrong by vLLM: it %s. Pass rope_type="yarn".'
    if is_nested(base.rope_parameters) and not base.counts_factor and rope_type in ("linear", "dynamic"):
        raise ValueError(
            kept % "makes the table of the sliding layers' positions of max_position_embeddings, which keeps the "
            "original length under this type"
        )
    if base.parameters.get("mrope_section"):
        raise ValueError(kept % "keeps the position axes of this model (mrope_section) under YaRN only")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(kept % "takes any scaled RoPE of a model with latent attention (kv_lora_rank) for YaRN")


def _factor(target_length: int, original: int) -> float:
    """The ratio, such that vLLM's `int(original * factor)` is not a token short (113 of 100: 112.999...)."""
    factor = target_length / original
    return factor if int(original * factor) >= target_length else math.nextafter(factor, math.inf)


def _written(base: RopeScaling, parameters: dict[str, Any], original: int, target_length: int) -> RopeScaling:
    """The state with these parameters, and the lengths as the module's table has them."""
    rope_type = parameters["rope_type"]
    keeps_original = rope_type in ("linear", "dynamic") and not base.counts_factor
    scaling = base.with_parameters(parameters, original if keeps_original else target_length)
    if rope_type == "linear" and keeps_original:
        scaling = replace(scaling, original_max_position_embeddings=original)  # evidence for `readings`
    return scaling


def _flat(base: RopeScaling, rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """Explicit parameters, those of the layers that are scaled."""
    given = copy.deepcopy(dict(rope_parameters))
    if is_nested(given):
        others = {k for k, v in given.items() if k != GLOBAL_LAYERS and v != base.rope_parameters.get(k)}
        if others or GLOBAL_LAYERS not in given:
            raise ValueError(f"only {GLOBAL_LAYERS!r} layers can be scaled; got {', '.join(sorted(given))}.")
        given = given[GLOBAL_LAYERS]
    return given


def _explicit(
    config: Any, base: RopeScaling, original: int, target_length: int | None, given: dict[str, Any]
) -> RopeScaling:
    known = [kind for kind in ("default", *ROPE_TYPES) if kind != ABF]
    if given.get("rope_type") == ABF:
        raise ValueError(
            f"{ABF!r} is no type of transformers' rope_parameters: pass rope_type={ABF!r} alone, or a theta of your "
            'own by rope_parameters={"rope_type": "default", "rope_theta": ...}.'
        )
    if "rope_type" not in given:
        raise ValueError(f"rope_parameters needs a rope_type (one of {', '.join(known)}).")
    rope_type = given["rope_type"]
    kept: dict[str, Any] = {k: base.parameters[k] for k in _LASTING if k in base.parameters}
    parameters = {**kept, **given}
    if rope_type != "default":
        _check_type(config, base, rope_type)
    if base.rope_type not in ("default", rope_type):
        logger.warning(
            f"These rope_parameters put {rope_type!r} RoPE in the place of the base's {base.rope_type!r}, whose "
            "frequencies it was trained with (reported for linear over llama3: perplexity 10 -> 976)."
        )
    if rope_type in CARRY_ORIGINAL:
        original = int(parameters.setdefault("original_max_position_embeddings", original))
    if rope_type != "default" and parameters.get("factor") is None:
        if target_length is None:
            raise ValueError("rope_parameters without a factor needs a target_length.")
        parameters["factor"] = _factor(target_length, original)
    stretched = round(original * float(parameters.get("factor") or 1.0))
    if target_length is None:
        target_length = stretched
    # A factor above the target's is a choice (room for a later stage); one below it is a mistake. llama3 is left
    # alone: the family's own checkpoints declare 131,072 tokens with a factor of 8 over 8,192.
    if target_length > stretched and rope_type not in ("llama3", "longrope", "default"):
        raise ValueError(
            f"rope_parameters reach {stretched} tokens (factor {parameters.get('factor')} x {original}), which is "
            f"less than target_length={target_length}."
        )
    if rope_type == "longrope":
        ratio = target_length / original
        if not math.isclose(parameters["factor"], ratio, rel_tol=1e-3):
            raise ValueError(
                f"longrope's factor {parameters['factor']} is not target_length / original length = {ratio:g}: "
                "transformers would take the one for its attention factor and vLLM the other. Leave the factor out."
            )
        if parameters.get("attention_factor") is not None:
            raise ValueError("vLLM does not read longrope's attention_factor. Leave it out: both derive it alike.")
    return _validated(config, _written(base, parameters, original, target_length))


def _rotary_dim(config: Any, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))


def vllm_overrides(config: Any, scaling: RopeScaling) -> dict[str, Any] | None:
    """The `--hf-overrides` by which vLLM serves a dynamic RoPE; `None` for the types that it serves as they are.

    vLLM 0.33 takes texts of original x factor tokens, makes a table of the original length, and doesn't scale its
    frequencies. Here they are for every text what transformers has for one of the full length, a larger `rope_theta`.
    """
    if scaling.rope_type != "dynamic":
        return None
    parameters = scaling.parameters
    dim, factor = _rotary_dim(text_config(config), parameters), parameters["factor"]
    theta = parameters["rope_theta"] * (factor * factor - (factor - 1)) ** (dim / (dim - 2))
    kept = {key: parameters[key] for key in _LASTING if key in parameters}
    plain = scaling.with_parameters({**kept, "rope_type": "default", "rope_theta": theta}, scaling.length)
    read = ("max_position_embeddings", "model_max_length", "rope_parameters")
    return {key: value for key, value in plain.to_dict().items() if key in read and value is not None}


def _longrope_ramp(config: Any, parameters: dict[str, Any], original: int, factor: float) -> list[float]:
    """YaRN's per-dimension interpolation (arXiv 2309.00071, section 3.2) as longrope's divisors of the frequencies.

    Returns `rotary_dim // 2` values: 1 for dimensions that turn more than 32 times within `original` tokens, `factor`
    for those that turn less than once, and in between what the ramp gives.
    """
    dim, theta = _rotary_dim(config, parameters), float(parameters["rope_theta"])

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(32)), 0)
    high = min(math.ceil(dimension(1)), dim - 1)
    ramp = []
    for i in range(dim // 2):
        interpolated = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        ramp.append(1.0 / (interpolated / factor + 1.0 - interpolated))
    return ramp


def _validated(config: Any, scaling: RopeScaling) -> RopeScaling:
    """Run transformers' own checks on a copy of the config that carries `scaling`."""
    parameters = scaling.parameters
    if scaling.rope_type == "longrope":
        want = _rotary_dim(config, parameters) // 2
        for key in ("short_factor", "long_factor"):
            if len(parameters.get(key) or ()) != want:
                raise ValueError(f"longrope needs {key} with {want} numbers, got {len(parameters.get(key) or ())}.")
    trial = copy.deepcopy(config)
    write_rope(trial, scaling)
    try:
        trial.validate_rope()
    except (KeyError, TypeError) as error:
        raise ValueError(f"rope_parameters {parameters} are not valid: {error}") from error
    return scaling
