"""Time of a step: arithmetic over the rates that a card reaches."""

from __future__ import annotations

from ..attention.segments import Documents, Shifted
from .gpus import Gpu
from .memory import kept_of_the_mlp, kept_outside_the_mlp
from .settings import RunSettings
from .shape import Shape

# Fitted constants, and what to.
MATMUL_SHARE = 0.70
"""Share of a card's FLOPs that long matrix products reach; fitted, with the two below, to train_step.csv."""
TRAFFIC, TRAFFIC_FUSED = 24.0, 15.0
"""Bytes moved between matrix products in a step with checkpointing, over the bytes that autograd keeps of a layer."""
SHORT_SEGMENT = 1600
"""Tokens in a segment at which attention runs at half its rate (benchmarks/results/attention.csv, cuDNN)."""


def _attention_seconds(
    shape: Shape, settings: RunSettings, gpu: Gpu, length: int, group: int | None, shift: Shifted
) -> float:
    """All layers' attention over one sequence, by the pairs of tokens in its segments, those with sink tokens too.

    What it takes to bring the two kinds of pairs together is not counted.
    """
    share = gpu.attention[settings.backend] if settings.backend else max(gpu.attention.values())
    rate = share * gpu.tflops * 1e12
    document = ((0, length),)
    again = settings.gradient_checkpointing and not settings.selective_checkpointing
    passes = 1 + 2.5 + again  # backward: 5 products for the forward's 2
    widths = 2 * shape.query / shape.heads
    seconds = 0.0
    for window in shape.windows:
        if window is not None and window < length:
            pairs, effective = 1.5 * window * length, window  # of blocks of half a window, those that are hidden, too
            seconds += passes * 2 * widths * shape.heads * pairs * (1 + SHORT_SEGMENT / effective) / rate
            continue
        for part in Documents((document,), length).parts(
            shape.heads, shape.kv_heads, group, shift, settings.attention.sink_tokens
        ):
            work = sum(segment.pairs * (1 + SHORT_SEGMENT / (segment.end - segment.start)) for segment in part.rows[0])
            seconds += passes * 2 * widths * len(range(*part.heads)) * work / rate
    return seconds


def step_seconds(
    shape: Shape,
    settings: RunSettings,
    gpu: Gpu,
    length: int,
    group: int | None,
    host: float,
    shift: Shifted = "half",
) -> float:
    """An optimizer step; `group` is `None` for a dense one, `host` the bytes that offloading moves."""
    tokens = settings.batch_size * length / settings.sequence_parallel
    passes = 2 + settings.gradient_checkpointing  # forward, backward to the inputs, and the forward again
    products = 2 * tokens * (passes * shape.layer_matrices + shape.trained_matrices)
    products += 2 * tokens * shape.head_matrix * 3
    kept = kept_outside_the_mlp(shape, settings) + kept_of_the_mlp(shape, settings)
    moved = tokens * shape.layers * kept * (TRAFFIC_FUSED if settings.fused else TRAFFIC) * passes / 3
    if settings.quantization:
        moved += passes * 2 * 2 * shape.layer_matrices  # unpacked, and read
    seconds = products / (MATMUL_SHARE * gpu.tflops * 1e12) + moved / (gpu.bandwidth * 1e9)
    attention = settings.batch_size * _attention_seconds(shape, settings, gpu, length, group, shift)
    seconds += attention / settings.sequence_parallel
    seconds = max(seconds, 2 * host / (gpu.link * 1e9))  # there and back, beside the computing
    # The optimizer reads and writes weights and moments, reads gradients; their norm and their zeros are three more.
    update = 40 * shape.trainable / (gpu.bandwidth * 1e9)
    return settings.gradient_accumulation_steps * seconds + update
