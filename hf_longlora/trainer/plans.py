"""What a run takes, stage by stage, before its weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from ..planning import Gpu, LengthPlan, RunPlan, RunSettings, plan_run
from ..planning.plan import as_plain_text
from ..planning.settings import Quantization
from ..rope import AUTO
from .config import LongLoraSFTConfig
from .guards import settled


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Args:
        step: Memory and time of a step on one card.
        steps: Optimizer steps.
        sequences: Of the stage's length, in all of its steps and on all cards.
    """

    step: LengthPlan
    steps: int
    sequences: int

    @property
    def hours(self) -> float:
        return self.steps * self.step.seconds / 3600

    def __str__(self) -> str:
        row = self.step
        room = "" if row.fits else " (too much for this card)"
        return (
            f"{row.length:,} tokens: {row.total:.1f} GiB{room}, {row.seconds:.3g} s a step, {self.steps:,} steps "
            f"({self.sequences:,} sequences, {self.sequences * row.length / 1e6:,.1f} M tokens), {self.hours:.2g} h"
        )


def plan_stages(
    config: PreTrainedConfig,
    args: LongLoraSFTConfig,
    gpu: Gpu,
    *,
    adapter: PeftConfig | None,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    gpus: int = 1,
    columns: Collection[str] = (),
) -> tuple[RunPlan, list[StagePlan]]:
    """The plan of a run's last stage, whose notes are the run's, and memory and time of each stage on a card.

    Args:
        gpus: Cards, each with the model, and with sequences of its own or a share in others' (`sequence_parallel`).
        columns: The dataset's: conversations and completions are not cut into windows. Without any it is planned for
            plain text, and a note says so.

    Raises:
        ValueError: if it can't be planned.
    """
    unsettled, args = args.sparse == AUTO and not columns, copy.copy(args)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    _, schedule = settled("", args, config, model_class, adapter, columns)
    if gpus % args.sequence_parallel > 0:
        raise ValueError(f"sequence_parallel={args.sequence_parallel} needs a multiple of as many GPUs, not {gpus}.")
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus // args.sequence_parallel
    plans, stages = [], []
    for number, stage in enumerate(schedule.stages):
        settings = RunSettings.of(args, schedule, number, adapter=adapter, dtype=dtype, quantization=quantization)
        plans.append(plan_run(config, [stage.max_length], gpu=gpu, settings=settings))
        stages.append(StagePlan(plans[-1].lengths[0], stage.max_steps, stage.max_steps * sequences))
    plan = plans[-1]
    if unsettled and schedule.any_windows:
        plan = replace(plan, notes=(as_plain_text(schedule.native_window), *plan.notes))
    return plan, stages
