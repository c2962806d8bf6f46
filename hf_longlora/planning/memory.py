"""Memory of a step: bytes at its peak, a tensor at a time."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace

from .gpus import Gpu
from .settings import RunSettings
from .shape import Shape

GIB = 2**30

COUNTED = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "olmo2", "granite", "smollm3", "gpt_neox"),
    *("starcoder2", "cohere", "gemma", "glm4", "stablelm"),
)
"""Families whose memory a token was compared with torch's record of live storages: 1% off for Llama's kind of layer,
11% at most. Others keep more than is counted: DeepSeek-V3 1.5 times, Gemma 3, whose norms are all fp32, more."""

# Fitted constants, and what to.
CONTEXT_GIB = 0.8
"""What CUDA and the libraries take of a card beside tensors."""
FRAGMENTATION = 1.06
"""Memory reserved over memory allocated, at the peak: 1.055 in the first row of train_step.csv."""
LOSS_TOKENS, LOSS_VOCABULARY = 4096, 8192
"""TRL's loss (1.16 and later) computes logits by tiles of so many tokens and entries."""
NORM_BACKWARD, NORM_BACKWARD_FUSED = 20, 6
"""Bytes of h and token in the backward of a norm, beside what is kept of its layer."""
TOKEN_BYTES = 96
"""Bytes a token, whatever the model: ids, labels, positions, log probabilities, entropy."""
STASHED = 3
"""Checkpoints that TRL's activation offloading has on the card at the peak: 2.8 in train_step.csv."""


def kept_outside_the_mlp(shape: Shape, settings: RunSettings) -> float:
    """Bytes a token that autograd keeps of one layer's attention and norms.

    bf16 inputs of LoRA's matrices, those that share one counted once; of each norm its input in fp32 and, if it is
    trained, its normalized input in bf16; queries and attention's output, keys and values in bf16, a fp32 number a
    head, RoPE's sines and cosines; what other mixers' inputs are projected to. Fused norms keep their input in bf16.
    """
    norms = (4 + 2 * shape.trains_norms) * shape.norms
    if settings.fused:  # the first norm's input is the layer's, and so the checkpoint
        norms = 2 * shape.norms - 2 * shape.hidden * settings.gradient_checkpointing
    inputs = 2 * shape.lora_inputs if settings.adapter is not None else 4 * shape.hidden
    attention = 4 * shape.query + 2 * shape.keys_values + 4 * shape.heads + 4 * shape.query / shape.heads
    return inputs + norms + attention + 2 * shape.mixers


def kept_of_the_mlp(shape: Shape, settings: RunSettings) -> float:
    """Bytes a token of what is activated, the activation and its factor; fused, the activation is computed again."""
    return (2 if settings.fused else 3) * shape.mlp


def kept_of_a_window(shape: Shape, window: int) -> float:
    """Bytes a token more that autograd keeps of the attention of a layer with a sliding window (`attention.blocks`).

    A bf16 mask, of a window and half of one for each query; where query heads share more than one key/value head, keys
    and values of so many tokens for each half a window and query head.
    """
    copied = 3 * 4 * shape.query - 2 * shape.keys_values if 1 < shape.kv_heads < shape.heads else 0
    return 3 * window + copied


def bytes_at_peak(shape: Shape, settings: RunSettings, length: int) -> tuple[dict[str, float], float]:
    """Bytes on the card at the peak of a step, by what they are for, and those in the host's memory."""
    tokens, h = settings.batch_size * length / settings.sequence_parallel, shape.hidden
    stream = 4 if settings.dtype == "float32" else 2  # bytes of a number of the hidden states
    outside, inside = kept_outside_the_mlp(shape, settings), kept_of_the_mlp(shape, settings)
    windows = [window for window in shape.windows if window is not None and window < length]
    whole = inside + 2 * shape.lora_mlp
    if settings.adapter is None:
        whole += shape.mlp  # what the way out of the MLP is multiplied with
    tile = min(tokens, settings.mlp_tile or tokens)
    if tile < tokens:
        inside = whole = 2.0 * h  # a tiled MLP keeps its input
    host = 0.0
    if settings.gradient_checkpointing:
        checkpoint = stream * h * tokens
        on_card = float(shape.layers)
        if settings.activation_offloading:
            sent = settings.offload_share * shape.layers
            on_card += min(STASHED, sent) - sent
        saved = on_card * checkpoint + 1.5 * max(windows, default=0) * tokens  # and the mask that layers share
        if settings.selective_checkpointing:  # the output, and a fp32 number a head
            saved += shape.layers * tokens * (2 * shape.query + 4 * shape.heads)
        host = (shape.layers - on_card) * checkpoint
    else:
        saved = tokens * (
            shape.layers * (outside + whole) + sum(kept_of_a_window(shape, window) for window in windows)
        )
    saved += tokens * TOKEN_BYTES

    # Backward of a layer, beside its own activations: in the MLP the gradients of its three inner tensors (fused, of
    # one) and of its output, then in the norm what fp32 takes.
    of_mlp = tokens * stream * h + tile * (1 if settings.fused else 3) * shape.mlp
    if tile < tokens:
        of_mlp += tokens * 2 * h + tile * kept_of_the_mlp(shape, settings)
    of_norm = tokens * (NORM_BACKWARD_FUSED if settings.fused else NORM_BACKWARD) * h
    again = 0.0
    if settings.gradient_checkpointing:
        again = tokens * (outside + max((kept_of_a_window(shape, window) for window in windows), default=0))
        of_mlp += tokens * inside
    else:
        of_mlp -= tokens * (whole - inside)  # what the MLP's way out was given is free by then
    working = again + max(of_mlp, of_norm) + 2.0 * shape.largest_matrix
    logits = 2 * min(tokens, LOSS_TOKENS) * min(shape.vocabulary, LOSS_VOCABULARY)
    # The last norm's, its output twice, and its gradient in fp32 and bf16.
    logits += tokens * (14 if settings.fused else 20) * h

    element = 4.0 if settings.adapter is not None or settings.dtype == "float32" else 2.0
    gradients = shape.trainable * element
    # AdamW's two moments; fused, so without temporaries. Processes that share sequences run by DeepSpeed's ZeRO.
    optimizer = shape.trainable * 2 * element / settings.sequence_parallel
    earlier = gradients if settings.gradient_accumulation_steps > 1 else 0.0
    end = working + stream * h * tokens if settings.adapter is None else 2.0 * h * tokens
    phases = {  # gradients, activations, logits
        "loss": (earlier, saved, logits),
        "backward of the last layer": (earlier, saved + working, 0.0),
        "backward of the first": (gradients, end, 0.0),
    }
    grads, activations, logits = max(phases.values(), key=sum)
    parts = {"weights": shape.weight_bytes, "gradients": grads, "optimizer": optimizer}
    return parts | {"activations": activations, "logits": logits}, host


def fits(total: float, gpu: Gpu) -> bool:
    """Whether so many bytes of tensors leave room for CUDA and for fragmentation."""
    return total / GIB * FRAGMENTATION + CONTEXT_GIB <= gpu.memory_gib


def in_windows(shape: Shape, settings: RunSettings, length: int) -> tuple[RunSettings, int]:
    """A step in windows over sequences of `length` tokens, as forwards of a window, one after the other.

    It does in a run that has no dense steps.
    """
    window = shape.native_window
    if settings.dense_every > 0 or window is None or length <= window or not shape.adds_up:
        return settings, length
    forwards = settings.gradient_accumulation_steps * math.ceil(settings.batch_size * length / window)
    return replace(settings, batch_size=1, gradient_accumulation_steps=forwards), window


def largest_step(shape: Shape, settings: RunSettings, length: int) -> tuple[RunSettings, int]:
    """Settings and length of the step that takes the most memory of a run over sequences of `length` tokens."""
    return in_windows(shape, settings, length) if settings.sparse != "s2" else (settings, length)


def longest(shape: Shape, settings: RunSettings, gpu: Gpu) -> int | None:
    """The longest sequence that fits, in whole thousands (1,024) of tokens; 0 if none does, `None` if any does."""

    def too_much(thousands: int) -> bool:
        parts, _ = bytes_at_peak(shape, *largest_step(shape, settings, 1024 * thousands))
        return not fits(sum(parts.values()), gpu)

    if largest_step(shape, settings, 2**60)[1] < 2**60 and not too_much(2**50):
        return None
    return 1024 * bisect_left(range(1, 2**17), True, key=too_much)
