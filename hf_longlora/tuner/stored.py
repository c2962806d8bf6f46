"""Whether an adapter's stored weights fit the model they are put on, told before any is loaded, and making it fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.utils import logging

from ..modules import input_embedding, output_head, unwrapped, walk
from .config import LongLoraConfig, StoredShapes
from .merging import merged_adapters

logger = logging.get_logger(__name__)

_ROPE_SEEN_TO = ContextVar("whether whoever loads other weights for an adapter sees to its RoPE", default=False)


@contextmanager
def rope_seen_to() -> Iterator[None]:
    """Inside, weights may be loaded for an adapter: the caller gives it the RoPE of these weights, too."""
    token = _ROPE_SEEN_TO.set(True)
    try:
        yield
    finally:
        _ROPE_SEEN_TO.reset(token)


def refuse_foreign_rope(model: nn.Module, config: LongLoraConfig, adapter_name: str) -> None:
    """Before weights are loaded for an adapter that has some: were these trained under its RoPE, with its settings?

    PEFT's `load_adapter` under a name that is taken reads no config, and so does a trainer's resumption by it. The
    config beside the weights is read here. Of weights that come without a folder (`set_peft_model_state_dict`) nothing
    is known: an adapter that is being trained is warned of, a frozen one refused.

    Raises:
        ValueError: the adapter is merged into the base, the weights are of another RoPE, rank, scaling or modules, or
            nothing says of which and the adapter is frozen.
    """
    if adapter_name in merged_adapters(model):
        raise ValueError(
            f"adapter {adapter_name!r} is merged into the base, and other weights for it would be added to the old "
            "ones. Call unmerge_adapter() first."
        )
    if _ROPE_SEEN_TO.get():
        return
    source = _being_loaded()
    if source is not None:
        model_id, download = source
        differing = differences(LongLoraConfig.from_pretrained(model_id, **download), config)
        if differing:
            raise ValueError(
                f"the name {adapter_name!r} is taken, and load_adapter would put the weights of {model_id} under that "
                f"adapter's settings: {'; '.join(differing)}. hf_longlora.tuner.hotswap_adapter takes weights and "
                "RoPE; or load them under a name of their own."
            )
        return
    if config.inference_mode:
        raise ValueError(
            f"adapter {adapter_name!r} has weights already, and nothing says under which RoPE the other ones were "
            "trained. hf_longlora.tuner.hotswap_adapter takes weights and RoPE; or load them under a name of their "
            "own."
        )
    logger.warning(
        f"Other weights have been loaded for adapter {adapter_name!r}, whose RoPE stays as it is: right for a "
        "checkpoint of the same run. hf_longlora.tuner.hotswap_adapter takes weights and RoPE."
    )


def _being_loaded() -> tuple[Any, dict[str, Any]] | None:
    """The folder or Hub id that PEFT's `load_adapter` is loading, and the options of its download; `None` elsewhere.

    Under a name that is taken PEFT reads no config, and asks the tuner for nothing but names for the tensors it has
    read: what they were trained under stands beside them, in a folder that no hook is told of. So its arguments are
    read off its frame; where there is none (a `load_adapter` that is wrapped), the weights are of an unknown RoPE.
    A tensor among the weights could say the RoPE; other readers of the file would have to be told to pass it over.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not PeftModel.load_adapter.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else (frame.f_locals["model_id"], frame.f_locals["hf_hub_download_kwargs"])


# What the weights alone don't say, and another adapter's weights leave as it is.
_KEPT = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules")


def differences(new: PeftConfig, own: LongLoraConfig, rope: bool = True) -> list[str]:
    """The settings in which an adapter, `new`, differs from one on a model, `own`, that would take its weights.

    `rope` says whether the RoPE stays, too.
    """
    if not isinstance(new, LongLoraConfig):
        return [f"a {type(new).__name__} adapter, not a LONGLORA one"]
    found = [f"{key} {getattr(new, key)} for {getattr(own, key)}" for key in _KEPT if _of(new, key) != _of(own, key)]
    theirs, ours = (config.rope or config.base_rope for config in (new, own))
    if rope and theirs != ours:
        found.append(f"RoPE {_rope(theirs)} for {_rope(ours)}")
    return found


def _of(config: LongLoraConfig, key: str) -> Any:
    value = getattr(config, key)
    return set(value) if isinstance(value, list) else value


def _rope(stored: dict[str, Any] | None) -> Any:
    return "unknown" if stored is None else stored["rope_parameters"]


def check_fit(tuner: BaseTuner, adapter_name: str, stored: StoredShapes) -> None:
    """Raise one `ValueError` unless an adapter's `stored` weights are what its tuner has put on the model."""
    # Names as in a file: "base_model.model." and the base model's own.
    state: Any = get_peft_model_state_dict(tuner, adapter_name=adapter_name, save_embedding_layers=False)
    needed = {f"base_model.{key}": tuple(tensor.shape) for key, tensor in state.items()}
    # PEFT saves biases and resized embeddings of the base with an adapter, the latter in more than one place.
    suffix = f".{adapter_name}"  # parameters kept under the adapter's name, which a file leaves out
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
        more = f", and {len(unequal) - 1} more differ" if len(unequal) > 1 else ""
        wanted, rows = stored_vocabulary(tuner.model, stored), _rows(tuner.model)
        cure = "Load it on the model it was trained on."
        if wanted is not None and rows is not None and wanted != rows:
            cure = (
                f"It was trained with {wanted:,} tokens, and this model has {rows:,}: call "
                f"model.resize_token_embeddings({wanted}) on the base first."
            )
        raise ValueError(
            f"the adapter does not fit this model: {key} has shape {stored[key]} in its file and {known[key]} "
            f"here{more}. {cure}"
        )
    wrong = {"missing": missing, "unknown": foreign}
    if found := [f"{len(keys)} {words}, such as {keys[0]}" for words, keys in wrong.items() if keys]:
        raise ValueError(
            f"the adapter's weights are not what its adapter_config.json and this model call for: {'; '.join(found)}. "
            "The file is damaged, or belongs to another config or base."
        )


def stored_vocabulary(model: nn.Module, stored: StoredShapes) -> int | None:
    """The tokens of the base that an adapter was trained on; `None` where its file doesn't tell."""
    for name in _vocabularies(model):
        for part, shape in _parts(stored, name):
            if part == "lora_embedding_A":
                return shape[1]
            if _is_whole(part):
                return shape[0]
    return None


def check_tokens(model: nn.Module, config: LongLoraConfig) -> None:
    """Raise a `ValueError` on tokens to be trained that the model's embeddings don't have."""
    rows, trained = _rows(model), _trained_tokens(config)
    if rows is not None and trained and max(trained) >= rows:
        wanted = stored_vocabulary(model, config.stored_shapes or {}) or max(trained) + 1
        raise ValueError(
            f"trainable_token_indices has token {max(trained):,}, and this model has {rows:,} tokens: call "
            f"model.resize_token_embeddings({wanted}) on the base first."
        )


def trained_vocabulary(model: nn.Module, config: PeftConfig, tokens: int = 0) -> tuple[int, bool] | None:
    """The vocabulary that an adapter was trained with, if not its base's, and whether it has all rows that were added.

    Where its weights don't tell, the vocabulary is large enough for `trainable_token_indices` and for the `tokens` of
    its tokenizer, as `AutoPeftModel` has it.
    """
    rows = _rows(model)
    if rows is None:
        return None
    trained, stored = _trained_tokens(config), getattr(config, "stored_shapes", None) or {}
    wanted = stored_vocabulary(model, stored) or max(rows, tokens, *(token + 1 for token in trained))
    if wanted == rows:
        return None
    embedding, head = input_embedding(model), output_head(model)
    names = _vocabularies(model)[: 1 if head is None or head.weight is embedding.weight else 2]
    missing = [name for name in names if not any(_is_whole(part) for part, _ in _parts(stored, name))]
    if wanted < rows or (missing == names[:1] and trained.issuperset(range(rows, wanted))):
        missing = []
    if missing:
        logger.warning(
            f"The adapter was trained with {wanted:,} tokens, its base has {rows:,}, and the adapter holds no rows of "
            f"{' and '.join(missing)} for those that were added: they are drawn anew, around the mean of the others. "
            "An adapter has them if it is saved by save_pretrained(folder, save_embedding_layers=True)."
        )
    return wanted, not missing


def fit_vocabulary(model: Any, config: PeftConfig, tokens: int = 0) -> None:
    """Give a base the vocabulary that an adapter was trained with; the arguments are `trained_vocabulary`'s."""
    found = trained_vocabulary(model, config, tokens)
    if found is not None:
        wanted, complete = found
        model.resize_token_embeddings(wanted, mean_resizing=not complete)


def _parts(stored: StoredShapes, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What an adapter's file has of a module: names within it, and shapes."""
    prefix = f"base_model.model.{name}."
    yield from ((key.removeprefix(prefix), shape) for key, shape in stored.items() if key.startswith(prefix))


def _is_whole(part: str) -> bool:
    """Whether it is a weight of an embedding or a head as such, with a row for each token."""
    return part.endswith("weight") and "lora_" not in part


def _vocabularies(model: nn.Module) -> list[str]:
    """Names of the input embedding and the output head, as the base has them."""
    found = [unwrapped(module) for module in (input_embedding(model), output_head(model))]
    names = {id(module): name for name, module in walk(model)}
    return [names[id(module)] for module in found if id(module) in names]


def _rows(model: nn.Module) -> int | None:
    weight = getattr(unwrapped(input_embedding(model)), "weight", None)
    return None if weight is None else weight.shape[0]


def _trained_tokens(config: PeftConfig) -> set[int]:
    """The tokens of `trainable_token_indices`, which is a list, or a list for each of some modules."""
    given: Any = getattr(config, "trainable_token_indices", None) or []
    return {token for tokens in (given.values() if isinstance(given, dict) else [given]) for token in tokens}
