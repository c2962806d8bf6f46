"""A step in windows as forwards of some of them, one after the other, where a run has no dense steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..attention.segments import Span
from ..rope import WITH_HISTORY, find_rope
from .staged import StagedTrainer
from .windows import boundaries

FILLER = 2
"""Tokens in a `filler`."""


class PiecewiseTrainer(StagedTrainer):
    """A trainer whose steps in windows may be of several forwards."""

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """TRL's step; in a stage without dense steps windows come one after the other, short ones together.

        The loss is a sum over tokens, and no token sees another window: losses and gradients of the parts add up to
        the whole's, and activations are those of one part. Where dense steps have room for the whole, nothing is
        gained by parts, and a small model is slower in them (135 M on an H200, 65,536 tokens: 1.6 s against 0.4).
        """
        step = super().training_step
        now = self.schedule.step(self.state.global_step)
        alone = now.mode == "windows" and self.schedule.dense_each(now.stage) == 0
        if not alone or num_items_in_batch is None or not self._adds_up:
            return step(model, inputs, num_items_in_batch, *args, **kwargs)
        ends, window = inputs["cu_seq_lens_q"].tolist(), self.schedule.native_window
        assert window is not None
        spans, fillers, all_fillers = pieces(ends, window), 0, 0
        if self.args.world_size > 1:  # processes meet in each forward
            own = torch.tensor([[len(spans), len(ends) - 1]], device=self.args.device)
            counts = self.accelerator.gather(own)
            most = int(counts[:, 0].max())
            spans = pieces(ends, window, most)
            fillers = most - len(spans)
            all_fillers = int((most - counts[:, 1]).clamp(min=0).sum())
        parts = [filler(inputs)] * fillers + [piece(inputs, ends, span) for span in spans]
        losses = []
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                losses.append(step(model, part, num_items_in_batch, *args, **kwargs))
        if all_fillers:
            self._total_train_tokens -= all_fillers * FILLER
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return torch.stack(losses).sum()

    @property
    def _adds_up(self) -> bool:
        """Whether the parts of a step in windows may run one after the other.

        Not where a forward of one process waits for the others' (weights that are sharded), where the loss is no sum
        over tokens (a balance of experts, a loss of the user's, as a function or a method), where noise goes by a
        forward's tokens (NEFTune), and where RoPE goes by its longest position.
        """
        rope = find_rope(self.model.config)
        return (
            not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            and not self.aux_loss_enabled
            and self.compute_loss_func is None
            and self._loss_is_ours
            and self.label_smoother is None
            and not self.args.neftune_noise_alpha
            and rope is not None
            and rope.rope_type not in WITH_HISTORY
        )

    @property
    def _loss_is_ours(self) -> bool:
        """Whether no subclass of a user's has a `compute_loss` of its own, which may be a mean."""
        owner = next(kind for kind in type(self).__mro__ if "compute_loss" in vars(kind))
        return owner.__module__.partition(".")[0] == __name__.partition(".")[0]


def pieces(ends: Sequence[int], most: int, count: int = 1) -> list[Span]:
    """Consecutive windows taken together, up to `most` tokens; in `count` pieces or more, if there are so many.

    Windows end at `ends`, which begin with 0; a piece is given as the half-open range of its windows.
    """
    found: list[Span] = []
    for window in range(len(ends) - 1):
        if found and ends[window + 1] - ends[found[-1][0]] <= most:
            found[-1] = (found[-1][0], window + 1)
        else:
            found.append((window, window + 1))
    while len(found) < min(count, len(ends) - 1):
        number = max(range(len(found)), key=lambda i: found[i][1] - found[i][0])
        first, end = found[number]
        middle = (first + end) // 2
        found[number : number + 1] = [(first, middle), (middle, end)]
    return found


def piece(inputs: Mapping[str, Any], ends: Sequence[int], of: Span) -> dict[str, Any]:
    """The windows `of` (half-open) of a row of `WindowCollator`'s, as a row of their own; `ends` is where all end."""
    start, end = ends[of[0]], ends[of[1]]
    row = {name: inputs[name][:, start:end] for name in ("input_ids", "labels", "position_ids")}
    return row | boundaries([at - start for at in ends[of[0] : of[1] + 1]], inputs["cu_seq_lens_q"].device)


def filler(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `FILLER` tokens from which nothing is learned, for a process that has fewer pieces than others."""
    row = {name: inputs[name][:, :1].expand(-1, FILLER) for name in ("input_ids", "labels")}
    row["labels"] = torch.full_like(row["labels"], -100)
    row["position_ids"] = torch.arange(FILLER, device=row["labels"].device)[None]
    return row | boundaries([0, FILLER], inputs["cu_seq_lens_q"].device)
