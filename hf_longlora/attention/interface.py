"""`attn_implementation="s2attn"`: shifted sparse attention in training, dense attention everywhere else.

Two functions are registered with transformers: one that answers attention, here, and one that makes masks, in `mask`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..families import find_family
from ..rope import native_window
from .blocks import attend_in_blocks
from .config import AttentionMode, S2AttentionConfig
from .eager import eager_attention
from .kernels import select_kernel
from .mask import S2Mask, s2_mask
from .segments import Documents, Shifted

logger = logging.get_logger(__name__)

NAME = "s2attn"
TOLD = "s2_kv_cache"  # the keyword of `tell_cache`
STATE = "s2_attention_state"  # plain attributes of modules survive PEFT's wrapping and stay out of config.json


Shift = Literal["heads", "layers", "none", "all"]
"""Which groups are shifted: those of half of the heads, of every second layer, none, or all (the paper's Table 6)."""


@dataclass
class S2State:
    """What `set_s2_attention` puts on every attention module of a model: one object, shared by its layers."""

    config: S2AttentionConfig = field(default_factory=S2AttentionConfig)
    mode: AttentionMode = "auto"
    native_window: int | None = None
    """Tokens that the model was trained at before any scaling: what groups are of where `config` doesn't say."""
    shift: Shift = "heads"
    """The method; others are for comparison, and set here (`get_s2_attention(model).shift = "none"`)."""
    find_sequence: Callable[..., Any] | None = None
    """Where processes hold shards of each row: finds the whole rows (`hf_longlora.parallel.shard_sequences`)."""


_DEFAULT = S2State()
"""The state of models that were loaded with "s2attn" and have not been through `set_s2_attention`."""
# What changes the attention of some families (sparse indices, sinks that depend on the query) and sdpa ignores.
_UNKNOWN = ("indices", "block_indices", "sinks")


def s2_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: S2Mask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer of a transformers model; signature and shapes are transformers' own.

    Args:
        query: `[B, H, S, D]`, RoPE applied.
        key: `[B, H_kv, S_kv, D]`.
        value: `[B, H_kv, S_kv, D_v]`.

    Returns:
        `[B, S, H, D_v]` and `None`.

    Raises:
        ValueError: if the layer asks for what no kernel can honour, or comes with a custom 4-D mask in training.
    """
    refuse_unknown(module, kwargs)
    if kwargs.pop("output_attentions", False):  # as transformers' sdpa and flash
        logger.warning_once(
            "`s2attn` attention does not support `output_attentions=True`: no weights are returned. Please set your "
            'attention to "eager" if you want them.'
        )
    state: S2State = getattr(module, STATE, _DEFAULT)
    learned_sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    alone = left_alone(module, query, key, attention_mask, causal, kwargs.get("sliding_window"))
    if state is _DEFAULT and alone is None:
        refuse_untold_cache(module, kwargs)
    training = module.training and not generates(kwargs)
    if module.training and not training and state.mode == "auto":
        # Seen with TRL's GRPOTrainer: a rollout's tokens are 0.02 to 16 times as probable when they are scored.
        logger.warning_once(
            "The model generates in training mode: densely, while its training is sparse. A trainer that scores what "
            "the model has generated (GRPO, RLOO) would score it by another attention than it was drawn by. Run it "
            'within s2_attention_mode(model, "dense").'
        )
    skipping = training and state.mode == "windows"
    sparse = training or state.mode == "s2"
    if state.find_sequence is not None:
        refuse_sharded(module, alone, skipping)
    elif skipping:
        refuse_skipping(module, attention_mask, causal, alone is not None, kwargs)
    if state.find_sequence is None and (alone is not None or not sparse):
        how: dict[str, Any] = {"causal": causal, "dropout": dropout, "scaling": scaling, **kwargs}
        return _attend_densely(module, query, key, value, attention_mask, skipping, sparse, **how), None

    refuse_sparse(module, kwargs)
    sequence = None
    if state.find_sequence is None:
        documents = _documents(module, query, attention_mask, Documents.find, kwargs)
    else:
        find = partial(state.find_sequence, device=query.device)
        sequence = _documents(module, query, attention_mask, find, kwargs)
        documents = sequence.documents
    group_size = None
    if sparse and state.mode not in ("dense", "windows"):
        native = state.native_window if state is not _DEFAULT else native_window(module.config)
        group_size = state.config.resolve_group_size(documents.longest, native)
    dropped = dropout if module.training and dropout > 0 else None
    asked = {"dropout_p": dropped, "softcap": softcap, "learned_sinks": learned_sinks}
    options = {name: given for name, given in asked.items() if given is not None}
    kernel = select_kernel(state.config.kernel, query, value, tuple(options))
    options["scale"] = scaling
    pattern: Any = (group_size, _shift(state.shift, module), state.config.sink_tokens)
    if sequence is not None:
        out = sequence.attend(query, key, value, *pattern, kernel=kernel, **options)
    else:
        out = kernel(query, key, value, documents.parts(query.shape[1], key.shape[1], *pattern), **options)
    return out.contiguous(), None


def _attend_densely(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: S2Mask | torch.Tensor | None,
    skipping: bool,
    training: bool,
    **kwargs: Any,
) -> torch.Tensor:
    """Dense attention of a layer, in blocks where a window allows it: `[B, S, H, D_v]`.

    Args:
        skipping: Whether positions skip.
        training: Whether documents are kept apart that a window's mask knows nothing of.
        kwargs: `dense_attention`'s.
    """

    def attend(*tensors: Any) -> torch.Tensor:
        return dense_attention(module, *tensors, **kwargs)

    if isinstance(mask, S2Mask):
        mask.check_keys(module, key)
        blocks: torch.Tensor | None = None
        if skipping:
            blocks = mask.by_position(kwargs["cu_seq_lens_q"], kwargs["position_ids"])
        elif kwargs.get("position_bias") is None and query.shape[2] == key.shape[2]:
            told = (kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")) if training else ()
            blocks = mask.in_blocks(*told)
        if blocks is not None:
            return attend_in_blocks(attend, query, key, value, blocks.to(query.device))
        mask = mask.dense()
    # a model spread over devices shares one mask
    return attend(query, key, value, None if mask is None else mask.to(query.device))


def dense_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention by sdpa, or by the family's own function if the layer asks for what sdpa lacks: `[B, S, H, D_v]`."""
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=causal, **kwargs)[0]
    # As in sdpa: a single query without a mask sees every key.
    return eager_attention(module, query, key, value, mask, causal=causal and query.shape[2] > 1, **kwargs)


def tell_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook of attention modules: tells their attention function whether there is a KV cache.

    What a module doesn't know it passes on. Of `use_cache` that can't be said: some families pass none (Gemma 3), and
    others a False that is the default of their layers (OLMo 3, Qwen3-VL), cache or not.
    """
    cached = any(kwargs.get(name) is not None for name in ("cache", "past_key_values", "layer_past"))
    return args, {**kwargs, TOLD: cached}


def generates(kwargs: dict[str, Any]) -> bool:
    """Whether a layer that may be in training mode generates: it fills a cache, and keeps nothing for a backward.

    Either alone says nothing: a training forward fills a cache if `config.use_cache` is left on, and checkpointing may
    run the first of its two forwards without gradients.
    """
    return bool(kwargs.get(TOLD, kwargs.get("use_cache"))) and not torch.is_grad_enabled()


def refuse_untold_cache(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if a forward in training mode may be generation or not, and nothing says which.

    For models that were only loaded with "s2attn", which have no `tell_cache`: `use_cache=True` is a cache, and False
    is none in the families that are known to mean it.
    """
    if not module.training or torch.is_grad_enabled() or kwargs.get("use_cache"):
        return
    family = find_family(getattr(module, "config", None))
    if "use_cache" not in kwargs or family is None or not family.tells_cache:
        raise ValueError(
            f"{type(module).__name__} is not known to tell its attention whether there is a KV cache: without "
            "gradients and in training mode this may be generation, which is dense, or a checkpointed layer or a "
            "reference's scores, which are sparse. Call hf_longlora.set_s2_attention(model) first."
        )


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if a layer passes to its attention what nothing here knows."""
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes `{name}` to its attention, which s2attn does not know and would "
                "drop. Use the model with the attention implementation it is made for."
            )


def refuse_skipping(
    module: nn.Module, mask: S2Mask | torch.Tensor | None, causal: bool, window: bool, kwargs: dict[str, Any]
) -> None:
    """Raise a `ValueError` if a layer can't know what to see where positions skip."""
    name = type(module).__name__
    own = not isinstance(mask, S2Mask) or (window and not mask.within_span and not torch.compiler.is_compiling())
    if not causal or own:
        raise ValueError(
            f"{name} is not causal or has a mask of its own, which knows nothing of windows and of skips inside "
            'them. Train it with sparse="s2".'
        )
    needed = ("cu_seq_lens_q", "position_ids") if window else ("cu_seq_lens_q",)
    missing = [f"`{key}`" for key in needed if kwargs.get(key) is None]
    if missing:
        raise ValueError(
            f"{name} doesn't get {' and '.join(missing)}: it would take each skip inside a window for the "
            'beginning of another document, or not see where windows end. Train it with sparse="s2".'
        )


def refuse_sharded(module: nn.Module, alone: str | None, skipping: bool) -> None:
    """Raise a `ValueError` if a layer can't attend over sequences that processes hold in shards."""
    if alone is not None or skipping:
        why = "positions that skip" if alone is None else alone
        raise ValueError(
            f"{type(module).__name__} has {why}: sequence parallelism is for causal attention over the whole length. "
            "Train without it; to hold a large model FSDP2 or ZeRO-3 spread the weights."
        )


def refuse_sparse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if a layer that would be sparse asks for what the pattern excludes."""
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a position bias to its scores, which s2attn does not support.")
    position_ids = kwargs.get("position_ids")
    if position_ids is not None and position_ids.ndim != 2:
        raise ValueError(
            f"{type(module).__name__} has position_ids of shape {tuple(position_ids.shape)}; s2attn reads documents "
            "off 2-D ones only."
        )


def left_alone(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: S2Mask | torch.Tensor | None,
    causal: bool,
    window: int | None,
) -> str | None:
    """Why a layer is dense in training as well, in words; `None` if it is sparse.

    A window or chunk that is no shorter than the model's length changes nothing: Phi-3's 128k checkpoints declare one
    of 262,144 tokens in every layer.
    """
    if not causal:
        return "not causal"
    if query.shape[2] != key.shape[2]:
        return "other keys than queries"
    if window is None and isinstance(mask, S2Mask):
        window = mask.window
    if window is None:
        return None
    reach = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if reach is None or window < max(reach, query.shape[2]):
        return f"a window of {window:,} tokens"
    return None


def _shift(shift: Shift, module: nn.Module) -> Shifted:
    """Which heads of a layer are shifted."""
    if shift == "heads":
        return "half"
    if shift == "layers":
        return "all" if module.layer_idx % 2 else "none"  # type: ignore[operator]
    return shift


def _documents(
    module: nn.Module, query: torch.Tensor, mask: S2Mask | torch.Tensor | None, find: Callable[..., Any], kwargs: Any
) -> Any:
    """What `find` makes of the batch that a layer is in the middle of: its documents, or the whole of its shards.

    Raises:
        ValueError: the mask is a custom one.
    """
    told = {"cu_seqlens": kwargs.get("cu_seq_lens_q"), "position_ids": kwargs.get("position_ids")}
    if isinstance(mask, S2Mask):
        found = mask.find(find, **told)
        if mask.causal:
            return found
    elif mask is None:
        return find(query.shape[0], query.shape[2], **told)
    raise ValueError(
        f"{type(module).__name__} has a custom attention mask (4-D, bidirectional blocks, a prefix). Shifted sparse "
        'attention is causal: pass a 2-D padding mask, or train with attn_implementation="sdpa".'
    )


def register() -> None:
    """Register `"s2attn"` with transformers. Idempotent; what has been registered in its place since stays."""
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, s2_attention_forward)
        AttentionMaskInterface.register(NAME, s2_mask)
