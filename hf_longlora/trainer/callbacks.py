"""What puts a stage on a model: a function of the step, with no state of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..attention import get_s2_attention, set_attention_mode
from ..hub.run import evaluation_losses
from ..rope import RopeScaling, apply_rope, write_length
from ..schedule import Schedule
from ..tuner import longlora_tuner


class ContextStageCallback(TrainerCallback):
    """Sets RoPE, group size and attention mode from `state.global_step` at the start of each optimizer step.

    Keeps nothing between steps: a run resumed anywhere is in the state that an unbroken one would be in. Ends each
    stage with a log, with a checkpoint unless saving is off, and with an evaluation if epochs are evaluated. `ropes`
    has `None` for the RoPE that the model comes with.
    """

    def __init__(self, schedule: Schedule, ropes: Sequence[RopeScaling | None]) -> None:
        self.schedule = schedule
        self.ropes = ropes

    def apply(self, model: nn.Module, global_step: int, processing_class: Any = None) -> None:
        """Put `model` in the state in which the optimizer step after `global_step` steps runs.

        The tokenizer, which is saved beside it, gets the new length as its limit.
        """
        step = self.schedule.step(global_step)
        rope = self.ropes[step.stage]
        if rope is not None:
            tuner = longlora_tuner(model)
            if tuner is not None:
                tuner.set_rope(rope)
            else:
                apply_rope(model, rope)
            write_length(processing_class, rope)
        attention = get_s2_attention(model)  # one state, which all layers read: no walk over them
        attention.config, attention.mode = self.schedule.attention_config(step.stage), step.mode

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Resumed after the last step, nothing is trained any more, but what is saved has the last stage's RoPE.
        step = min(state.global_step, self.schedule.max_steps - 1)
        self.apply(kwargs["model"], step, kwargs.get("processing_class"))

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.apply(kwargs["model"], state.global_step, kwargs.get("processing_class"))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule.step(state.global_step - 1).last_of_stage:
            control.should_log = True
            control.should_save = control.should_save or args.save_strategy != "no"
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "epoch"
            _release_memory()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # To Trainer the run is one epoch, and its end is the last stage's: it has been logged, evaluated and saved.
        if self.schedule.last_step(state.global_step).last_of_stage:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        set_attention_mode(kwargs["model"], "auto")  # sparse in training, dense elsewhere; RoPE stays the last stage's


def _release_memory() -> None:
    """Give back what the allocators keep: blocks of a stage's sizes, which fit no other length.

    With activation offloading that is much of the host's memory: of 206 GiB pinned at 524,288 tokens 70 were left over
    from 262,144 (`benchmarks/results/train_step.csv`).
    """
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # torch >= 2.12
            torch.accelerator.empty_host_cache()


class StageProgressCallback(ProgressCallback):
    """One line a stage: progress, loss, tokens a second, memory, and the time left to the end of all stages."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self._stage = -1  # the stage that the bar shows

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.training_bar = None

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        number, stages = self.schedule.step(state.global_step).stage, self.schedule.stages
        if self.training_bar is not None and number == self._stage:
            return
        self._close()
        self._stage = number
        before = self.schedule.ends[number] - stages[number].max_steps
        self.training_bar = tqdm(
            total=stages[number].max_steps,
            initial=state.global_step - before,  # a resumed stage goes on where it was
            desc=f"stage {number + 1}/{len(stages)}, {stages[number].max_length:,} tokens",
            unit="step",
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        if "tokens_per_second" in logs:
            speed = float(logs["tokens_per_second"])
            # Tokens tell the time left better than steps: the stages' steps differ in length.
            left = self._tokens_left(state.global_step) * args.examples_a_step
            self.training_bar.set_postfix_str(
                f"loss {float(logs['loss']):.3f}, {speed:,.0f} tokens/s, {float(logs['peak_memory_gib']):.1f} GiB, "
                f"all done in {tqdm.format_interval(left / max(speed, 1e-9))}"
            )
        for what, loss in evaluation_losses(logs).items():
            self.training_bar.write(f"step {state.global_step}: {what} {loss:.3f}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def _tokens_left(self, global_step: int) -> int:
        """Tokens of one sequence a step, from `global_step` to the end."""
        left = 0
        for stage in self.schedule.stages:
            done = min(global_step, stage.max_steps)
            global_step -= done
            left += (stage.max_steps - done) * stage.max_length
        return left
