"""Dense and as trained, side by side: does what sparse training taught carry over to dense inference?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils import logging

from ..attention import S2AttentionConfig, get_s2_attention, s2_attention_mode, set_s2_attention
from ..attention.interface import NAME
from ..modules import base_model
from .perplexity import perplexity_by_length

logger = logging.get_logger(__name__)

AS_TRAINED = "as trained"
WORSE = 1.01
"""A warning is due where dense perplexity is this many times the perplexity by the training's pattern."""


def compare_attention(
    model: nn.Module,
    documents: Sequence[Any],
    lengths: int | Sequence[int],
    *,
    attention: S2AttentionConfig | None = None,
    name: str = AS_TRAINED,
    **options: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Perplexity by length with dense attention and with the pattern of training (the two columns of Table 6).

    A model trained in windows (`sparse="windows"` or "pose") saw dense attention, within them: the first alone.

    Logs a warning where dense is worse: the model has learned to do without the distances that dense attention shows
    it, and some dense steps in training (`dense_every`) would have kept it from that. The model's own attention is
    back afterwards.

    Args:
        model, documents, lengths, options: as for `perplexity_by_length`.
        attention: the pattern of training. Default: what the model's LONGLORA adapter was trained with, else what is
            set on the model. Its group size, of the longest length where it gives none, holds at every length.
        name: what to call it, if it is not the pattern of training: dense attention is then not held against it.

    Returns:
        `perplexity_by_length`'s records as `"dense"` and, unless that is the same, `name`.

    Raises:
        ValueError: as `perplexity_by_length`, or if the model can't use shifted sparse attention.
    """
    if attention is None and trained_window(model) is not None:
        return {"dense": perplexity_by_length(model, documents, lengths, **options)}
    longest = lengths if isinstance(lengths, int) else max(lengths, default=2)
    with _attention_kept(model) as own:
        if attention is None:
            attention = trained_attention(model) or own or S2AttentionConfig()
        set_s2_attention(model, attention)
        state = get_s2_attention(model)
        state.config = attention = attention.resolved(longest, state.native_window)
        records = {"dense": perplexity_by_length(model, documents, lengths, **options)}
        with s2_attention_mode(model, "s2"):
            records[name] = perplexity_by_length(model, documents, lengths, **options)
    worse = [
        f"{dense['perplexity']:.2f} against {sparse['perplexity']:.2f} at {dense['length']:,}"
        for dense, sparse in zip(records["dense"], records[name], strict=True)
        if name == AS_TRAINED and dense["perplexity"] > WORSE * sparse["perplexity"]
    ]
    if worse:
        logger.warning(
            f"Dense attention, which is what inference uses, is worse here than the pattern of training (groups of "
            f"{attention.group_size}): perplexity {', '.join(worse)}. Train with dense steps in between "
            "(dense_every), or with larger groups."
        )
    return records


@contextmanager
def _attention_kept(model: Any) -> Iterator[S2AttentionConfig | None]:
    """Give the configuration of a model that uses `"s2attn"`; afterwards the model has the attention it has now."""
    inner = base_model(model)
    name = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    own = get_s2_attention(model).config if name == NAME else None
    try:
        yield own
    finally:
        if own is not None:
            set_s2_attention(model, own)
        elif name is not None:
            inner.set_attn_implementation(name)


def trained_attention(model: Any) -> S2AttentionConfig | None:
    """The pattern that a model's active LONGLORA adapter ended its training with; `None` if it doesn't say."""
    config = _trained(model)
    return None if config is None else config.trained_attention


def trained_window(model: Any) -> int | None:
    """Tokens in a window, if a model's active LONGLORA adapter ended its training in such."""
    config = _trained(model)
    return None if config is None else config.trained.window(-1)


def _trained(model: Any) -> Any:
    """The config of the active adapter that says how it was trained; `None` if none does."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    active = model.active_adapters  # a method of transformers' models, a property of PEFT's
    found = (configs[name] for name in (active() if callable(active) else active))
    return next((config for config in found if getattr(config, "trained", None)), None)
