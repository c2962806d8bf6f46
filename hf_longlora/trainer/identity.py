"""What tells one run from another, so that a checkpoint is resumed by the run that wrote it and by no other.

All of it is the same in each process and at each start, depends on no path, and is had without reading gigabytes: of
weights and data a sample is looked at, of the lengths of texts all.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import nn
from torch.distributed.tensor import DTensor

from .data import lengths

NUMBERS = 64
"""How many numbers of each tensor are looked at, evenly spread."""
ROWS, TOKENS = 256, 64
"""Rows of a dataset that are looked at, evenly spread, and the tokens at either end of each."""
CHANGING = {
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "resolved"),
    *("rope", "base_rope", "target_length", "rope_type", "rope_parameters", "base_length", "schedule"),
}
"""Fields of an adapter's config that say where it is, or change in a run: its RoPE is that of the stages."""
OPTIMIZATION = (
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("loss_type", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16"),
)
"""Arguments that say what a step does to the weights."""


def adapter_settings(config: PeftConfig) -> dict[str, Any]:
    """What makes an adapter this adapter, JSON-able."""
    return _plain({key: value for key, value in config.to_dict().items() if key not in CHANGING})


def optimizer_settings(args: Any, optimizer: Any, scheduler: Any, cls_and_kwargs: Any) -> dict[str, Any]:
    """How a run optimizes, JSON-able: by the trainer's arguments, or by what the caller gave in their place."""
    values = {name: getattr(args, name) for name in OPTIMIZATION if hasattr(args, name)}
    if optimizer is not None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        values["optimizer"] = {"class": type(optimizer).__name__, "groups": groups}
    if cls_and_kwargs is not None:
        values["optimizer"] = {"class": cls_and_kwargs[0].__name__, **cls_and_kwargs[1]}
    if scheduler is not None:
        values["scheduler"] = type(scheduler).__name__
    return _plain(values)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    def unset(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))

    return json.loads(json.dumps(values, default=unset))


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of the frozen weights: names, shapes, dtypes, and `NUMBERS` values of each.

    Only names and shapes of weights that are spread over processes when a model is made (ZeRO-3).
    """
    digest = hashlib.sha256()
    samples: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        digest.update(f"{name} {tuple(getattr(parameter, 'ds_shape', parameter.shape))} {parameter.dtype}".encode())
        count = parameter.numel()
        if count > 0 and parameter.device.type != "meta" and not isinstance(parameter, DTensor):
            at = torch.arange(0, count, max(count // NUMBERS, 1), device=parameter.device)
            samples.append(parameter.detach().reshape(-1)[at].contiguous().view(torch.uint8))
    for sample in samples:  # once all are on their way
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def data_fingerprint(tokenized: Dataset) -> str:
    """A hash of tokens and labels: the lengths of all rows, and both ends of `ROWS` of them."""
    digest = hashlib.sha256(lengths(tokenized).astype(np.int64).tobytes())
    columns = [name for name in ("input_ids", "labels") if name in tokenized.column_names]
    table = tokenized.with_format("arrow")
    for row in range(0, len(tokenized), max(len(tokenized) // ROWS, 1)):
        for name in columns:
            tokens = table[row : row + 1][name].combine_chunks().flatten()
            for part in (tokens.slice(0, TOKENS), tokens.slice(max(len(tokens) - TOKENS, 0))):
                digest.update(part.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()[:16]
