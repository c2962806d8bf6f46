"""What an adapter's config asks for, as names of a model's modules: what LoRA is put on, and what is trained whole."""

from __future__ import annotations

import math
import re
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..modules import (
    attention_projections,
    input_embedding,
    is_norm,
    is_projection,
    language_modules,
    output_head,
    unwrapped,
    walk,
)
from .config import LongLoraConfig, refuse_head


def resolve_modules(model: nn.Module, config: LongLoraConfig) -> None:
    """Write the names into the config: targets where it has none, and norms and embeddings to be trained whole.

    Raises:
        ValueError: the head is targeted, `embedding_rank` can't reach an embedding, an adapter would be put on
            modules that share their weights, or a config that was resolved for another model leaves some out of this.
    """
    if config.target_modules is None and not config.target_parameters:
        found: Any = attention_projections(model) or None
        config.target_modules = found
    if config.embedding_rank is not None and not config.resolved:
        _target_embeddings(model, config, config.embedding_rank)
    head = output_head(model)
    for name, module in walk(model):
        if module is head and _targeted(config, name):
            refuse_head(name)
    whole = _untaken(model, config)
    if not config.resolved:
        config.modules_to_save = [*(config.modules_to_save or ()), *whole] or None
    elif whole and not config.inference_mode and config.stored_shapes is None:  # weights that are loaded say it better
        raise ValueError(
            f"{whole[0]} would not be trained: the config has been put on another model and holds that one's names. "
            "Make a fresh LongLoraConfig for each model."
        )
    _refuse_shared(model, config)


def refuse_offloaded(model: nn.Module, config: LongLoraConfig, first: bool) -> None:
    """Raise a `ValueError` where accelerate keeps weights that an adapter would be put on elsewhere than on the model.

    PEFT puts an adapter's weights where the base's are: on the meta device, where loading does nothing, and all that
    is said is a warning. It offloads them anew for the `first` adapter that is loaded on a model with a device map,
    and then finds LoRA's weights again, but no norm's and no embedding's.
    """
    parked = {"cpu", "disk"}.intersection((getattr(model, "hf_device_map", None) or {}).values())
    anew = first and config.stored_shapes is not None and bool(parked)
    whole = (*(config.modules_to_save or ()), *_token_modules(model, config))
    for name, module in walk(model):
        empty = any(p.is_meta for p in module.parameters(recurse=False))
        offloaded = empty and (bool(parked) or hasattr(module, "_hf_hook"))  # and not a model made without numbers
        if offloaded and (name.endswith(whole) or (_targeted(config, name) and not anew)):
            raise ValueError(
                f"the weights of {name} are offloaded, and the adapter's part of it would be lost. Put the adapter on "
                "the base in memory and offload both (accelerate.cpu_offload(model) or disk_offload), or merge it "
                "(hf-longlora merge) and load the merged model with a device_map."
            )


def _token_modules(model: nn.Module, config: LongLoraConfig) -> list[str]:
    """Names of the modules of which single tokens are trained."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        return list(tokens)
    embedding = unwrapped(input_embedding(model)) if tokens else None
    return [name for name, module in walk(model) if module is embedding]


def _targeted(config: LongLoraConfig, name: str) -> bool:
    """Whether LoRA is put on a module, by PEFT's rules, which want a list of targets."""
    return config.target_modules is not None and bool(check_target_module_exists(config, name))


def _untaken(model: nn.Module, config: LongLoraConfig) -> list[str]:
    """The norms and embeddings that are to be trained whole, and that the config does not have yet."""
    users = tuple(config.modules_to_save or ())
    train_embeddings = config.train_embeddings and config.trainable_token_indices is None
    inside: list[str] = []  # names that are trained already, by LoRA or with a module the user named
    found: list[str] = []
    for name, module in language_modules(model):
        if name.startswith(tuple(f"{taken}." for taken in inside)):
            continue
        if _targeted(config, name) or name.endswith(users):
            inside.append(name)
        elif (config.train_norms and is_norm(module)) or (train_embeddings and isinstance(module, nn.Embedding)):
            found.append(name)
    return found


def _refuse_shared(model: nn.Module, config: LongLoraConfig) -> None:
    """Raise a `ValueError` if modules that share their weights (Zamba's blocks) would get an adapter each.

    Their LoRAs would all be merged into the same weights, and copies that are trained apart would be saved as one.
    """
    whole = tuple(config.modules_to_save or ())
    tied = getattr(input_embedding(model), "weight", None)  # with a head: `tie_by_module` sees to those
    first: dict[int, str] = {}
    for name, module in walk(model):
        weight = module._parameters.get("weight")
        if weight is None or weight is tied:
            continue
        if name.endswith(whole) or _targeted(config, name):
            other = first.setdefault(id(weight), name)
            if other != name:
                raise ValueError(
                    f"{name} has its weights from {other} (layers that are used again), and an adapter can't train "
                    "them: each would have its own part, and a merge would add all of them to the same weights. Leave "
                    "them out (target_modules, train_norms=False), or train without an adapter."
                )


def _target_embeddings(model: nn.Module, config: LongLoraConfig, rank: int) -> None:
    """Add the embeddings to what LoRA targets, with a rank of their own and the others' scaling."""
    names = [name for name, module in language_modules(model) if isinstance(module, nn.Embedding)]
    ratio = rank / config.r
    alpha = config.lora_alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
    targets: Any = config.target_modules
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        head = unwrapped(output_head(model))
        targets = {name for name, module in walk(model) if is_projection(module) and module is not head}
    if isinstance(targets, str):
        targets = "|".join([f"({targets})", *map(re.escape, names)])
    else:
        targets = {*(targets or ()), *names}
    config.target_modules = targets
    config.rank_pattern = {**(config.rank_pattern or {}), **dict.fromkeys(names, rank)}
    config.alpha_pattern = {**(config.alpha_pattern or {}), **dict.fromkeys(names, alpha)}
    missed = [name for name in names if not _targeted(config, name)]
    if missed:
        raise ValueError(
            f"embedding_rank can't reach {missed[0]}, which exclude_modules leaves out. Leave one of them away."
        )


def tie_by_module(model: nn.Module, config: LongLoraConfig) -> bool:
    """Write into the config what is tied to the input embedding, where the adapter trains that.

    PEFT ties by the names embed_tokens and lm_head only, and finds nothing on a model that has an adapter; this goes
    by the weights of the input embedding, which tell at any time. Returns whether something is tied, so that what PEFT
    would do is done.
    """
    saved = tuple(config.modules_to_save or ())
    embedding = unwrapped(input_embedding(model))
    name = next((n for n, m in walk(model) if m is embedding), None)
    targeted = name is not None and _targeted(config, name)
    if name is None or not (targeted or name.endswith(saved)):
        return False
    tied = {n for n, m in walk(model) if n != name and m._parameters.get("weight") is embedding.weight}
    if tied and targeted:
        # PEFT would warn that a merge changes the head too; `part_from_head` sees to it that it doesn't.
        if config.ensure_weight_tying:
            refuse_head(f"{sorted(tied)[0]} by ensure_weight_tying")
    elif tied:
        config.modules_to_tie = tied
        config.modules_to_save = [m for m in saved if not any(t.endswith(m) for t in tied)]
    return bool(tied)
