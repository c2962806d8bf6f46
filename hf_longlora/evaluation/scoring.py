"""Running a model to score tokens: what a causal language model says of the texts that it is given."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..modules import base_model
from ..rope import forget_lengths

# Rows of logits turned to fp32 at a time: 512 rows of a 128k vocabulary are 256 MiB.
LOSS_CHUNK = 512
LARGEST = math.log(sys.float_info.max)
"""The nats whose exponential is a double."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's own training flag is back, also on an exception."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), _autocast(model):
            yield
    finally:
        for module, training in flags:
            module.training = training


def _autocast(model: nn.Module) -> Any:
    """Autocast where fp32 weights (norms and embeddings under training) stand between half-precision ones.

    A fp32 norm hands fp32 activations to a bf16 projection, which raises. LoRA weights do not count: PEFT casts for
    them.
    """
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name}
    half = dtypes & {torch.bfloat16, torch.float16}
    if torch.float32 in dtypes and half:
        return torch.autocast(embedding_device(model).type, dtype=half.pop())
    return nullcontext()


def suffix_logits(model: nn.Module, input_ids_BS: torch.Tensor, keep: int) -> torch.Tensor:
    """The logits that predict the last `keep` tokens of each row: `[B, keep, V]`."""
    # The token before the first target predicts it; the last token's own logits predict nothing here.
    extra = {"logits_to_keep": keep + 1} if _takes_logits_to_keep(model) else {}
    return _logits(model, input_ids_BS, **extra)[:, -keep - 1 : -1]


def suffix_nll(model: nn.Module, input_ids_BS: torch.Tensor, keep: int) -> torch.Tensor:
    """Negative log likelihood in nats of the last `keep` tokens of each row: `[B, keep]`, fp32."""
    return _cross_entropy(suffix_logits(model, input_ids_BS, keep), input_ids_BS[:, -keep:])


def position_nll(model: nn.Module, input_ids_BS: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood in nats of the tokens at positions `targets_K` (all >= 1): `[B, K]`, fp32."""
    targets_K = targets_K.to(input_ids_BS.device)
    if _takes_logits_to_keep(model):
        logits_BKV = _logits(model, input_ids_BS, logits_to_keep=targets_K - 1)
    else:
        logits_BKV = _logits(model, input_ids_BS)[:, -input_ids_BS.shape[1] :]
        logits_BKV = logits_BKV[:, (targets_K - 1).to(logits_BKV.device)]
    return _cross_entropy(logits_BKV, input_ids_BS[:, targets_K])


def _logits(model: nn.Module, input_ids_BS: torch.Tensor, **extra: Any) -> torch.Tensor:
    """One forward, whose numbers follow from its tokens alone: no RoPE remembers the lengths of those before."""
    forget_lengths(base_model(model))
    return model(input_ids=input_ids_BS, use_cache=False, **extra).logits


def _cross_entropy(logits_BKV: torch.Tensor, labels_BK: torch.Tensor) -> torch.Tensor:
    labels_BK = labels_BK.to(logits_BKV.device)
    losses = [
        F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
        for logits, labels in zip(logits_BKV.split(LOSS_CHUNK, 1), labels_BK.split(LOSS_CHUNK, 1), strict=True)
    ]
    return torch.cat(losses, dim=1)


def perplexity(nll: float) -> float:
    """Of a mean negative log likelihood in nats."""
    return math.exp(nll) if nll <= LARGEST else math.inf


def _takes_logits_to_keep(model: Any) -> bool:
    """Whether the innermost model's forward names `logits_to_keep`; wrappers pass it on in `**kwargs`."""
    return "logits_to_keep" in inspect.signature(base_model(model).forward).parameters


def vocabulary_size(model: Any) -> int | None:
    """Entries of the model's vocabulary, or `None` where neither its config nor its embeddings tell."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    return getattr(config, "vocab_size", None)


def embedding_device(model: Any) -> torch.device:
    """The device of the input embeddings (under a device map, that of the first layers), else of any parameter."""
    try:
        return model.get_input_embeddings().weight.device
    except (AttributeError, NotImplementedError):
        return next(model.parameters()).device
