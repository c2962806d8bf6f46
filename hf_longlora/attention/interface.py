"""`attn_implementation="s2attn"`: shifted sparse attention in training, dense attention everywhere else.

Two functions are registered with transformers, one that answers attention and one that makes masks. The mask function
knows neither the layer nor whether it trains, so it returns an `S2Mask`: all that is needed to find the documents
(training, O(n)) or to build the mask of `attn_implementation="sdpa"` (everything else), and neither until it is asked.
It is made once for each forward and shared by the layers, so both are also computed once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .config import AttentionMode, S2AttentionConfig, Shift, check_group_size
from .dense import eager_attention
from .kernels import select_kernel
from .segments import Documents

logger = logging.get_logger(__name__)

NAME = "s2attn"


# --------------------------------------------------------------------------------------------------------------------
# The functional form


def s2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group_size: int | None,
    cu_seqlens: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Shifted sparse attention, for modules that are not from transformers (LongLoRA, section 3.2).

    Causal. The last half of the key/value heads, with all their query heads, works on groups shifted by half a group;
    with a single key/value head, the last half of the query heads.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, S, D_v]`.
        group_size: Tokens in a group, at least 2; `None` for dense causal attention within the documents.
        cu_seqlens: `[documents + 1]`, ends of the documents packed into the one row (`B` is 1).
        attention_mask: `[B, S]`, 0 where a token is padding.
        scale: Factor of the scores; `D ** -0.5` if `None`.
        kernel: Name of a kernel, or `"auto"`.

    Returns:
        `[B, H, S, D_v]`; 0 where the query is padding.

    Raises:
        ValueError: on shapes that don't fit, a group below 2, or a kernel that can't serve.
    """
    check_group_size(group_size)
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError("query, key and value must be [B, H, S, D].")
    if query.shape[2] != key.shape[2] or key.shape[:3] != value.shape[:3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query, key and value must have one length and H a multiple of H_kv, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    documents = Documents.find(
        query.shape[0], query.shape[2], cu_seqlens=cu_seqlens, attention_mask=attention_mask, position_ids=None
    )
    parts = documents.parts(query.shape[1], key.shape[1], group_size)
    return select_kernel(kernel, query, value)(query, key, value, parts, scale=scale).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------------------
# The mask


READS_MASK = (
    "This family works on the attention mask itself, and s2attn makes none (memory n^2): it is not supported. Use the "
    "model with another attention implementation"
)


class S2Mask:
    """What a forward knows about its mask, before anyone asks for one.

    No dataclass: FSDP2 rebuilds those in each layer's arguments, to cast their tensors.

    Args:
        arguments: What transformers passed to build a mask with.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._documents: Documents | None = None
        self._dense: tuple[torch.Tensor | None] | None = None

    @property
    def padding(self) -> torch.Tensor | None:
        """`[B, S]`, False where a token is padding."""
        return self.arguments["attention_mask"]

    @property
    def window(self) -> int | None:
        """Tokens in the window or chunk, for the mask of sliding-window or chunked layers."""
        return self.arguments.get("local_size")

    @property
    def causal(self) -> bool:
        """Whether nothing but causality, padding and packing shapes it."""
        if self.arguments["mask_function"] is causal_mask_function:
            return True
        # Compiled, transformers can't look whether a row is packed, and makes the mask as if each were.
        packed = torch.compiler.is_compiling() or (self._documents is not None and self._documents.packed)
        within = self.window is not None and self.arguments["q_length"] <= self.window
        return (within or packed) and not self.arguments["use_vmap"]  # what else shapes a mask comes to be vmapped

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{READS_MASK} (`{name}`)")

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(READS_MASK)

    def check_keys(self, module: nn.Module, key: torch.Tensor) -> None:
        """Raise a `ValueError` if a layer has made other keys (compressed, added ones) than the mask is for."""
        # A single query is a decoding step, where sdpa's mask broadcasts over whatever the cache holds.
        if key.shape[2] != self.arguments["kv_length"] and self.arguments["q_length"] > 1:
            raise ValueError(
                f"{type(module).__name__} attends to {key.shape[2]} keys where the mask is for "
                f"{self.arguments['kv_length']}: s2attn does not support it."
            )

    def dense(self) -> torch.Tensor | None:
        """The mask of `attn_implementation="sdpa"`: `[B, 1, S, S]`, or `None` where causality says it all."""
        if self._dense is None:
            self._dense = (sdpa_mask(**self.arguments),)
        return self._dense[0]

    def documents(self, cu_seqlens: torch.Tensor | None, position_ids: torch.Tensor | None) -> Documents:
        """The documents of the batch."""
        if self._documents is None:
            self._documents = Documents.find(
                self.arguments["batch_size"],
                self.arguments["q_length"],
                cu_seqlens=cu_seqlens,
                attention_mask=self.padding,
                position_ids=position_ids,
            )
        return self._documents


def s2_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> S2Mask | torch.Tensor | None:
    """The mask function of `"s2attn"`: an `S2Mask` where the queries are the keys, else what `"sdpa"` makes."""
    arguments = dict(
        kwargs,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
    )
    # A decoding step, a prefill into a static cache, a chunk after a prefix: dense whatever the layer's mode.
    if q_length != kv_length or isinstance(q_offset, torch.Tensor) or q_offset != 0 or kv_offset != 0:
        return sdpa_mask(**arguments)
    return S2Mask(arguments)


# --------------------------------------------------------------------------------------------------------------------
# The attention function


@dataclass
class S2State:
    """What `set_s2_attention` puts on every attention module of a model: one object, shared by its layers."""

    config: S2AttentionConfig = field(default_factory=S2AttentionConfig)
    mode: AttentionMode = "auto"


_ATTRIBUTE = "s2_attention_state"  # plain attributes of modules survive PEFT's wrapping and stay out of config.json
_DEFAULT = S2State()
# What changes the attention of some families (sparse indices, sinks that depend on the query) and sdpa ignores.
_UNKNOWN = ("indices", "block_indices", "sinks")


def s2_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "S2Mask | torch.Tensor | None",
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
    state: S2State = getattr(module, _ATTRIBUTE, _DEFAULT)
    sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    alone = left_alone(module, query, key, attention_mask, causal, kwargs.get("sliding_window"))
    if alone is not None or not (module.training or state.mode == "s2"):
        if isinstance(attention_mask, S2Mask):
            attention_mask.check_keys(module, key)
            dense = attention_mask.dense()
        else:
            dense = attention_mask
        if dense is not None:  # a model spread over devices shares one S2Mask
            dense = dense.to(query.device)
        options = dict(kwargs, dropout=dropout, scaling=scaling)
        if softcap is None and sinks is None:
            return sdpa_attention_forward(module, query, key, value, dense, is_causal=is_causal, **options)
        # As in sdpa: a single query without a mask sees every key.
        return eager_attention(module, query, key, value, dense, causal=causal and query.shape[2] > 1, **options), None

    refuse_sparse(module, kwargs)
    documents = _documents(module, query, attention_mask, kwargs)
    group_size = None if state.mode == "dense" else state.config.resolve_group_size(documents.longest)
    kernel = select_kernel(
        state.config.kernel,
        query,
        value,
        dropout=module.training and dropout > 0,
        softcap=softcap is not None,
        sinks=sinks is not None,
    )
    parts = documents.parts(query.shape[1], key.shape[1], group_size, _shift(state.config.shift, module))
    out = kernel(
        query,
        key,
        value,
        parts,
        scale=scaling,
        dropout_p=dropout if module.training else 0.0,
        softcap=softcap,
        sinks=sinks,
    )
    return out.contiguous(), None


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if a layer passes to its attention what nothing here knows."""
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes `{name}` to its attention, which s2attn does not know and would "
                "drop. Use the model with the attention implementation it is made for."
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
    mask: "S2Mask | torch.Tensor | None",
    causal: bool,
    window: int | None,
) -> str | None:
    """Why a layer is dense in training as well, in words; `None` if it is sparse.

    A window or chunk that the model's length can't go beyond is none: Phi-3's 128k checkpoints declare one of 262,144
    tokens in every layer.
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


def _shift(shift: Shift, module: nn.Module) -> Literal["half", "none", "all"]:
    """Which heads of a layer are shifted."""
    if shift == "heads":
        return "half"
    if shift == "layers":
        return "all" if module.layer_idx % 2 else "none"  # type: ignore[operator]
    return shift


def _documents(
    module: nn.Module, query: torch.Tensor, mask: "S2Mask | torch.Tensor | None", kwargs: dict[str, Any]
) -> Documents:
    """The documents of the batch that a layer is in the middle of."""
    cu_seqlens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if isinstance(mask, S2Mask):
        documents = mask.documents(cu_seqlens, position_ids)
        if mask.causal:
            return documents
    elif mask is None:
        return Documents.find(query.shape[0], query.shape[2], cu_seqlens=cu_seqlens, position_ids=position_ids)
    raise ValueError(
        f"{type(module).__name__} has a custom attention mask (4-D, bidirectional blocks, a prefix). Shifted sparse "
        'attention is causal: pass a 2-D padding mask, or train with attn_implementation="sdpa".'
    )


# --------------------------------------------------------------------------------------------------------------------
# Setting it


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules of a transformers model, by transformers' own rule: the class is called `*Attention*`."""
    for name, module in model.named_modules():
        is_model = isinstance(module, PreTrainedModel)
        if "Attention" in type(module).__name__ and hasattr(module, "config") and not is_model:
            yield name, module


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """`model`, or the transformers model in it (a `PeftModel` wraps one)."""
    get_base_model = getattr(model, "get_base_model", None)
    inner = model if get_base_model is None else get_base_model()
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


def set_s2_attention(model: nn.Module, config: S2AttentionConfig | None = None) -> None:
    """Make `model` use shifted sparse attention in training, configured by `config`.

    Switches a model of another attention implementation to `"s2attn"`. Call it again to change the configuration.

    Raises:
        ValueError: if the model is not from transformers, its attention does not go through `AttentionInterface`, or
            none of it is causal.
    """
    inner = _transformers_model(model)
    check_supported(type(inner), inner.config)
    modules = [module for _, module in attention_modules(inner)]
    if not modules:
        raise ValueError(f"{type(inner).__name__} has no attention modules.")
    if not any(getattr(module, "is_causal", True) for module in modules):
        raise ValueError(
            f"{type(inner).__name__} has no causal attention: it is an encoder (or set up as one: is_decoder), or its "
            "prompts see themselves both ways. Shifted sparse attention is for decoders; train it with "
            'attn_implementation="sdpa".'
        )
    window = _window_everywhere(inner.config)
    if window is not None:
        logger.warning(
            f"{type(inner).__name__} has a sliding window of {window} tokens in every layer, and layers with a window "
            "stay as they are: nothing is left to be sparse. Load the model with sliding_window=None to have it "
            "attend to the whole length."
        )
    if inner.config._attn_implementation != NAME:
        inner.set_attn_implementation(NAME)
    state = _state(inner)
    state = S2State(config or S2AttentionConfig(), state.mode if state is not None else "auto")
    for module in modules:
        setattr(module, _ATTRIBUTE, state)


def _window_everywhere(config: PreTrainedConfig) -> int | None:
    """The window of a model all of whose layers have one that its length goes beyond."""
    config = config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or window >= getattr(config, "max_position_embeddings", window):
        return None
    return window if kinds is None or set(kinds) == {"sliding_attention"} else None


def _state(model: nn.Module) -> S2State | None:
    return next((getattr(m, _ATTRIBUTE) for _, m in attention_modules(model) if hasattr(m, _ATTRIBUTE)), None)


def get_s2_attention(model: nn.Module) -> S2State:
    """The state shared by the layers of a model: its configuration and mode.

    Raises:
        ValueError: if the model does not use `"s2attn"`.
    """
    inner = _transformers_model(model)
    if inner.config._attn_implementation != NAME:
        raise ValueError(
            f"{type(inner).__name__} uses attn_implementation={inner.config._attn_implementation!r}, not {NAME!r}: "
            "call hf_longlora.set_s2_attention(model) first."
        )
    state = _state(inner)
    if state is None or not all(hasattr(module, _ATTRIBUTE) for _, module in attention_modules(inner)):
        set_s2_attention(inner, None if state is None else state.config)
        state = _state(inner)
    assert state is not None
    return state


def set_attention_mode(model: nn.Module, mode: AttentionMode) -> None:
    """Set when the layers of `model` are sparse: `"auto"` (in training), `"s2"` or `"dense"` (always).

    Raises:
        ValueError: on another mode, or a model that does not use `"s2attn"`.
    """
    if mode not in get_args(AttentionMode):
        raise ValueError(f"`mode` must be one of {get_args(AttentionMode)}, got {mode!r}.")
    get_s2_attention(model)
    for _, module in attention_modules(_transformers_model(model)):
        getattr(module, _ATTRIBUTE).mode = mode  # usually one object; layers may have been given others


@contextmanager
def s2_attention_mode(model: nn.Module, mode: AttentionMode) -> Iterator[None]:
    """Run `model` with attention as in training (`"s2"`), dense (`"dense"`), or as usual (`"auto"`).

    `with s2_attention_mode(model, "s2"):` around an evaluation gives the first column of the paper's Table 6, a model
    tested with the pattern that it was trained with.
    """
    before = get_s2_attention(model).mode
    set_attention_mode(model, mode)
    try:
        yield
    finally:
        set_attention_mode(model, before)


def register() -> None:
    """Register `"s2attn"` with transformers. Idempotent; what has been registered in its place since stays."""
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, s2_attention_forward)
        AttentionMaskInterface.register(NAME, s2_mask)
