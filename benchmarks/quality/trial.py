"""What is on trial: ideas for schedules and patterns. What wins moves into the package, the rest into the log.

A trial is words, such as "prefix 64" or "prefix 64, freeze q_proj k_proj":

- `prefix N`: the first N tokens of a document are seen by all groups (`sink_tokens`).
- `freeze NAME ...`: the LoRA weights of these projections stand still in sparse steps.
- `sparse_lr X`: sparse steps have X times the learning rate.
- `groups A B ...`: sparse steps take turns with groups of 1/A, 1/B ... of the length.
"""

from dataclasses import replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_longlora import set_s2_attention
from hf_longlora.schedule import Schedule


def parse(trial: str) -> dict[str, list[str]]:
    return {words[0]: words[1:] for words in (clause.split() for clause in trial.split(",")) if words}


class TrialCallback(TrainerCallback):
    """What a trial does at each step; comes after the callback of the stages."""

    def __init__(self, trial: str, schedule: Schedule) -> None:
        self.trial = parse(trial)
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trial.keys() & {"groups", "prefix"}:
            set_s2_attention(kwargs["model"], self.attention(state.global_step))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule.step(state.global_step).mode == "dense":
            return
        names = self.trial.get("freeze", [])
        for name, parameter in kwargs["model"].named_parameters():
            if any(f".{frozen}." in name for frozen in names):
                parameter.grad = None
        if "sparse_lr" in self.trial:  # the scheduler sets the rate anew after each step
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= float(self.trial["sparse_lr"][0])

    def attention(self, step: int) -> Any:
        config = self.schedule.attention_config(self.schedule.step(step).stage)
        if "prefix" in self.trial:
            config = replace(config, sink_tokens=int(self.trial["prefix"][0]))
        if "groups" not in self.trial:
            return config
        ratios = [int(ratio) for ratio in self.trial["groups"]]
        sparse = sum(self.schedule.step(i).mode != "dense" for i in range(step))
        stage = self.schedule.stages[self.schedule.step(step).stage]
        return replace(config, group_size=stage.max_length // ratios[sparse % len(ratios)])
