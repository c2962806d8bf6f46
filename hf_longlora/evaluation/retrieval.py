"""Passkey retrieval: is a number found again, wherever it stands in a long text (LongLoRA section 4.3, table 5)?

The text is that of Mohtashami and Jaggi (arXiv 2305.16300, appendix C): a task, a filler that repeats, the passkey at
some depth, the filler again, and the question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .perplexity import _check_counts, _device, _evaluating, _suffix_logits

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
    "about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}"


class Passkey(NamedTuple):
    """Token ids of a text that hides a passkey, and those of the answer that should follow it."""

    prompt_ids: list[int]
    answer_ids: list[int]


def passkey_example(tokenizer: Any, length: int, depth: float, key: str) -> Passkey:
    """A text of exactly `length` tokens, its answer included, with the passkey at `depth` (0: first, 1: last).

    Examples to fine-tune on are made by it, too: `prompt_ids + answer_ids`.

    Raises:
        ValueError: if `depth` is outside [0, 1], or the parts don't fit in `length` tokens.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    head += encode(TASK)
    needle = encode(NEEDLE.format(key=key))
    # Cut where the question with and without its answer differ: a tokenizer may join what stands at the border.
    question, whole = encode(QUESTION), encode(QUESTION + ANSWER.format(key=key))
    border = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
    question, answer = whole[:border], whole[border:]
    room = length - len(head) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"a passkey text has at least {length - room} tokens with this tokenizer, more than {length}")
    filler = encode(FILLER)
    before = round(depth * room)
    haystack = filler * (room // len(filler) + 1)
    prompt = [*head, *haystack[:before], *needle, *haystack[: room - before], *question]
    return Passkey(prompt, answer)


def passkey_accuracy(
    model: nn.Module,
    tokenizer: Any,
    lengths: int | Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    trials: int = 10,
    digits: int = 5,
    seed: int = 0,
    progress: bool = True,
    device: str | torch.device | None = None,
) -> list[dict[str, Any]]:
    """How often a model finds a passkey of `digits` digits, by length and depth.

    A trial counts if greedy decoding would give the passkey: every token of it is the likeliest one after the text and
    the tokens before it, which one forward tells.

    Args:
        model: a causal language model, as for `perplexity_by_length`.
        tokenizer: the model's.
        lengths: lengths of the whole text in tokens.
        depths: where the passkey stands, 0 for the beginning and 1 for the end.
        trials: texts for each length and depth, each with another passkey.
        digits: digits of a passkey.
        seed: of the passkeys; the same ones for every model.
        progress: show a progress bar.
        device: where the ids are put. Default: the device of the model's embeddings.

    Returns:
        One record for each length and depth: `length`, `depth`, `accuracy` (0 to 1), `trials`.

    Raises:
        ValueError: a length too short for the text, a depth outside [0, 1], a count below 1.
    """
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    _check_counts(trials=trials, digits=digits)
    keys = random.Random(seed)
    records = []
    total = len(lengths) * len(depths) * trials
    with _evaluating(model), logging.tqdm(total=total, desc="passkey", unit="text", disable=not progress) as bar:
        for length in lengths:
            for depth in depths:
                found = 0
                for _ in range(trials):
                    key = str(keys.randrange(10 ** (digits - 1), 10**digits))
                    found += _answers(model, passkey_example(tokenizer, length, depth, key), device)
                    bar.update()
                records.append({"length": length, "depth": depth, "accuracy": found / trials, "trials": trials})
    return records


def _answers(model: nn.Module, passkey: Passkey, device: str | torch.device | None) -> bool:
    ids = torch.tensor([passkey.prompt_ids + passkey.answer_ids], device=device or _device(model))
    keep = len(passkey.answer_ids)
    likeliest = _suffix_logits(model, ids, keep).argmax(-1)
    return bool((likeliest == ids[:, -keep:].to(likeliest.device)).all())
