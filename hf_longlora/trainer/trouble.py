"""What to say when a run goes wrong: divergence, and memory that is not enough."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import psutil
import torch

from ..modules import base_model
from ..schedule import Schedule
from .checkpoints import last_checkpoint
from .staged import StagedTrainer

LAST_GOOD_NAME = "last-good"
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
    """Whether a model that had learned something is now worse than a uniform guess, in the last two logs."""
    guess = math.log(vocabulary)
    return len(losses) > 2 and min(losses[-2:]) > guess and min(losses) < guess - 1


def out_of_memory(args: Any, schedule: Schedule, global_step: int, model: Any) -> str:
    """What to say of the step after `global_step` steps, or of the evaluation then."""
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
    """What would save memory, cheapest first; leaves out what the run does already.

    `hf-longlora plan --config` says what each brings.
    """
    batch = args.per_device_train_batch_size
    steps = batch * args.gradient_accumulation_steps
    # transformers 5.23 renamed it, and keeps the old name in step with the new.
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


class WatchedTrainer(StagedTrainer):
    """A trainer that stops where the loss or a gradient is not finite, or the loss worse than a guess."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # Alone, a process stops at the loss; several stop together, at the gradients that they share.
        if self.args.world_size == 1 and not loss.isfinite():
            self._stop_at_divergence("loss")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer's, which it asks for before each optimizer step; the run stops at one that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        # fp16's loss scaler skips such steps by itself, and DeepSpeed's engine has taken the step by now.
        if not (self.args.fp16 or self.is_deepspeed_enabled) and not torch.as_tensor(norm).isfinite():
            self._stop_at_divergence("gradient")
        return norm

    def _stop_at_divergence(self, what: str) -> NoReturn:
        """Keep the weights, which the step has not touched, and stop the run."""
        step = self.schedule.step(self.state.global_step)
        path = os.path.join(str(self.args.output_dir), LAST_GOOD_NAME)
        self.save_model(path, _internal_call=True)  # which keeps it from the Hub
        raise FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} (stage {step.stage + 1}) is not finite. The weights "
            f"before it are in {path}. The last batch begins with {self._documents}. Lower the learning rate, clip "
            "gradients (max_grad_norm), or look at the data."
        )

    def _check_losses(self) -> None:
        """Raise a `FloatingPointError` if the loss has grown beyond that of a uniform guess.

        It goes by the log, which all processes have alike.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        losses = [float(entry["loss"]) for entry in self.state.log_history if "loss" in entry]
        if has_diverged(losses, vocabulary):
            step, checkpoint = self.state.global_step, last_checkpoint(str(self.args.output_dir))
            raise FloatingPointError(
                f"The run has diverged: the loss is {losses[-1]:.2f} at step {step} (stage "
                f"{self.schedule.last_step(step).stage + 1}), above the {math.log(vocabulary):.2f} of a uniform guess "
                f"over {vocabulary:,} tokens, and was {min(losses):.2f}. The last batch begins with "
                f"{self._documents}. Lower the learning rate, or look at the data. "
                + (f"The last checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet.")
            )

    @property
    def _documents(self) -> str:
        """How the documents of this process's last batch begin."""
        return beginnings(self._last_batch, self.processing_class)
