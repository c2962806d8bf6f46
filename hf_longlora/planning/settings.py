"""The settings of a run that decide its memory and time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig

from ..attention.config import S2AttentionConfig
from ..schedule import DENSE_EVERY, Schedule, SparseOption
from ..values import check_one_of, check_share, check_whole
from .gpus import Backend

Dtype = Literal["bfloat16", "float32"]
Quantization = Literal["4bit", "8bit"]
SHARED = (
    *("gradient_accumulation_steps", "gradient_checkpointing", "selective_checkpointing", "activation_offloading"),
    *("offload_share", "mlp_tile", "sequence_parallel"),
)
"""What the trainer's arguments call the same."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run that decide its memory and time.

    Args:
        adapter: A `LongLoraConfig` or another of PEFT's LoRA kind; `None` trains all weights.
        dtype: Of the base's weights, "bfloat16" or "float32"; computing is in bf16. What an adapter trains is fp32.
        quantization: "4bit" or "8bit": bitsandbytes, the layers' matrices alone.
        batch_size: Sequences in a forward, on one card.
        gradient_accumulation_steps: Forwards in an optimizer step.
        gradient_checkpointing: Whether each layer is computed again in the backward.
        fused: Whether norms and activations are fused: `use_liger_kernel` or `compile_layers`.
        mlp_tile: Tokens that an MLP takes at a time; `None`: all.
        selective_checkpointing: Whether checkpointing keeps attention's output, by TRL's
            `gradient_checkpointing_kwargs={"selective": True}`.
        activation_offloading: Whether checkpoints wait in the host's memory.
        offload_share: Of the checkpoints, which share then does; the others stay on the card.
        attention: Groups and sink tokens; by default groups are of the base's native window.
        dense_every: As the trainer's.
        sparse: As the trainer's: "s2", or "windows" or "pose" for windows of the base's native window; "auto" is what
            the trainer takes for plain text.
        sequence_parallel: Cards that share a sequence, each with the whole model; what they send each other is not
            counted.
        backend: Of attention; default the card's fastest.
    """

    adapter: PeftConfig | None = None
    dtype: Dtype = "bfloat16"
    quantization: Quantization | None = None
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    fused: bool = False
    mlp_tile: int | None = None
    selective_checkpointing: bool = False
    activation_offloading: bool = False
    offload_share: float = 1.0
    attention: S2AttentionConfig = field(default_factory=S2AttentionConfig)
    dense_every: int = DENSE_EVERY
    sparse: SparseOption = "auto"
    sequence_parallel: int = 1
    backend: Backend | None = None

    def __post_init__(self) -> None:
        check_one_of(Dtype, dtype=self.dtype)
        check_one_of(Quantization, quantization=self.quantization)
        check_one_of(SparseOption, sparse=self.sparse)
        counts = ("batch_size", "gradient_accumulation_steps", "sequence_parallel")
        check_whole(1, **{name: getattr(self, name) for name in counts})
        check_whole(1, none=True, mlp_tile=self.mlp_tile)
        check_whole(0, dense_every=self.dense_every)
        check_share(offload_share=self.offload_share)
        if self.quantization and self.adapter is None:
            raise ValueError("all weights can't be trained on a quantized base: give an adapter")
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError("activation offloading is planned with gradient checkpointing only")
        if self.offload_share < 1 and not self.activation_offloading:
            raise ValueError("offload_share is planned with activation offloading only")
        if self.selective_checkpointing and not self.gradient_checkpointing:
            raise ValueError("selective checkpointing is planned with gradient checkpointing only")
        if self.sparse in ("windows", "pose") and self.sequence_parallel > 1:
            raise ValueError("windows fit one card: none is shared")

    @classmethod
    def of(
        cls,
        args: Any,
        schedule: Schedule,
        stage: int,
        *,
        adapter: PeftConfig | None,
        dtype: torch.dtype,
        quantization: Quantization | None,
    ) -> RunSettings:
        """The settings of one stage (from 0) of a run; `args` are the trainer's."""
        return cls(
            adapter=adapter,
            dtype="float32" if dtype == torch.float32 else "bfloat16",
            quantization=quantization,
            batch_size=args.per_device_train_batch_size,
            fused=bool(args.use_liger_kernel or args.compile_layers),
            **{name: getattr(args, name) for name in SHARED},
            attention=schedule.attention_config(stage),
            sparse=schedule.sparse_by(stage),
            dense_every=1 if schedule.is_dense(stage) else schedule.dense_each(stage),
        )
