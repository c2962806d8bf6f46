"""What to say when a run goes wrong: divergence, and memory that is not enough."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import psutil
import torch
from peft import PeftModel

from ..modules import base_model
from ..planning import Gpu, plan_run
from ..schedule import Schedule
from ..tuner import LongLoraConfig
from .plans import run_settings

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


def out_of_memory(args: Any, schedule: Schedule, global_step: int, model: Any, gpu: Gpu | None) -> str:
    """What to say of the step after `global_step` steps, or of the evaluation then.

    Args:
        args: The trainer's.
        schedule: The stages.
        global_step: Steps that are done.
        model: What is trained.
        gpu: The card, if the planner knows it: then it says what each remedy brings.
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
    remedies = memory_remedies(args, quantization_of(model))
    planned = planned_memory(args, schedule, number, model, gpu, remedies) if gpu is not None else {}
    advice = [words + (f" ({planned[words]:.0f} GiB)" if words in planned else "") for words in remedies]
    return (
        f"Out of memory in step {step + 1} (stage {number + 1}: {length:,} tokens in a sequence, "
        f"{args.per_device_train_batch_size} in a batch; peak {peak_memory(args.device):.1f} GiB"
        + (f", planned {planned['']:.0f} GiB on one {gpu.name}" if gpu is not None and planned else "")
        + f"). What helps: {'; '.join(advice)}; shorter stages. "
        f"{GOES_ON}"
    )


def memory_remedies(args: Any, quantization: str | None) -> dict[str, dict[str, Any]]:
    """What makes a run smaller, in the order of what it costs: in words, and as the planner's settings.

    Args:
        args: The trainer's, which have some of it already.
        quantization: Of the base.
    """
    batch = args.per_device_train_batch_size
    steps = batch * args.gradient_accumulation_steps
    # transformers 5.24 renamed it, and keeps the old name in step with the new.
    checkpointing = "gradient_checkpointing"
    if hasattr(args, "activation_checkpointing"):
        checkpointing = "activation_checkpointing"
    remedies: tuple[tuple[bool, str, dict[str, Any]], ...] = (
        (
            batch > 1,
            f"per_device_train_batch_size=1 and gradient_accumulation_steps={steps}",
            {"batch_size": 1, "gradient_accumulation_steps": steps},
        ),
        (not args.gradient_checkpointing, f"{checkpointing}=True", {"gradient_checkpointing": True}),
        (
            args.selective_checkpointing,
            f"{checkpointing}_kwargs without selective",
            {"selective_checkpointing": False},
        ),
        (args.mlp_tile is None, "mlp_tile=4096 (the MLP by tiles of tokens)", {"mlp_tile": 4096}),
        (
            not args.activation_offloading,
            "activation_offloading=True",
            {"activation_offloading": True, "gradient_checkpointing": True},
        ),
        (quantization is None, "a base quantized to 4 bits (QLoRA)", {"quantization": "4bit"}),
    )
    return {words: changes for useful, words, changes in remedies if useful}


def planned_memory(
    args: Any, schedule: Schedule, stage: int, model: Any, gpu: Gpu, remedies: Mapping[str, dict[str, Any]]
) -> dict[str, float]:
    """Planned peaks in GiB: as it is (`""`), and with each remedy alone. Empty for what the planner does not know."""
    adapter: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    if isinstance(adapter, LongLoraConfig):  # one that is on a model holds that model's RoPE and names
        kept = ("r", "target_modules", "rank_pattern", "use_dora", "train_norms", "train_embeddings", "embedding_rank")
        adapter = LongLoraConfig(**{name: getattr(adapter, name) for name in kept})
    config = base_model(model).config
    length = schedule.stages[stage].max_length
    found = {}
    try:
        settings = run_settings(
            args, schedule, stage, adapter=adapter, dtype=config.dtype, quantization=quantization_of(model)
        )
        for words, changes in {"": {}, **remedies}.items():
            found[words] = plan_run(config, [length], gpu=gpu, settings=settings, **changes).lengths[0].total
    except ValueError:  # settings or models that can't be planned; the words of the remedies stay
        return {}
    return found


def quantization_of(model: Any) -> Literal["4bit", "8bit"] | None:
    """Of a base quantized by bitsandbytes."""
    base = base_model(model)
    if getattr(base, "is_loaded_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(base, "is_loaded_in_8bit", False) else None


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**30
    import resource  # everywhere else; counted in KiB, on macOS in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
