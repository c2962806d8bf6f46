"""Checkpoints of the original LongLoRA (github.com/dvlab-research/LongLoRA) as adapters of ours.

Its scripts leave a plain LoRA, beside it a pickle of the embeddings and norms that were trained
(`trainable_params.bin`, which PEFT does not read), and the RoPE nowhere: each script works it out from the context
length it is given.
"""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from ..lookup import ORIGINAL_NAME, read_config
from ..modules import input_embedding, is_norm, meta_model, output_head, walk
from ..rope import current_rope
from ..tuner import LongLoraConfig
from ..tuner.config import check_finite
from ..tuner.stored import check_fit
from .export import PREFIX, adapter_folder, new_folder

logger = logging.get_logger(__name__)

OURS = ("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "modules_to_save")
"""Fields of a LoRA's config that are written anew."""


def import_original(
    folder: str | Path, output_dir: str | Path, *, target_length: int, base: str | None = None
) -> Path:
    """Write a checkpoint of the original LongLoRA as one adapter: LoRA, embeddings, norms, and the RoPE.

    RoPE is linear, by the whole number above `target_length` / the base's length. A plain LoRA of another trainer will
    do, too, with its `modules_to_save`, if its RoPE was scaled so. Rows of the embeddings beyond the base's vocabulary
    (the scripts add a `[PAD]`, which nothing is learned for) are left out, with a warning.

    Args:
        folder: The checkpoint, or its name on the Hub.
        output_dir: Where it goes: a new or an empty folder. Nothing is there until all is.
        target_length: The context that it was trained at, in tokens (`model_max_length` of the original scripts).
        base: The base model's name or path, where it is not the one that the checkpoint names.

    Raises:
        ValueError: if it is no such checkpoint, does not fit the base, or trained what an adapter can't hold.
        OSError: if the checkpoint or the config of the base can't be had.
    """
    files = [CONFIG_NAME, WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME, ORIGINAL_NAME]
    source = adapter_folder(folder, files, model="a whole model, which needs no import")
    values = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {values.get('peft_type')}, not a LoRA as LongLoRA's are")
    name = base or values.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder} doesn't name its base model: pass base")
    base_config = read_config(name)
    model = meta_model(base_config)
    model.name_or_path = name
    lora, whole = _weights(source)
    parts = {key.rpartition(".")[0] for key in whole}
    names = {module: path for path, module in walk(model)}
    norms = {path for module, path in names.items() if is_norm(module)}
    embeddings = {path for module, path in names.items() if isinstance(module, nn.Embedding)}
    head = names.get(output_head(model))
    vocabulary = names.get(input_embedding(model))
    others = sorted(parts - norms - embeddings - {head})
    if others:
        raise ValueError(
            f"{folder} holds {', '.join(others[:3])}{' and more' if others[3:] else ''} whole, which in {name} is "
            "neither a norm nor an embedding, and an adapter can't hold: give the base it was trained on (base)."
        )
    known = {field.name for field in fields(LoraConfig)} - set(OURS)
    rope = _rope(base_config, target_length)
    config = LongLoraConfig(
        **{key: value for key, value in values.items() if key in known},
        train_norms=bool(parts & norms),
        train_embeddings=bool(parts & embeddings),
        modules_to_save=[head] if head in parts else None,
        rope_parameters=rope,
        # The scripts take a base's max_position_embeddings for its first length, whatever its publisher meant by it.
        base_length=None if rope is None else current_rope(base_config).max_position_embeddings,
    )
    with torch.device("meta"):
        tuned: Any = get_peft_model(model, config)
    rows = base_config.get_text_config().vocab_size
    for key, weight in whole.items():
        if key.rpartition(".")[0] in {head, vocabulary} and len(weight) > rows:
            logger.warning(
                f"{key} has {len(weight):,} rows, and the vocabulary of {name} {rows:,}: {len(weight) - rows:,} for "
                "added tokens (the original scripts add [PAD]) are left out. To keep them, give a base that has "
                "been resized (resize_token_embeddings) and saved."
            )
            whole[key] = weight[:rows]
    weights = lora | {f"{PREFIX}{key}": weight for key, weight in whole.items()}
    check_fit(tuned.base_model, "default", {key: tuple(weight.shape) for key, weight in weights.items()})
    stored = tuned.peft_config["default"]
    stored.inference_mode = True
    with new_folder(Path(output_dir)) as out:
        stored.save_pretrained(out)
        copies = {key: weight.clone(memory_format=torch.contiguous_format) for key, weight in weights.items()}
        save_file(copies, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})  # takes no views
    return Path(output_dir)


def _weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """LoRA's weights, and those trained whole by their names in the base."""
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    else:
        weights = _pickled(folder / WEIGHTS_NAME)
    lora = {key: weight for key, weight in weights.items() if ".lora_" in key}
    whole = {key.removeprefix(PREFIX): weight for key, weight in weights.items() if key not in lora}  # modules_to_save
    if (folder / ORIGINAL_NAME).is_file():
        whole |= {key.removeprefix(PREFIX): weight for key, weight in _pickled(folder / ORIGINAL_NAME).items()}
    if not whole:
        logger.warning(f"{folder} has no {ORIGINAL_NAME} and nothing like it: LoRA alone is taken, and its RoPE.")
    return lora, whole


def _pickled(file: Path) -> dict[str, torch.Tensor]:
    """A state dict by torch's loader that runs no code."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged, or holds more than weights, and such a pickle is not loaded") from error
    check_finite(weights, str(file))
    return weights


def _rope(base_config: Any, target_length: int) -> dict[str, Any] | None:
    """What the original scripts set: linear by a whole factor over the base's length, or nothing."""
    rope = current_rope(base_config)
    if rope.rope_type not in ("default", "linear"):
        raise ValueError(
            f"the base has RoPE of type {rope.rope_type!r}, which the original LongLoRA's scripts never had"
        )
    length = rope.max_position_embeddings * float(rope.parameters.get("factor") or 1.0)
    if target_length <= length:
        return None
    return {"rope_type": "linear", "factor": float(math.ceil(target_length / length))}
