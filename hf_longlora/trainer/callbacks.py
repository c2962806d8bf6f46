"""What puts a stage on a model: a function of the step, with no state of its own."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .sft_trainer import LongLoraSFTTrainer


class ContextStageCallback(TrainerCallback):
    """Sets RoPE, group size and attention mode from `state.global_step` at the start of each optimizer step.

    Keeps nothing between steps: a run resumed anywhere is in the state that an unbroken one would be in. Ends each
    stage with a log, and with a checkpoint unless saving is off.
    """

    def __init__(self, trainer: "LongLoraSFTTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < self.trainer.schedule.max_steps:  # else: resumed after the last step
            self.trainer.apply_step(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.apply_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:  # the loss scaler skips steps with infinite gradients by itself
            return
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            self.trainer.stop_at_divergence("gradient")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.schedule.step(state.global_step - 1).last_of_stage:
            control.should_log = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.end_schedule()
