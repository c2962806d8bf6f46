"""A model as the planner sees it: widths and counts, read off its modules on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..attention import check_skipping, set_s2_attention
from ..modules import is_attention, is_mlp, is_norm, is_projection, language_modules, meta_model, sliding_windows
from ..rope import WITH_HISTORY, find_rope, native_window, natural_type
from .settings import RunSettings


@dataclass(frozen=True)
class Shape:
    """The sizes that memory and time follow from, read off the model's modules; widths are averages over layers."""

    parameters: int
    trainable: int
    weight_bytes: float
    """Base and adapter."""
    largest_matrix: int
    """Entries of the largest quantized matrix: it is unpacked to be used."""
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    query: int
    """Q: all query heads' widths."""
    keys_values: int
    """K: all keys' and values' widths."""
    mlp: float
    """W."""
    mixers: float
    """What the inputs of a layer's mixers other than attention (Mamba's, linear attention's) are projected to."""
    norms: float
    """Widths of a layer's norms."""
    trains_norms: bool
    lora_inputs: float
    """Widths of the inputs of a layer's adapted projections, of those that share one counted once; attention's output,
    kept anyway, and the MLP's inside left out."""
    lora_mlp: float
    """Width of the MLP's inside, where LoRA is on its way out."""
    layer_matrices: float
    """Entries of all layers' matrices that a token passes (of the experts, those it is sent to)."""
    head_matrix: int
    trained_matrices: float
    """Entries of matrices that get gradients themselves; 0 with an adapter."""
    cuttable: bool
    """Whether it can be trained in windows."""
    native_window: int | None
    """Tokens that the base was trained at before any scaling."""
    adds_up: bool
    """Whether the windows of a step run one after the other, as the trainer has it."""
    windows: tuple[int | None, ...]
    """The window of each layer with softmax attention; `None`: it sees all tokens."""

    @classmethod
    def of(cls, config: PreTrainedConfig, settings: RunSettings) -> Shape:
        text: Any = config.get_text_config()
        try:
            base = meta_model(config, dtype=getattr(torch, settings.dtype))
        except (ValueError, KeyError) as error:
            raise ValueError(f"a {config.model_type} is no causal language model: {error}") from error
        set_s2_attention(base)  # raises on what would not be trained
        try:
            check_skipping(type(base), config)
            cuttable = True
        except ValueError:
            if settings.sparse in ("windows", "pose"):
                raise
            cuttable = False
        layers, hidden = text.num_hidden_layers, text.hidden_size
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        key_dim = getattr(text, "qk_head_dim", None) or head_dim
        value_dim = getattr(text, "v_head_dim", None) or head_dim

        head = base.get_output_embeddings()
        found = _Layers.of(base, head, hidden, heads * head_dim, getattr(text, "num_experts_per_tok", None) or 1)
        total = sum(parameter.numel() for parameter in base.parameters())
        element = 4 if settings.dtype == "float32" else 2
        weight_bytes = float(total * element)
        if settings.quantization:
            # nf4: a scale of a byte for 64 weights, those quantized again (QLoRA, arXiv 2305.14314, section 3).
            weight_bytes -= found.packed * (element - (0.516 if settings.quantization == "4bit" else 1.0))

        head_matrix = head.weight.numel() if head is not None else 0
        trainable, lora_inputs, lora_mlp = total, 0.0, 0.0
        if settings.adapter is not None:
            trainable, lora_inputs, lora_mlp = _put_adapter(base, settings.adapter, hidden)
            weight_bytes += trainable * 4  # masters and LoRA are fp32, beside the base's own weights
        return cls(
            parameters=total,
            trainable=trainable,
            weight_bytes=weight_bytes,
            largest_matrix=found.largest if settings.quantization else 0,
            layers=layers,
            hidden=hidden,
            vocabulary=text.vocab_size,
            heads=heads,
            kv_heads=kv_heads,
            query=heads * key_dim,
            keys_values=kv_heads * (key_dim + value_dim),
            mlp=found.mlp / layers,
            mixers=found.mixers / layers,
            norms=found.norms / layers,
            trains_norms=settings.adapter is None or bool(getattr(settings.adapter, "train_norms", False)),
            lora_inputs=lora_inputs / layers,
            lora_mlp=lora_mlp / layers,
            layer_matrices=found.matrices,
            head_matrix=head_matrix,
            trained_matrices=0.0 if settings.adapter is not None else found.matrices + head_matrix,
            cuttable=cuttable,
            native_window=native_window(config, getattr(settings.adapter, "base_length", None)),
            adds_up=_adds_up(config),
            windows=sliding_windows(text),
        )


@dataclass
class _Layers:
    """What a token passes in all layers: entries of matrices, and widths."""

    matrices: float = 0.0
    mlp: float = 0.0
    mixers: float = 0.0
    norms: float = 0.0
    largest: int = 0
    """Of the matrices that quantization packs."""
    packed: int = 0
    """Entries of them all."""

    @classmethod
    def of(cls, base: Any, head: Any, hidden: int, of_heads: int, experts: int) -> _Layers:
        """Read off a model's modules, but for its head; `of_heads` is what its norms of queries or keys are wide over
        all heads, `experts` to how many of them a token is sent."""
        modules, found = language_modules(base), cls()
        inside = tuple(f"{name}." for name, module in modules if name and is_attention(module))
        if not inside:
            raise ValueError(f"{type(base).__name__} has no attention modules to plan for")
        parents = dict(modules)
        for name, module in modules:
            if module is head:
                continue
            weight: Any = getattr(module, "weight", None)
            if is_norm(module) and any(part.isdigit() for part in name.split(".")):
                found.norms += hidden if weight.numel() == hidden else of_heads  # q_norm and k_norm: per head
            elif is_projection(module):
                found.matrices += weight.numel()
                found.packed += weight.numel()
                found.largest = max(found.largest, weight.numel())
                out = getattr(module, "out_features", None) or weight.shape[1]
                taken = getattr(module, "in_features", None) or weight.shape[0]
                if taken == hidden and not name.startswith(inside):
                    parent = parents[name.rpartition(".")[0]]
                    if is_mlp(parent) or isinstance(parent, GradientCheckpointingLayer):  # OPT has no module for it
                        found.mlp += out
                    else:
                        found.mixers += out
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:  # experts: [experts, out, in]
                    found.matrices += parameter[0].numel() * experts
                    found.mlp += experts * max(parameter.shape[1:]) if "gate" in key or "up" in key else 0
        return found


def _put_adapter(base: Any, adapter: PeftConfig, hidden: int) -> tuple[int, float, float]:
    """Put an adapter on a model. Returns what it trains, and `lora_inputs` and `lora_mlp` of all layers."""
    with torch.device("meta"):  # put on a model, a config is resolved for that one
        tuned: Any = get_peft_model(base, copy.deepcopy(adapter))
    own = {id(p): p for p in tuned.parameters() if p.requires_grad}
    inputs, of_mlp = 0.0, 0.0
    blocks: set[str] = set()
    for name, module in tuned.named_modules():
        if not len(getattr(module, "lora_A", ())):  # of embeddings, whose LoRA keeps no input, it is empty
            continue
        block = name.rpartition(".")[0]
        in_attention = is_attention(tuned.get_submodule(block))
        if module.in_features > hidden and not in_attention:
            of_mlp += module.in_features
        elif block not in blocks:
            inputs += module.in_features
        blocks.add(block)
    return sum(p.numel() for p in own.values()), inputs, of_mlp


def _adds_up(config: Any) -> bool:
    """Whether a config gives the trainer a reason to run all windows at once: a balance of experts, or its RoPE."""
    text, rope = config.get_text_config(), find_rope(config)
    balanced = hasattr(text, "output_router_logits") and getattr(text, "router_aux_loss_coef", 0.0) != 0.0
    return rope is not None and natural_type(rope) not in WITH_HISTORY and not balanced
