"""A loaded model as lm-eval's harness takes it: as it stands, RoPE and attention included, and no prompt cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from ..modules import base_model
from ..rope import forget_lengths


class LoadedModel(HFLM):
    """lm-eval's model for transformers around one that is loaded, wrapped by PEFT or not.

    lm-eval cuts a prompt from the left to what fits `length` with the answer, and says so in its log alone: the task's
    instruction and the chat template's begin are lost then, and the score is of another task. Here that is an error.

    Args:
        length: most tokens of a prompt with its answer.
        answered: called with how many prompts have been answered since.
    """

    def __init__(
        self, model: Any, tokenizer: Any, length: int, batch_size: int, answered: Callable[[int], Any]
    ) -> None:
        self.answered = answered
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # which gets a pad token, if it has none
            backend="causal",
            max_length=length,
            batch_size=batch_size,
        )

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BS, mask_BS = super().tok_batch_encode(strings, padding_side, None, False)
        if left_truncate_len is not None and ids_BS.shape[1] > left_truncate_len:
            raise ValueError(
                f"a prompt has {ids_BS.shape[1]:,} tokens, and {left_truncate_len:,} fit {self.max_length:,} with the "
                "answer: lm-eval would cut its begin off"
            )
        return ids_BS, mask_BS

    def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        forget_lengths(base_model(self.model))  # an answer follows from its prompt alone
        answers = super()._model_generate(context, *args, **options)
        self.answered(len(context))
        return answers
