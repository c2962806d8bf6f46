"""Whether an adapter's stored weights fit the model they are put on, told before any of them is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.utils import logging

from .config import LongLoraConfig, StoredShapes
from .merging import merged_adapters
from .resolve import input_embedding

logger = logging.get_logger(__name__)

_ROPE_SEEN_TO = ContextVar("whether whoever loads other weights for an adapter sees to its RoPE", default=False)


@contextmanager
def rope_seen_to() -> Iterator[None]:
    """Where other weights are loaded for an adapter by someone who gives it their RoPE, too."""
    token = _ROPE_SEEN_TO.set(True)
    try:
        yield
    finally:
        _ROPE_SEEN_TO.reset(token)


def refuse_foreign_rope(model: nn.Module, config: LongLoraConfig, adapter_name: str) -> None:
    """Before weights are loaded for an adapter that has some: under which RoPE were these trained?

    PEFT's `load_adapter` under a name that is taken reads no config, and so does a trainer's resumption by it, whose
    checkpoint is of the same RoPE: an adapter that is being trained is warned of, a frozen one refused.

    Raises:
        ValueError: the adapter is merged into the base, or frozen.
    """
    if adapter_name in merged_adapters(model):
        raise ValueError(
            f"adapter {adapter_name!r} is merged into the base, and other weights for it would be added to the old "
            "ones. Call unmerge_adapter() first."
        )
    if _ROPE_SEEN_TO.get():
        return
    if config.inference_mode:
        raise ValueError(
            f"the name {adapter_name!r} is taken, and load_adapter would put other weights under that adapter's RoPE. "
            "hf_longlora.tuner.hotswap_adapter takes weights and RoPE; or load them under a name of their own."
        )
    logger.warning(
        f"Other weights have been loaded for adapter {adapter_name!r}, whose RoPE stays as it is: right for a "
        "checkpoint of the same run. hf_longlora.tuner.hotswap_adapter takes weights and RoPE."
    )


def check_ranks(config: LongLoraConfig) -> None:
    """Raise a `ValueError` on ranks that a file's weights don't have, before memory is taken for them."""
    stored = vars(config).get("_stored_shapes")
    if stored is None:
        return
    pattern: Any = config.rank_pattern
    ranks = [config.r, *(pattern.values() if isinstance(pattern, dict) else ())]
    widest = max((size for shape in stored.values() for size in shape), default=0)
    most = max((shape[0] for key, shape in stored.items() if ".lora_" in key and "_A" in key), default=widest)
    if any(type(rank) is not int or not 0 < rank <= (widest if pattern else most) for rank in ranks):
        raise ValueError(
            f"the ranks of adapter_config.json (r={config.r!r}, rank_pattern={pattern!r}) are not those of the "
            f"weights, which have {most} at most."
        )


def check_fit(tuner: BaseTuner, adapter_name: str, stored: StoredShapes) -> None:
    """Raise one `ValueError` unless the weights of an adapter are what this model's adapter needs.

    Args:
        tuner: What has put the adapter on the model.
        adapter_name: The adapter.
        stored: The shapes in its file.
    """
    # Names as in a file: "base_model.model." and the base model's own.
    state: Any = get_peft_model_state_dict(tuner, adapter_name=adapter_name, save_embedding_layers=False)
    needed = {f"base_model.{key}": tuple(tensor.shape) for key, tensor in state.items()}
    # PEFT saves biases and resized embeddings of the base with an adapter, the latter in more than one place.
    suffix = f".{adapter_name}"  # of parameters that are kept by the adapter's name, which a file has not
    known = {
        f"base_model.{key.removesuffix(suffix)}": tuple(tensor.shape) for key, tensor in tuner.state_dict().items()
    } | needed
    missing = sorted(needed.keys() - stored.keys())
    # Nor does it write all that a variant of LoRA keeps beside its layers in every case.
    places = (
        *(f"{key.rpartition('.')[0]}." for key in needed),
        *(f"{key.partition('.lora_')[0]}.lora_" for key in needed),
    )
    foreign = sorted(key for key in stored.keys() - known.keys() if not key.startswith(places))
    unequal = sorted(key for key in stored.keys() & known.keys() if stored[key] != known[key])
    if unequal:
        key = unequal[0]
        here, there = known[key], stored[key]
        vocabulary = ""
        if (
            len(here) == len(there) == 2
            and here[1] == there[1]
            and here[0] != there[0]
            and _is_vocabulary(tuner.model, here)
        ):
            vocabulary = f" It was trained with {there[0]:,} tokens, and this model has {here[0]:,}: " + (
                f"call model.resize_token_embeddings({there[0]}) on the base first."
                if there[0] > here[0]
                else "load it on a base whose embeddings were not resized."
            )
        raise ValueError(
            f"the adapter does not fit this model: {key} has shape {there} in its file and {here} here"
            + (f", and {len(unequal) - 1} more differ." if len(unequal) > 1 else ".")
            + (vocabulary or " Load it on the model it was trained on.")
        )
    if missing or foreign:
        raise ValueError(
            "the adapter's weights are not what its adapter_config.json and this model call for: "
            + "; ".join(
                f"{len(keys)} {words}, such as {keys[0]}"
                for keys, words in ((missing, "missing"), (foreign, "unknown"))
                if keys
            )
            + ". The file is damaged, or belongs to another config or base."
        )


def _is_vocabulary(model: nn.Module, shape: tuple[int, ...]) -> bool:
    weight = getattr(input_embedding(model), "weight", None)
    return weight is not None and tuple(weight.shape) == shape
