"""Memory and time over lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from ..attention import S2AttentionConfig
from ..lookup import read_config
from ..parallel import check_shardable
from ..schedule import AUTO
from ..tuner import LongLoraConfig
from .gpus import Gpu, find_gpu
from .memory import COUNTED, GIB, bytes_at_peak, fits, in_windows, largest_step, longest
from .seconds import step_seconds
from .settings import RunSettings
from .shape import Shape

UNKNOWN = (
    "the config doesn't say which length the base was trained at first. If you know, give an adapter with base_length "
    "(--base-length)."
)


@dataclass(frozen=True, kw_only=True)
class LengthPlan:
    """One length: memory in GiB, where the parts stand at the step's peak, and time in seconds."""

    length: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    total: float
    """What torch counts as allocated at its peak."""
    host: float
    """Activations in the host's memory."""
    fits: bool
    seconds_sparse: float
    seconds_dense: float
    seconds: float
    """An optimizer step, dense ones counted in."""
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A plan over lengths, and the longest length that fits (a multiple of 1,024; 0 if none does)."""

    model: str
    gpu: Gpu
    parameters: int
    trainable: int
    lengths: tuple[LengthPlan, ...]
    longest: int | None
    """`None` where length takes no memory: of windows without dense steps."""
    notes: tuple[str, ...]
    """What makes it less certain than it looks."""


def plan_run(
    model: str | PreTrainedConfig,
    lengths: Sequence[int] = (8192, 16384, 32768, 65536, 131072),
    *,
    gpu: str | Gpu = "H100",
    settings: RunSettings | None = None,
    **changes: Any,
) -> RunPlan:
    """Memory and time of a step at each length, for a model of which only the config is read.

    Args:
        model: A config, or a name or path that has one (nothing else is downloaded).
        lengths: Tokens in a sequence.
        gpu: One of `GPUS`, or a card's own data.
        settings: The run's; default: a LONGLORA adapter as `LongLoraConfig()` makes it.
        changes: Fields of `RunSettings` to set, for example `adapter=LongLoraConfig(r=64)` or `batch_size=2`.

    Raises:
        ValueError: for a card that isn't in the table, lengths below 2, settings that can't be, or a model that is no
            decoder with attention layers, or that `set_s2_attention` refuses, as training would.
        OSError: if the config can't be had.
    """
    card = find_gpu(gpu)
    settings = replace(settings or RunSettings(adapter=LongLoraConfig()), **changes)
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths must be numbers of tokens of at least 2, got {list(lengths)}")
    if settings.backend is not None and settings.backend not in card.attention:
        raise ValueError(f"{card.name} has no {settings.backend} attention here; it has {', '.join(card.attention)}")
    config: Any
    if isinstance(model, str):
        name, config = model, read_config(model)
    else:
        name, config = model.name_or_path or model.model_type, model
    if settings.sequence_parallel > 1:
        check_shardable(type(config), config)
    shape, notes = Shape.of(config, settings), []
    if settings.sparse == AUTO:
        known = shape.native_window is not None and shape.cuttable and not settings.attention.says_groups
        settings = replace(settings, sparse="windows" if known and settings.sequence_parallel == 1 else "s2")
        if settings.sparse == "windows" and max(lengths) > (shape.native_window or 0):
            notes.append(as_plain_text(shape.native_window))
    if shape.native_window is None and settings.sparse != "s2":
        raise ValueError(f"Steps in windows can't be planned: {UNKNOWN}")
    rows = tuple(_plan_length(shape, settings, card, length) for length in lengths)
    notes += _notes(config.get_text_config(), shape, settings, card, lengths)
    return RunPlan(
        model=name,
        gpu=card,
        parameters=shape.parameters,
        trainable=shape.trainable,
        lengths=rows,
        longest=longest(shape, settings, card),
        notes=tuple(notes),
    )


def as_plain_text(window: int | None) -> str:
    """The note on steps that are planned in windows of so many tokens, while the data are not known."""
    return (
        f"Steps that aren't dense are planned in windows of {window:,} tokens, as plain text is trained; "
        'conversations and completions have sparse="s2".'
    )


def _notes(config: Any, shape: Shape, settings: RunSettings, gpu: Gpu, lengths: Sequence[int]) -> list[str]:
    notes = []
    if settings.sequence_parallel > 1:
        notes.append(
            f"{settings.sequence_parallel} cards share a sequence, and the optimizer's states by ZeRO: what they send "
            "each other takes time that is not planned. Four measured ones took 8 to 18% longer."
        )
    if config.model_type not in COUNTED:
        notes.append(
            f"The activations of {config.model_type} have not been compared with a real step's: they may be up to "
            "twice what is planned."
        )
    if shape.native_window is None:
        notes.append(f"Groups without a size or a ratio are a quarter of the length: {UNKNOWN}")
    if not gpu.measured:
        notes.append(f"No step on this card has been measured: the {gpu.name}'s seconds are from its data sheet.")
    if settings.sparse == "s2":
        falling, window = sorted(lengths, reverse=True), shape.native_window
        dense = (settings.attention.resolved(length, window).dense_at(length) for length in falling)
        notes += [words for words in dense if words is not None][:1]  # of the longest that one group holds
    return notes


def _window_seconds(shape: Shape, settings: RunSettings, gpu: Gpu, length: int, host: float) -> float:
    """A step in windows; `host` is the bytes that offloading moves of a whole sequence."""
    own, window = in_windows(shape, settings, length)
    if window < length:
        _, host = bytes_at_peak(shape, own, window)
        return step_seconds(shape, own, gpu, window, None, host)
    # All windows at once: groups of as many tokens, none of them shifted.
    own = replace(settings, attention=S2AttentionConfig(sink_tokens=0))
    return step_seconds(shape, own, gpu, length, shape.native_window, host, shift="none")


def _plan_length(shape: Shape, settings: RunSettings, gpu: Gpu, length: int) -> LengthPlan:
    parts, host = bytes_at_peak(shape, *largest_step(shape, settings, length))
    total = sum(parts.values())
    _, whole = bytes_at_peak(shape, settings, length)
    dense = step_seconds(shape, settings, gpu, length, None, whole)
    if settings.sparse != "s2":
        sparse = _window_seconds(shape, settings, gpu, length, whole)
    else:
        group = settings.attention.resolve_group_size(length, shape.native_window)
        sparse = step_seconds(shape, settings, gpu, length, group, whole)
    every = settings.dense_every
    seconds = sparse if every == 0 else (sparse * (every - 1) + dense) / every
    tokens = length * settings.batch_size * settings.gradient_accumulation_steps
    return LengthPlan(
        length=length,
        **{name: value / GIB for name, value in parts.items()},
        total=total / GIB,
        host=host / GIB,
        fits=fits(total, gpu),
        seconds_sparse=sparse,
        seconds_dense=dense,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
    )
