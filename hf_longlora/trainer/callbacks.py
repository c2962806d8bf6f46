"""What puts a stage on a model: a function of the step, with no state of its own."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..attention import set_attention_mode, set_s2_attention
from ..rope import RopeScaling, apply_rope
from ..tuner import LongLoraModel
from .stages import Schedule


class ContextStageCallback(TrainerCallback):
    """Sets RoPE, group size and attention mode from `state.global_step` at the start of each optimizer step.

    Keeps nothing between steps: a run resumed anywhere is in the state that an unbroken one would be in. Ends each
    stage with a log, and with a checkpoint unless saving is off.

    Args:
        schedule: The stages.
        ropes: The RoPE of each stage; `None` where it is the one the model comes with.
    """

    def __init__(self, schedule: Schedule, ropes: Sequence[RopeScaling | None]) -> None:
        self.schedule = schedule
        self.ropes = ropes

    def apply(self, model: nn.Module, global_step: int) -> None:
        """Put `model` in the state in which the optimizer step after `global_step` steps runs."""
        plan = self.schedule.step(global_step)
        rope = self.ropes[plan.stage]
        if rope is not None:
            tuner = longlora_tuner(model)
            if tuner is not None:
                tuner.set_rope(rope)
            else:
                apply_rope(model, rope)
        set_s2_attention(model, self.schedule.attention_config(plan.stage))
        set_attention_mode(model, plan.mode)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < self.schedule.max_steps:  # else: resumed after the last step
            self.apply(kwargs["model"], state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.apply(kwargs["model"], state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule.step(state.global_step - 1).last_of_stage:
            control.should_log = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_attention_mode(kwargs["model"], "auto")  # sparse in training, dense elsewhere; RoPE stays the last stage's


def longlora_tuner(model: nn.Module) -> LongLoraModel | None:
    """The tuner of a model with a LONGLORA adapter."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, LongLoraModel) else None
