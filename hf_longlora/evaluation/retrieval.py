"""Retrieval: is a number found again, wherever it stands in a long text?

Passkey (LongLoRA section 4.3, table 5): the text is that of Mohtashami and Jaggi (arXiv 2305.16300, appendix C): a
task, a filler that repeats, the passkey at some depth, the filler again, and the question.

Multi-needle (RULER's "multi-key", arXiv 2404.06654, section 3): a text hides several passkeys, each of a name, and the
question names one. A model that finds whatever stands out passes the first and fails this one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from ..values import check_whole
from .scoring import embedding_device, evaluating, suffix_logits

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
    "about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}"
NAMED_NEEDLE = "The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n"
NAMED_QUESTION = "What is the pass key of {name}? The pass key of {name} is"
NAMES = tuple(
    f"the {who}"
    for who in (
        *("baker", "farmer", "doctor", "sailor", "teacher", "painter", "lawyer", "singer"),
        *("driver", "writer", "miller", "hunter", "tailor", "banker", "gardener", "carpenter"),
    )
)


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
    return _example(tokenizer, length, [(depth, NEEDLE.format(key=key))], QUESTION, ANSWER.format(key=key))


def multi_needle_example(
    tokenizer: Any, length: int, depths: Sequence[float], keys: Sequence[str], names: Sequence[str], asked: int
) -> Passkey:
    """A text of exactly `length` tokens with a passkey for each name at the depth of the same index.

    The question is about the one at index `asked`; depths rise. Else as `passkey_example`.
    """
    needles = [
        (depth, NAMED_NEEDLE.format(name=name, key=key)) for depth, key, name in zip(depths, keys, names, strict=True)
    ]
    question, answer = NAMED_QUESTION.format(name=names[asked]), ANSWER.format(key=keys[asked])
    return _example(tokenizer, length, needles, question, answer)


def _example(
    tokenizer: Any, length: int, needles: Sequence[tuple[float, str]], question_text: str, answer_text: str
) -> Passkey:
    """The filler with each needle at its depth, and the question; `length` tokens with the answer."""
    depths = [depth for depth, _ in needles]
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must lie in [0, 1], got {depth}")
    if depths != sorted(depths):
        raise ValueError(f"the depths of several needles must rise, got {depths}")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    head += encode(TASK)
    hidden = [encode(text) for _, text in needles]
    # Cut where the question with and without its answer differ: a tokenizer may join what stands at the border.
    question, whole = encode(question_text), encode(question_text + answer_text)
    border = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
    question, answer = whole[:border], whole[border:]
    room = length - len(head) - sum(map(len, hidden)) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"a passkey text has at least {length - room} tokens with this tokenizer, more than {length}")
    filler = encode(FILLER)
    haystack = filler * (room // len(filler) + 1)
    prompt, done = head, 0
    for depth, needle in zip(depths, hidden, strict=True):
        before = round(depth * room)
        prompt += [*haystack[: before - done], *needle]
        done = before
    return Passkey([*prompt, *haystack[: room - done], *question], answer)


def passkey_accuracy(
    model: nn.Module,
    tokenizer: Any,
    lengths: int | Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    trials: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """How often a model finds a passkey of five digits, by length and depth.

    A trial counts if greedy decoding would give the passkey: every token of it is the likeliest one after the text and
    the tokens before it, which one forward tells.

    Args:
        model: a causal language model, as for `perplexity_by_length`.
        tokenizer: the model's.
        lengths: lengths of the whole text in tokens.
        depths: where the passkey stands, 0 for the beginning and 1 for the end.
        trials: texts for each length and depth, each with another passkey.
        seed: of the passkeys; the same ones for every model.

    Returns:
        One record for each length and depth: `length`, `depth`, `accuracy` (0 to 1), `trials`.

    Raises:
        ValueError: a length too short for the text, a depth outside [0, 1], a count below 1.
    """
    check_whole(1, trials=trials)
    keys = random.Random(seed)

    def example(length: int, depth: float) -> Passkey:
        return passkey_example(tokenizer, length, depth, _key(keys))

    return _accuracy(model, example, lengths, depths, trials, "passkey", progress)


def multi_needle_accuracy(
    model: nn.Module,
    tokenizer: Any,
    lengths: int | Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    trials: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """How often a model finds the passkey that is asked for among one at each of `depths`, by length and its depth.

    Args:
        model, tokenizer, lengths, trials, seed, progress: as in `passkey_accuracy`.
        depths: where the passkeys stand; each in turn is the one asked for. From 2 to 16 of them.

    Returns:
        One record for each length and depth: `length`, `depth`, `accuracy` (0 to 1), `trials`, `needles`.

    Raises:
        ValueError: as `passkey_accuracy`, or for fewer than 2 or more than 16 different depths.
    """
    check_whole(1, trials=trials)
    depths = sorted(set(depths))
    if not 2 <= len(depths) <= len(NAMES):
        raise ValueError(f"several needles need 2 to {len(NAMES)} different depths, got {depths}")
    draw = random.Random(seed)

    def example(length: int, depth: float) -> Passkey:
        names, keys = draw.sample(NAMES, len(depths)), [_key(draw) for _ in depths]
        return multi_needle_example(tokenizer, length, depths, keys, names, depths.index(depth))

    records = _accuracy(model, example, lengths, depths, trials, "needles", progress)
    return [record | {"needles": len(depths)} for record in records]


def _key(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


def _accuracy(
    model: nn.Module,
    example: Callable[[int, float], Passkey],
    lengths: int | Sequence[int],
    depths: Sequence[float],
    trials: int,
    what: str,
    progress: bool,
) -> list[dict[str, Any]]:
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    records = []
    total = len(lengths) * len(depths) * trials
    with evaluating(model), logging.tqdm(total=total, desc=what, unit="text", disable=not progress) as bar:
        for length in lengths:
            for depth in depths:
                found = 0
                for _ in range(trials):
                    found += _answers(model, example(length, depth))
                    bar.update()
                records.append({"length": length, "depth": depth, "accuracy": found / trials, "trials": trials})
    return records


def _answers(model: nn.Module, passkey: Passkey) -> bool:
    ids = torch.tensor([passkey.prompt_ids + passkey.answer_ids], device=embedding_device(model))
    keep = len(passkey.answer_ids)
    likeliest = suffix_logits(model, ids, keep).argmax(-1)
    return bool((likeliest == ids[:, -keep:].to(likeliest.device)).all())
