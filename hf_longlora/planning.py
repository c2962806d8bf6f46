"""Memory and time of a training step, before it runs and from the model's config alone.

Memory is counted in bytes a tensor at a time: what autograd keeps of a decoder layer, in the dtypes in which PEFT, TRL
and transformers keep it. Counted against torch's own record of live storages it is right to a percent, and against
steps on GPUs to what `benchmarks/planning.py` prints. Time is arithmetic over achievable rates: matrix products and
attention in FLOPs, everything between them in bytes.

Letters: T tokens in a forward, h hidden size, W what the MLP's inputs are projected to (gate and up together), Q and K
the widths of all queries and of all keys and values, L layers, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .attention.segments import Documents
from .from_hub import read_config
from .tuner import LongLoraConfig
from .tuner.modules import is_norm, is_projection, language_modules

GIB = 2**30
Backend = Literal["cudnn", "flash"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A card's data sheet, and what of it attention reaches."""

    name: str
    memory_gib: float
    """As torch reports it."""
    tflops: float
    """bf16, dense, fp32 accumulation."""
    bandwidth: float
    """Of its memory, GB/s."""
    link: float
    """To the host, GB/s: what pinned copies reach of PCIe's 32 or 64."""
    attention: dict[Backend, float]
    """Share of `tflops` that attention reaches over long segments, forward and backward."""
    measured: bool = False
    """Whether a step on it stands in `benchmarks/results/`."""


HOPPER: dict[Backend, float] = {"cudnn": 0.56, "flash": 0.33}  # benchmarks/results/attention.csv: 554 and 326 of 989
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="H200", memory_gib=139.8, tflops=989, bandwidth=4800, link=50, attention=HOPPER, measured=True),
        Gpu(name="H100", memory_gib=79.2, tflops=989, bandwidth=3350, link=50, attention=HOPPER),
        Gpu(name="H100-PCIe", memory_gib=79.2, tflops=756, bandwidth=2000, link=50, attention=HOPPER),
        Gpu(name="A100-80GB", memory_gib=79.2, tflops=312, bandwidth=2039, link=24, attention={"flash": 0.6}),
        Gpu(name="A100-40GB", memory_gib=39.4, tflops=312, bandwidth=1555, link=24, attention={"flash": 0.6}),
        Gpu(name="L40S", memory_gib=44.4, tflops=362, bandwidth=864, link=24, attention={"flash": 0.5}),
        Gpu(name="A10G", memory_gib=22.1, tflops=70, bandwidth=600, link=24, attention={"flash": 0.6}),
        Gpu(name="RTX-4090", memory_gib=23.5, tflops=165, bandwidth=1008, link=24, attention={"flash": 0.7}),
        Gpu(name="RTX-3090", memory_gib=23.6, tflops=71, bandwidth=936, link=24, attention={"flash": 0.7}),
    )
}

COUNTED = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "olmo2", "granite", "smollm3", "gpt_neox"),
    *("starcoder2", "cohere", "gemma", "glm4", "stablelm"),
)
"""Families whose memory a token was compared with torch's record of live storages: 1% off for Llama's kind of layer,
11% at most. Others keep more than is counted: DeepSeek-V3 1.5 times, Gemma 3, whose norms are all fp32, more."""

# Fitted constants, and what to.
MATMUL_SHARE = 0.70
"""Of a card's FLOPs that long matrix products reach; with the two below, to the rows of train_step.csv."""
TRAFFIC, TRAFFIC_FUSED = 22.0, 11.0
"""Bytes moved between matrix products in a step with checkpointing, over the bytes that autograd keeps of a layer."""
SHORT_SEGMENT = 1600
"""Tokens in a segment at which attention runs at half its rate (benchmarks/results/attention.csv, cuDNN)."""
CONTEXT_GIB = 0.8
"""What CUDA and the libraries take of a card beside tensors."""
FRAGMENTATION = 1.06
"""Memory reserved over memory allocated, at the peak: 1.055 in the first row of train_step.csv."""
LOSS_TOKENS, LOSS_VOCABULARY = 4096, 8192
"""TRL's chunked loss computes logits by tiles of so many tokens and entries."""
NORM_BACKWARD, NORM_BACKWARD_FUSED = 20, 6
"""Bytes of h and token in the backward of a norm, beside what is kept of its layer."""
TOKEN_BYTES = 96
"""Of a token whatever the model: ids, labels, positions, log probabilities, entropy."""
STASHED = 3
"""Checkpoints that TRL's activation offloading has on the card at the peak: 2.8 in train_step.csv."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What of a run decides its memory and time.

    Args:
        adapter: A `LongLoraConfig` or another of PEFT's LoRA kind; `None` trains all weights.
        dtype: Of the base's weights, "bfloat16" or "float32"; computing is in bf16. What an adapter trains is fp32.
        quantization: "4bit" or "8bit": bitsandbytes, the layers' matrices alone.
        batch_size: Sequences in a forward, on one card.
        gradient_accumulation_steps: Forwards in an optimizer step.
        gradient_checkpointing: Whether each layer is computed again in the backward.
        fused: Whether norms and activations are fused: `use_liger_kernel` or `compile_layers`.
        mlp_tile: Tokens that an MLP takes at a time; `None`: all.
        activation_offloading: Whether checkpoints wait in the host's memory.
        chunked_loss: Whether the loss is computed by tiles (TRL >= 1.16 does) and never has all logits.
        group_size, group_size_ratio, dense_every: As the trainer's.
        backend: Of attention; default the card's fastest.
    """

    adapter: PeftConfig | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Literal["4bit", "8bit"] | None = None
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    fused: bool = False
    mlp_tile: int | None = None
    activation_offloading: bool = False
    chunked_loss: bool = True
    group_size: int | None = None
    group_size_ratio: float = 1 / 16
    dense_every: int = 4
    backend: Backend | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be bfloat16 or float32, got {self.dtype!r}")
        if self.quantization not in (None, "4bit", "8bit"):
            raise ValueError(f"quantization must be 4bit or 8bit, got {self.quantization!r}")
        if self.quantization and self.adapter is None:
            raise ValueError("all weights can't be trained on a quantized base: give an adapter")
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError("activation offloading is planned with gradient checkpointing only")
        for name in ("batch_size", "gradient_accumulation_steps", "mlp_tile"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dense_every < 0 or (self.group_size or 2) < 2 or not 0 < self.group_size_ratio <= 1:
            raise ValueError("dense_every must be at least 0, group_size at least 2, group_size_ratio in (0, 1]")

    def group(self, length: int) -> int:
        return self.group_size or max(math.ceil(self.group_size_ratio * length), 2)


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
    longest: int
    notes: tuple[str, ...]
    """What makes it less certain than it looks."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
            decoder with attention layers.
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
    shape = _Shape.of(config, settings)
    rows = tuple(_plan_length(shape, settings, card, length) for length in lengths)
    return RunPlan(
        model=name,
        gpu=card,
        parameters=shape.parameters,
        trainable=shape.trainable,
        lengths=rows,
        longest=_longest(shape, settings, card),
        notes=_notes(config.get_text_config(), shape, card),
    )


def _notes(config: Any, shape: _Shape, gpu: Gpu) -> tuple[str, ...]:
    notes = []
    if config.model_type not in COUNTED:
        notes.append(
            f"The activations of {config.model_type} have not been compared with a real step's: they may be up to "
            "twice what is planned."
        )
    if any(window is not None for window in shape.windows):
        notes.append("Layers with a sliding window are planned without their masks, a byte for each pair of tokens.")
    if not gpu.measured:
        notes.append(f"No step on this card has been measured: the {gpu.name}'s seconds are from its data sheet.")
    return tuple(notes)


def find_gpu(gpu: str | Gpu) -> Gpu:
    """A card by its name in `GPUS`, in any case; a `Gpu` is itself."""
    if isinstance(gpu, Gpu):
        return gpu
    found = [card for name, card in GPUS.items() if name.lower() == gpu.lower()]
    if not found:
        raise ValueError(f"unknown GPU {gpu!r}; known are {', '.join(GPUS)}")
    return found[0]


# --------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class _Shape:
    """What memory and time follow from, read off the model's modules; widths are those of one layer on average."""

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
    windows: tuple[int | None, ...]
    """Of each layer with softmax attention: its window; `None` for all tokens."""

    @classmethod
    def of(cls, config: PreTrainedConfig, settings: RunSettings) -> _Shape:
        text: Any = config.get_text_config()
        try:
            with torch.device("meta"):
                base: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
        except (ValueError, KeyError) as error:
            raise ValueError(f"a {config.model_type} is no causal language model: {error}") from error
        layers, hidden = text.num_hidden_layers, text.hidden_size
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        key_dim = getattr(text, "qk_head_dim", None) or head_dim
        value_dim = getattr(text, "v_head_dim", None) or head_dim

        modules = language_modules(base)
        inside = tuple(f"{name}." for name, module in modules if name and "Attention" in type(module).__name__)
        if not inside:
            raise ValueError(f"{type(base).__name__} has no attention modules to plan for")
        head = base.get_output_embeddings()
        chosen = getattr(text, "num_experts_per_tok", None) or 1
        matrices, mlp, norms, largest, packed = 0.0, 0.0, 0.0, 0, 0
        for name, module in modules:
            if module is head:
                continue
            weight: Any = getattr(module, "weight", None)
            if is_norm(module) and any(part.isdigit() for part in name.split(".")):
                norms += hidden if weight.numel() == hidden else heads * head_dim  # q_norm and k_norm: per head
            elif is_projection(module):
                matrices += weight.numel()
                packed += weight.numel()
                largest = max(largest, weight.numel())
                out = getattr(module, "out_features", None) or weight.shape[1]
                taken = getattr(module, "in_features", None) or weight.shape[0]
                if taken == hidden and not name.startswith(inside) and out > 1:
                    mlp += out
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:  # experts: [experts, out, in]
                    matrices += parameter[0].numel() * chosen
                    mlp += chosen * max(parameter.shape[1:]) if "gate" in key or "up" in key else 0
        total = sum(parameter.numel() for parameter in base.parameters())
        element = 4 if settings.dtype == "float32" else 2
        weight_bytes = float(total * element)
        if settings.quantization:
            # nf4: a scale of a byte for 64 weights, those quantized again (QLoRA, arXiv 2305.14314, section 3).
            weight_bytes -= packed * (element - (0.516 if settings.quantization == "4bit" else 1.0))

        trainable, lora_inputs, lora_mlp, trained_matrices = total, 0.0, 0.0, 0.0
        trains_norms = settings.adapter is None or bool(getattr(settings.adapter, "train_norms", False))
        if settings.adapter is None:
            trained_matrices = matrices + (head.weight.numel() if head is not None else 0)
        else:
            adapter = copy.deepcopy(settings.adapter)  # put on a model, a config is resolved for that one
            with torch.device("meta"):
                tuned: Any = get_peft_model(base, adapter)
            own = {id(p): p for p in tuned.parameters() if p.requires_grad}
            trainable = sum(p.numel() for p in own.values())
            weight_bytes += trainable * 4  # masters and LoRA are fp32, beside the base's own weights
            blocks: set[str] = set()
            for name, module in tuned.named_modules():
                if not len(getattr(module, "lora_A", ())):  # of embeddings, whose LoRA keeps no input, it is empty
                    continue
                block = name.rpartition(".")[0]
                in_attention = "Attention" in type(tuned.get_submodule(block)).__name__
                if module.in_features > hidden and not in_attention:
                    lora_mlp += module.in_features
                elif block not in blocks:
                    lora_inputs += module.in_features
                blocks.add(block)
        return cls(
            parameters=total,
            trainable=trainable,
            weight_bytes=weight_bytes,
            largest_matrix=largest if settings.quantization else 0,
            layers=layers,
            hidden=hidden,
            vocabulary=text.vocab_size,
            heads=heads,
            kv_heads=kv_heads,
            query=heads * key_dim,
            keys_values=kv_heads * (key_dim + value_dim),
            mlp=mlp / layers,
            norms=norms / layers,
            trains_norms=trains_norms,
            lora_inputs=lora_inputs / layers,
            lora_mlp=lora_mlp / layers,
            layer_matrices=matrices,
            head_matrix=head.weight.numel() if head is not None else 0,
            trained_matrices=trained_matrices,
            windows=_windows(text),
        )


def _windows(config: Any) -> tuple[int | None, ...]:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not kinds:
        sliding = window if getattr(config, "use_sliding_window", True) else None
        return (sliding,) * config.num_hidden_layers
    return tuple(window if "sliding" in kind or "chunked" in kind else None for kind in kinds if "linear" not in kind)


# --------------------------------------------------------------------------------------------------------------------
# Memory


def _kept_outside_the_mlp(shape: _Shape, settings: RunSettings) -> float:
    """Bytes a token that autograd keeps of one layer's attention and norms.

    bf16 inputs of LoRA's matrices, those that share one counted once; of each norm its input in fp32 and, if it is
    trained, its normalized input in bf16; queries and attention's output, keys and values in bf16, a fp32 number a
    head, RoPE's sines and cosines. Fused norms keep their input in bf16.
    """
    norms = (4 + 2 * shape.trains_norms) * shape.norms
    if settings.fused:  # the first norm's input is the layer's, and so the checkpoint
        norms = 2 * shape.norms - 2 * shape.hidden * settings.gradient_checkpointing
    inputs = 2 * shape.lora_inputs if settings.adapter is not None else 2 * (2 * shape.hidden + shape.query)
    attention = 4 * shape.query + 2 * shape.keys_values + 4 * shape.heads + 4 * shape.query / shape.heads
    return inputs + norms + attention


def _kept_of_the_mlp(shape: _Shape, settings: RunSettings) -> float:
    """Bytes a token of what is activated, the activation and its factor; fused, the activation is computed again."""
    return (2 if settings.fused else 3) * shape.mlp


def _memory(shape: _Shape, settings: RunSettings, length: int) -> dict[str, float]:
    """Bytes at the peak of a step, by what they are for."""
    tokens, h = float(settings.batch_size * length), shape.hidden
    stream = 4 if settings.dtype == "float32" else 2  # the dtype of what runs from layer to layer
    outside, inside = _kept_outside_the_mlp(shape, settings), _kept_of_the_mlp(shape, settings)
    whole = inside + 2 * shape.lora_mlp
    if settings.adapter is None:
        whole += shape.mlp  # what the way out of the MLP is multiplied with
    tile = min(tokens, settings.mlp_tile or tokens)
    if tile < tokens:
        inside = whole = 2.0 * h  # a tiled MLP keeps its input
    host = 0.0
    if settings.gradient_checkpointing:
        checkpoint = stream * h * tokens
        on_card = min(STASHED, shape.layers) if settings.activation_offloading else shape.layers
        saved = on_card * checkpoint
        host = (shape.layers - on_card) * checkpoint
    else:
        saved = shape.layers * tokens * (outside + whole)
    saved += tokens * TOKEN_BYTES

    # Backward of a layer, beside its own activations: in the MLP the gradients of its three inner tensors (fused, of
    # one) and of its output, then in the norm what fp32 takes.
    of_mlp = tokens * stream * h + tile * (1 if settings.fused else 3) * shape.mlp
    if tile < tokens:
        of_mlp += tokens * 2 * h + tile * _kept_of_the_mlp(shape, settings)
    of_norm = tokens * (NORM_BACKWARD_FUSED if settings.fused else NORM_BACKWARD) * h
    again = 0.0
    if settings.gradient_checkpointing:
        again = tokens * outside
        of_mlp += tokens * inside
    working = again + max(of_mlp, of_norm) + 2.0 * shape.largest_matrix
    if settings.chunked_loss:
        logits = 2 * min(tokens, LOSS_TOKENS) * min(shape.vocabulary, LOSS_VOCABULARY)
        # The last norm's, its output twice, and its gradient in fp32 and bf16.
        logits += tokens * (14 if settings.fused else 20) * h
    else:
        logits = 12.0 * tokens * shape.vocabulary  # bf16, fp32, and a gradient in each

    element = 4.0 if settings.adapter is not None or settings.dtype == "float32" else 2.0
    gradients = shape.trainable * element
    optimizer = shape.trainable * 2 * element  # AdamW's two moments; fused, so without temporaries
    earlier = gradients if settings.gradient_accumulation_steps > 1 else 0.0
    end = working + stream * h * tokens if settings.adapter is None else 2.0 * h * tokens
    phases = {  # gradients, activations, logits
        "loss": (earlier, saved, logits),
        "backward of the last layer": (earlier, saved + working, 0.0),
        "backward of the first": (gradients, end, 0.0),
    }
    grads, activations, logits = max(phases.values(), key=sum)
    return {
        "weights": shape.weight_bytes,
        "gradients": grads,
        "optimizer": optimizer,
        "activations": activations,
        "logits": logits,
        "host": host,
    }


# --------------------------------------------------------------------------------------------------------------------
# Time


def _attention_seconds(shape: _Shape, settings: RunSettings, gpu: Gpu, length: int, group: int | None) -> float:
    """All layers' attention over one sequence. A segment of G tokens has `G (G + 1) / 2` pairs of tokens."""
    share = gpu.attention[settings.backend] if settings.backend else max(gpu.attention.values())
    rate = share * gpu.tflops * 1e12
    document = ((0, length),)
    passes = 1 + 2.5 + settings.gradient_checkpointing  # backward: 5 products for the forward's 2
    widths = 2 * shape.query / shape.heads
    seconds = 0.0
    for window in shape.windows:
        if window is not None and window < length:
            pairs, effective = window * (length - window / 2), window
            seconds += passes * 2 * widths * shape.heads * pairs * (1 + SHORT_SEGMENT / effective) / rate
            continue
        for part in Documents((document,), length).parts(shape.heads, shape.kv_heads, group):
            work = sum(
                size * (size + 1) / 2 * (1 + SHORT_SEGMENT / size)
                for size in (end - start for start, end in part.rows[0])
            )
            seconds += passes * 2 * widths * len(range(*part.heads)) * work / rate
    return seconds


def _step_seconds(
    shape: _Shape, settings: RunSettings, gpu: Gpu, length: int, group: int | None, host: float
) -> float:
    tokens = settings.batch_size * length
    passes = 2 + settings.gradient_checkpointing  # forward, backward to the inputs, and the forward again
    products = 2 * tokens * (passes * shape.layer_matrices + shape.trained_matrices)
    products += 2 * tokens * shape.head_matrix * (2 + settings.chunked_loss)
    kept = _kept_outside_the_mlp(shape, settings) + _kept_of_the_mlp(shape, settings)
    moved = tokens * shape.layers * kept * (TRAFFIC_FUSED if settings.fused else TRAFFIC) * passes / 3
    if settings.quantization:
        moved += passes * 2 * 2 * shape.layer_matrices  # unpacked, and read
    seconds = products / (MATMUL_SHARE * gpu.tflops * 1e12) + moved / (gpu.bandwidth * 1e9)
    seconds += settings.batch_size * _attention_seconds(shape, settings, gpu, length, group)
    seconds = max(seconds, 2 * host / (gpu.link * 1e9))  # there and back, beside the computing
    # The optimizer reads and writes weights and moments, reads gradients; their norm and their zeros are three more.
    update = 40 * shape.trainable / (gpu.bandwidth * 1e9)
    return settings.gradient_accumulation_steps * seconds + update


def _plan_length(shape: _Shape, settings: RunSettings, gpu: Gpu, length: int) -> LengthPlan:
    memory = _memory(shape, settings, length)
    host = memory.pop("host")
    total = sum(memory.values())
    sparse = _step_seconds(shape, settings, gpu, length, settings.group(length), host)
    dense = _step_seconds(shape, settings, gpu, length, None, host)
    every = settings.dense_every
    seconds = sparse if every == 0 else (sparse * (every - 1) + dense) / every
    tokens = length * settings.batch_size * settings.gradient_accumulation_steps
    return LengthPlan(
        length=length,
        **{name: value / GIB for name, value in memory.items()},
        total=total / GIB,
        host=host / GIB,
        fits=_fits(total, gpu),
        seconds_sparse=sparse,
        seconds_dense=dense,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
    )


def _fits(total: float, gpu: Gpu) -> bool:
    return total / GIB * FRAGMENTATION + CONTEXT_GIB <= gpu.memory_gib


def _longest(shape: _Shape, settings: RunSettings, gpu: Gpu) -> int:
    def fits(thousands: int) -> bool:
        memory = _memory(shape, settings, 1024 * thousands)
        return _fits(sum(memory.values()) - memory["host"], gpu)

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= 2**16 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 1024 * low


def gpu_called(name: str) -> Gpu | None:
    """The card that torch calls `name` ("NVIDIA A100-SXM4-80GB"), if it is in the table."""

    def words(text: str) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", text.lower()))

    fitting = [gpu for gpu in GPUS.values() if words(gpu.name) <= words(name)]
    return max(fitting, key=lambda gpu: len(gpu.name), default=None)


def local_gpu() -> Gpu | None:
    """The card of this machine, if there is one and it is in the table."""
    return gpu_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


__all__ = ["GPUS", "Gpu", "LengthPlan", "RunPlan", "RunSettings", "find_gpu", "gpu_called", "local_gpu", "plan_run"]
