"""What is on trial: ideas for schedules and patterns. What wins moves into the package, the rest into the log.

A trial is words, such as "prefix 64" or "prefix 64, freeze q_proj k_proj":

- `prefix N`: the first N tokens of a document are seen by all groups.
- `freeze NAME ...`: the LoRA weights of these projections stand still in sparse steps.
- `sparse_lr X`: sparse steps have X times the learning rate.
- `groups A B ...`: sparse steps take turns with groups of 1/A, 1/B ... of the length.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_longlora import set_s2_attention
from hf_longlora.attention import kernels
from hf_longlora.attention.kernels.in_place import heads_of
from hf_longlora.attention.kernels.sdpa import progressions
from hf_longlora.attention.segments import Part
from hf_longlora.trainer.stages import Schedule


def parse(trial: str) -> dict[str, list[str]]:
    return {words[0]: words[1:] for words in (clause.split() for clause in trial.split(",")) if words}


def prefix_kernel(prefix: int) -> Callable[..., torch.Tensor]:
    """Groups that also see the first `prefix` tokens of the row; rows are whole documents of one length."""

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: Sequence[Part],
        *,
        scale: float | None = None,
        dropout_p: float = 0.0,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, _, length, _ = query.shape
        outs = []
        for heads, kv_heads, rows in parts:
            q, k, v = heads_of(query, heads), heads_of(key, kv_heads), heads_of(value, kv_heads)
            if len(rows[0]) == 1:
                part = [Part((0, q.shape[1]), (0, k.shape[1]), rows)]
                outs.append(kernels.KERNELS["sdpa"].function(q, k, v, part, scale=scale))
                continue
            out = torch.empty(batch, length, q.shape[1], v.shape[-1], dtype=q.dtype, device=q.device)
            pieces: list[tuple[list[int], torch.Tensor]] = []
            for start, gap, count, size in [(*rows[0][0], 1, 0), *progressions(rows[0][1:])]:
                if size == 0:  # the first segment, which has the prefix in it
                    start, gap, count, size = rows[0][0][0], 1, 1, rows[0][0][1]
                starts = [start + gap * i for i in range(count)]

                def fold(x: torch.Tensor, starts: list[int] = starts, size: int = size) -> torch.Tensor:
                    return torch.stack([x[:, :, at : at + size] for at in starts], 1).flatten(0, 1)

                qs, ks, vs = fold(q), fold(k), fold(v)
                mask = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
                if start > 0:
                    mask = torch.cat([mask.new_ones(size, prefix), mask], 1)
                    ks, vs = (
                        torch.cat([x[:, :, :prefix].repeat_interleave(count, 0), y], 2) for x, y in ((k, ks), (v, vs))
                    )
                group = qs.shape[1] // ks.shape[1]
                ks, vs = ks.repeat_interleave(group, 1), vs.repeat_interleave(group, 1)
                done = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, scale=scale)
                pieces.append((starts, done.unflatten(0, (batch, count)).transpose(2, 3)))
            for starts, done in pieces:
                for index, at in enumerate(starts):
                    out[:, at : at + done.shape[2]] = done[:, index]
            outs.append(out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    return kernel


class TrialCallback(TrainerCallback):
    """What a trial does at each step; comes after the callback of the stages."""

    def __init__(self, trial: str, schedule: Schedule) -> None:
        self.trial = parse(trial)
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "groups" in self.trial:
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
        if "groups" not in self.trial:
            return config
        ratios = [int(ratio) for ratio in self.trial["groups"]]
        sparse = sum(self.schedule.step(i).mode != "dense" for i in range(step))
        stage = self.schedule.stages[self.schedule.step(step).stage]
        return replace(config, group_size=stage.max_length // ratios[sparse % len(ratios)])


def register(trial: str) -> str | None:
    """The kernel of a trial, registered; `None` if it has none of its own."""
    words = parse(trial)
    if "prefix" not in words:
        return None
    name = "prefix " + words["prefix"][0]
    kernels.KERNELS[name] = kernels.Kernel(function=prefix_kernel(int(words["prefix"][0])))
    return name


def prefix_pairs(trial: str, length: int, segments: Sequence[tuple[int, int]]) -> int:
    """Query-key pairs that a prefix adds."""
    return int(parse(trial).get("prefix", ["0"])[0]) * (length - segments[0][1])
