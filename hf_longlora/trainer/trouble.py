"""What to say when a run goes wrong: divergence, and memory that is not enough."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from .stages import Schedule


def beginnings(inputs: Mapping[str, Any], tokenizer: Any, documents: int = 4, tokens: int = 12) -> str:
    """How the first documents of a batch begin: the rows, and where positions restart the documents packed in them."""
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    starts = torch.zeros_like(ids, dtype=torch.bool) if positions is None else positions == 0
    starts[:, 0] = True
    found = [ids[row, at : at + tokens].tolist() for row, at in starts.nonzero()[:documents].tolist()]
    texts = [str(tokenizer.decode(part)) if tokenizer is not None else str(part) for part in found]
    more = int(starts.sum()) - len(found)
    return ", ".join(map(repr, texts)) + (f" and {more} more documents" if more > 0 else "")


def has_diverged(losses: Sequence[float], vocabulary: int) -> bool:
    """Whether a model that had learned something is now worse than a uniform guess, in the last two logs.

    Args:
        losses: Those logged, in order.
        vocabulary: Tokens that the model chooses from.
    """
    guess = math.log(vocabulary)
    return len(losses) > 2 and min(losses[-2:]) > guess and min(losses) < guess - 1


def diverged(losses: Sequence[float], vocabulary: int, stage: int, step: int, checkpoint: str | None) -> str:
    """What to say of it: the step that was last done, its stage (from 0), and where to go on from."""
    return (
        f"The run has diverged: the loss is {losses[-1]:.2f} at step {step} (stage {stage + 1}), above the "
        f"{math.log(vocabulary):.2f} of a uniform guess over {vocabulary:,} tokens, and was {min(losses):.2f}. Lower "
        "the learning rate. "
        + (f"The last checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet.")
    )


def out_of_memory(args: Any, schedule: Schedule, global_step: int, quantized: bool) -> str:
    """What to say of the step after `global_step` steps."""
    step = min(global_step, schedule.max_steps - 1)
    stage = schedule.step(step).stage
    return (
        f"Out of memory in step {step + 1} (stage {stage + 1}: {schedule.stages[stage].max_length:,} tokens in a "
        f"sequence, {args.per_device_train_batch_size} in a batch; peak {peak_memory(args.device):.1f} GiB). "
        f"What helps: {memory_advice(args, quantized)}. "
        "A run that has saved a checkpoint goes on from it (resume_from_checkpoint=True)."
    )


def memory_advice(args: Any, quantized: bool) -> str:
    """What makes a run smaller, in the order of what it costs.

    Args:
        args: The trainer's, which have some of it already.
        quantized: Whether the base is quantized.
    """
    batch = args.per_device_train_batch_size
    steps = batch * args.gradient_accumulation_steps
    # transformers 5.24 renamed it, and keeps the old name in step with the new.
    checkpointing = "gradient_checkpointing"
    if hasattr(args, "activation_checkpointing"):
        checkpointing = "activation_checkpointing"
    advice = (
        (batch > 1, f"per_device_train_batch_size=1 and gradient_accumulation_steps={steps}"),
        (not args.gradient_checkpointing, f"{checkpointing}=True"),
        (args.mlp_tile is None, "mlp_tile=4096 (the MLP by tiles of tokens)"),
        (not args.activation_offloading, "activation_offloading=True"),
        (not quantized, "a base quantized to 4 bits (QLoRA)"),
        (True, "shorter stages"),
    )
    return "; ".join(words for useful, words in advice if useful)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**30
    import resource  # everywhere else; counted in KiB, on macOS in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
