"""Giving a model shifted sparse attention, and saying when its layers are sparse."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..modules import attention_modules, base_model, sliding_windows
from ..rope import find_rope, native_window
from ..values import check_one_of
from .config import AttentionMode, S2AttentionConfig
from .interface import NAME, STATE, S2State, tell_cache

logger = logging.get_logger(__name__)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """`model`, or the transformers model in it (a `PeftModel` wraps one)."""
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a transformers model; call hf_longlora.s2_attention in its attention."
        )
    return inner


def check_supported(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Raise a `ValueError` if shifted sparse attention can't be used in a model class, saying why."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{model_class.__name__} is an encoder-decoder; shifted sparse attention is for decoders. Train it with "
            'attn_implementation="sdpa".'
        )
    if not model_class._can_set_attn_implementation():
        raise ValueError(
            f"{model_class.__name__} does not call its attention through transformers' AttentionInterface, so nothing "
            "can be registered for it. Choose another model family, or ask for the interface upstream."
        )


def check_skipping(model_class: type, config: PreTrainedConfig) -> None:
    """Raise a `ValueError` if a model class can't be trained in windows, whose positions may skip."""
    if find_rope(config) is None:
        raise ValueError(
            f"Windows keep the positions of their rows, and {model_class.__name__} has no RoPE that can be read. "
            'Train it with sparse="s2".'
        )
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if others or getattr(model_class, "_is_stateful", False):
        what = f"layers of type {', '.join(others)}" if others else "layers that carry a state from token to token"
        raise ValueError(
            f"{model_class.__name__} has {what}, which can't tell where positions skip or windows end. Train it "
            'with sparse="s2".'
        )


def set_s2_attention(model: nn.Module, config: S2AttentionConfig | None = None) -> None:
    """Make `model` use shifted sparse attention in training, configured by `config`.

    Switches a model of another attention implementation to `"s2attn"`. Call it again to change the configuration.
    Where that gives neither size nor share of a group, groups are of the length that the model was trained at before
    any scaling, as its config or a LONGLORA adapter on it says, and of a quarter of the longest document at most.

    Raises:
        ValueError: if the model is not from transformers, its attention does not go through `AttentionInterface`, or
            none of it is causal.
    """
    inner = transformers_model(model)
    check_supported(type(inner), inner.config)
    modules = [module for _, module in attention_modules(inner)]
    if not modules:
        raise ValueError(f"{type(inner).__name__} has no attention modules: nothing is there to be sparse.")
    if not any(getattr(module, "is_causal", True) for module in modules):
        raise ValueError(
            f"{type(inner).__name__} has no causal attention: it is an encoder (or set up as one: is_decoder), or its "
            "prompts see themselves both ways. Shifted sparse attention is for decoders; train it with "
            'attn_implementation="sdpa".'
        )
    state: S2State | None = vars(inner).get(STATE)
    window = _window_everywhere(inner.config)
    if window is not None and state is None:  # once
        logger.warning(
            f"{type(inner).__name__} has a sliding window of {window} tokens in every layer, and layers with a window "
            "stay as they are: nothing is left to be sparse. Load the model with sliding_window=None to have it "
            "attend to the whole length."
        )
    if inner.config._attn_implementation != NAME:
        inner.set_attn_implementation(NAME)
    state = replace(state or S2State(), config=config or S2AttentionConfig(), native_window=native_window(inner))
    setattr(inner, STATE, state)
    for module in modules:
        setattr(module, STATE, state)
        takes = inspect.signature(type(module).forward).parameters.values()
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)
        if passes_on and tell_cache not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(tell_cache, with_kwargs=True)


def _window_everywhere(config: PreTrainedConfig) -> int | None:
    """The sliding window of a model, if all of its layers have it and it is shorter than the model's length."""
    config = config.get_text_config()
    found = sliding_windows(config)
    window = found[0] if len(set(found)) == 1 else None
    return window if window is not None and window < getattr(config, "max_position_embeddings", window) else None


def get_s2_attention(model: nn.Module) -> S2State:
    """The state shared by the layers of a model, its configuration and mode: what is set in it is set for all.

    Raises:
        ValueError: if the model does not use `"s2attn"`.
    """
    inner = transformers_model(model)
    if inner.config._attn_implementation != NAME:
        raise ValueError(
            f"{type(inner).__name__} uses attn_implementation={inner.config._attn_implementation!r}, not {NAME!r}: "
            "call hf_longlora.set_s2_attention(model) first."
        )
    if STATE not in vars(inner):
        set_s2_attention(inner)
    return vars(inner)[STATE]


def set_attention_mode(model: nn.Module, mode: AttentionMode) -> None:
    """Set when the layers of `model` are sparse: `"auto"` (in training), `"s2"` or `"dense"` (always).

    `"windows"` is dense, for training on packed rows of windows: `cu_seq_lens_q` says where they end, whatever the
    positions, and has to reach each attention layer.

    Raises:
        ValueError: on another mode, a model that does not use `"s2attn"`, or one with layers that can't skip.
    """
    check_one_of(AttentionMode, mode=mode)
    states, inner = _states(model), transformers_model(model)
    if mode == "windows":
        check_skipping(type(inner), inner.config)
    for state in states:
        state.mode = mode


def _states(model: nn.Module) -> list[S2State]:
    """The states of a model and of each layer: usually one object; layers may have been given others."""
    shared = get_s2_attention(model)
    modules = attention_modules(transformers_model(model))
    return [shared, *(vars(module).setdefault(STATE, shared) for _, module in modules)]


@contextmanager
def s2_attention_mode(model: nn.Module, mode: AttentionMode) -> Iterator[None]:
    """Run `model` with attention as in training (`"s2"`), dense (`"dense"`), or as usual (`"auto"`).

    `with s2_attention_mode(model, "s2"):` around an evaluation gives the first column of the paper's Table 6, a model
    tested with the pattern that it was trained with.
    """
    states = _states(model)
    before = [state.mode for state in states]
    set_attention_mode(model, mode)
    try:
        yield
    finally:
        for state, own in zip(states, before, strict=True):
            state.mode = own
