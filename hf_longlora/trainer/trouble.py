"""What to say when a run goes wrong: divergence, and memory that is not enough."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from ..modules import base_model
from ..schedule import Schedule

GOES_ON = "A run that has saved a checkpoint goes on from it (resume_from_checkpoint=True)."


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


def diverged(
    losses: Sequence[float], vocabulary: int, stage: int, step: int, documents: str, checkpoint: str | None
) -> str:
    """What to say of it: the step that was last done, its stage (from 0) and documents, and where to go on from."""
    return (
        f"The run has diverged: the loss is {losses[-1]:.2f} at step {step} (stage {stage + 1}), above the "
        f"{math.log(vocabulary):.2f} of a uniform guess over {vocabulary:,} tokens, and was {min(losses):.2f}. The "
        f"last batch begins with {documents}. Lower the learning rate, or look at the data. "
        + (f"The last checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet.")
    )


def out_of_memory(args: Any, schedule: Schedule, global_step: int, model: Any) -> str:
    """What to say of the step after `global_step` steps, or of the evaluation then.

    Args:
        args: The trainer's.
        schedule: The stages.
        global_step: Steps that are done.
        model: What is trained.
    """
    if not model.training:
        batch, longest = args.per_device_eval_batch_size, schedule.stages[-1].max_length
        return (
            f"Out of memory in the evaluation after step {global_step} (up to {longest:,} tokens in a sequence, "
            f"{batch} in a batch; peak {peak_memory(args.device):.1f} GiB). What helps: "
            + ("per_device_eval_batch_size=1; " if batch > 1 else "")
            + 'shorter texts in eval_dataset; eval_strategy="no" and `hf-longlora evaluate` afterwards. '
            f"{GOES_ON}"
        )
    step = min(global_step, schedule.max_steps - 1)
    number = schedule.step(step).stage
    length = schedule.stages[number].max_length
    return (
        f"Out of memory in step {step + 1} (stage {number + 1}: {length:,} tokens in a sequence, "
        f"{args.per_device_train_batch_size} in a batch; peak {peak_memory(args.device):.1f} GiB). "
        f"What helps: {'; '.join(memory_remedies(args, model))}; shorter stages. {GOES_ON}"
    )


def memory_remedies(args: Any, model: Any) -> list[str]:
    """What makes a run smaller, in the order of what it costs, but for what its arguments or the model have already.

    `hf-longlora plan --config` says what each brings.
    """
    batch = args.per_device_train_batch_size
    steps = batch * args.gradient_accumulation_steps
    # transformers 5.24 renamed it, and keeps the old name in step with the new.
    checkpointing = "gradient_checkpointing"
    if hasattr(args, "activation_checkpointing"):
        checkpointing = "activation_checkpointing"
    base = base_model(model)
    quantized = getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    remedies = {
        f"per_device_train_batch_size=1 and gradient_accumulation_steps={steps}": batch > 1,
        f"{checkpointing}=True": not args.gradient_checkpointing,
        f"{checkpointing}_kwargs without selective": args.selective_checkpointing,
        "mlp_tile=4096 (the MLP by tiles of tokens)": args.mlp_tile is None,
        "activation_offloading=True": not args.activation_offloading,
        "a base quantized to 4 bits (QLoRA)": not quantized,
    }
    return [words for words, useful in remedies.items() if useful]


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**30
    import resource  # everywhere else; counted in KiB, on macOS in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
