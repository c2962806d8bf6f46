"""RULER (arXiv 2404.06654) by lm-eval's harness: the tasks whose texts are made here, and not downloaded.

Retrieval (`niah_single_1`; `niah_multikey_2` and `niah_multikey_3`, whose whole text is needles like the one that is
asked for), variables traced over several assignments (`vt`), and the most frequent of many words (`cwe`, `fwe`). The
generators of the texts, the prompts, the decoding and the score are lm-eval's; ours are the length of a text, how many
there are, and that a prompt is never cut.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.utils.logging import tqdm

from ..values import check_whole
from .scoring import evaluating

SHORTEST = 512
"""Tokens below which RULER's texts hold next to nothing."""

ROOM = 128
"""Tokens kept free beside a chat template's: for what lm-eval's generators do not count, which are the begin of the
answer that a prompt ends with (70 tokens with a UUID in it) and the answer to `fwe` (50)."""

DOWNLOADED = (
    *("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue"),
    *("qa_squad", "qa_hotpot"),
)


Texts = Callable[[Any, int, int], list[dict[str, Any]]]
"""Makes `count` texts of at most `length` tokens: `texts(tokenizer, length, count)`."""


def ruler_accuracy(
    model: nn.Module,
    tokenizer: Any,
    lengths: int | Sequence[int],
    tasks: Sequence[str] | None = None,
    *,
    trials: int = 100,
    seed: int = 0,
    batch_size: int = 1,
    chat_template: bool | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """RULER's score of a model, by task and length. Needs lm-eval (`pip install 'hf-longlora[eval]'`).

    A text with its chat template, the begin of the answer and all tokens that may be generated has at most `length`
    tokens. Every model with the same tokenizer and chat template gets the same texts.

    Args:
        model, tokenizer: as for `passkey_accuracy`.
        lengths: tokens of a text with its answer, each at least 512. RULER's own begin at 4,096.
        tasks: names among `TASKS`. Default: all of them.
        trials: texts of each task at each length. RULER's own number is 500.
        seed: of the texts.
        batch_size: texts that are answered at once.
        chat_template: whether the text is a user's message. Default: if the tokenizer has a template.

    Returns:
        One record for each length and task: `task`, `length`, `accuracy` (0 to 1: the share of a text's answers that
        are found in what the model says, averaged over texts), `error` (its standard error), `trials`,
        `chat_template`.

    Raises:
        ImportError: lm-eval is missing.
        ValueError: an unknown task, or one whose texts are downloaded; a length too short for a task with this
            tokenizer; a chat template asked for that the tokenizer lacks; a count below 1.
    """
    check_whole(1, trials=trials, batch_size=batch_size)
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    names = check_tasks(list(TASKS) if tasks is None else tasks)
    if not lengths or min(lengths) < SHORTEST:
        raise ValueError(f"RULER needs lengths of at least {SHORTEST} tokens, got {lengths}")
    if chat_template is None:
        chat_template = bool(tokenizer.chat_template)
    if chat_template and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: chat_template=False gives it the bare texts")
    require_lm_eval(names)
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager, ruler
    from lm_eval.tasks.ruler.common_utils import process_results

    from .harness import LoadedModel

    with _quiet():
        manager = TaskManager(include_path=list(ruler.__path__), include_defaults=False)

    def score(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
        # lm-eval has a metric for each of six lengths, by a document's own, and the others' are -1.
        return {"accuracy": process_results(document, answers)[str(document["max_length"])]}

    records = []
    total = len(lengths) * len(names) * trials
    bar = tqdm(total=total, desc="ruler", unit="text", disable=not progress)
    with evaluating(model), bar, _quiet():
        for length in lengths:
            harness = LoadedModel(model, tokenizer, length, batch_size, answered=bar.update)
            room = length - ROOM - (_template_tokens(harness) if chat_template else 0)
            members = [
                {
                    "task": TASKS[name][0],
                    "custom_dataset": _dataset(*TASKS[name], tokenizer, room, trials, seed),
                    "process_results": score,
                    "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
                    "num_fewshot": 0,
                }
                for name in names
            ]
            loaded = manager.load([{"group": f"ruler at {length}", "task": members}])
            results = evaluate(harness, loaded, apply_chat_template=chat_template, log_samples=False)["results"]
            for name in names:
                found = results[TASKS[name][0]]
                record = {"task": name, "length": length, "accuracy": found["accuracy,none"]}
                error = found["accuracy_stderr,none"] if trials > 1 else None
                records.append(record | {"error": error, "trials": trials, "chat_template": chat_template})
    return records


def require_lm_eval(names: Sequence[str]) -> None:
    """Raise the `ImportError` that says what tasks need installed; import what of lm-eval would download something."""
    try:
        import lm_eval.models.huggingface
        import nltk
        import wonderwords  # noqa: F401

        if "fwe" in names:
            import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(f"RULER needs lm-eval ({error}): pip install 'hf-longlora[eval]'") from error
    with tempfile.TemporaryDirectory() as folder, _quiet():
        # Without NLTK's model of sentences the import downloads it, and none of `TASKS` uses it.
        Path(folder, "tokenizers", "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(folder)
        try:
            import lm_eval.tasks.ruler.prepare_niah  # noqa: F401
        finally:
            nltk.data.path.remove(folder)


def check_tasks(names: Sequence[str]) -> list[str]:
    """The names of tasks, each once; "ruler" stands for all of `TASKS`.

    Raises:
        ValueError: for one that is unknown, or whose texts are downloaded.
    """
    names = list(dict.fromkeys(task for name in names for task in (TASKS if name == "ruler" else (name,))))
    for name in names:
        if name in DOWNLOADED:
            raise ValueError(
                f"{name} of RULER downloads its texts; those that make their own are {', '.join(TASKS)}. It can be "
                "had from lm-eval itself, of a merged model (hf-longlora merge)."
            )
        if name not in TASKS:
            raise ValueError(f"no task {name!r}: there are ruler, which is all of {', '.join(TASKS)}")
    if not names:
        raise ValueError("no task is given")
    return names


def _dataset(
    name: str, texts_of: Texts, tokenizer: Any, length: int, trials: int, seed: int
) -> Callable[..., dict[str, Any]]:
    def make(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        # lm-eval's own makes 500 of each, whatever its limit, and reads the tokenizer from a name.
        random.seed(seed)
        np.random.seed(seed)
        texts = texts_of(tokenizer, length, trials)
        whole = [text for text in texts if text["outputs"] and all(a in text["input"] for a in text["outputs"])]
        if len(whole) < trials:
            raise ValueError(_too_short(name, length))
        return {"test": Dataset.from_list(texts)}

    return make


def _niah(haystack: Any, keys: str, values: str) -> Texts:
    def texts(tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
        from lm_eval.tasks.ruler.niah_utils import TEMPLATE
        from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

        return generate_samples(
            get_haystack(haystack),
            tokenizer,
            max_seq_length=length,
            template=TEMPLATE,
            type_haystack=haystack,
            type_needle_k=keys,
            type_needle_v=values,
            num_samples=count,
        )

    return texts


def _vt(tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.vt_utils import generate_input_output, sys_vartrack_w_noise_random

    _check_room("vt", tokenizer, generate_input_output(5, 1, 4, is_icl=True)[0], 500, 50)  # the example's
    shown = sys_vartrack_w_noise_random(tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    _check_room("vt", tokenizer, f"{shown['input']} {generate_input_output(10, 1, 4)[0]}", length, 50)
    return sys_vartrack_w_noise_random(tokenizer, count, length, _step(length), icl_example=shown)


def _cwe(tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.cwe_utils import RNG, sys_word_pair_random

    RNG.seed(0)  # one of the module's own shuffles the words
    return sys_word_pair_random(count, length, tokenizer, _step(length))


def _fwe(tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.fwe_utils import TEMPLATE, sys_kwext

    _check_room("fwe", tokenizer, TEMPLATE, length, 50)
    return sys_kwext(tokenizer, length, count)


def _step(length: int) -> int:
    """By how many sentences or words a text grows until it no longer fits, tokenized anew each time.

    10 in lm-eval, which takes a minute at 65,536 tokens. This is lm-eval's up to 8,192, and leaves 3% of longer texts
    empty at most.
    """
    return max(10, length // 800)


def _check_room(name: str, tokenizer: Any, shortest: str, length: int, more: int) -> None:
    """Where no text fits, these generators of lm-eval look for one without end."""
    if len(tokenizer(shortest, verbose=False)["input_ids"]) + more > length:
        raise ValueError(_too_short(name, length))


def _too_short(name: str, length: int) -> str:
    return (
        f"no text of {name} fits the {length} tokens that the chat template and the answer leave it, with this "
        "tokenizer: give longer lengths, or other tasks"
    )


TASKS: dict[str, tuple[str, Texts]] = {
    "niah_single_1": ("niah_single_1", _niah("repeat", "words", "numbers")),
    "niah_multikey_2": ("niah_multikey_2", _niah("needle", "words", "numbers")),
    "niah_multikey_3": ("niah_multikey_3", _niah("needle", "uuids", "uuids")),
    "vt": ("ruler_vt", _vt),
    "cwe": ("ruler_cwe", _cwe),
    "fwe": ("ruler_fwe", _fwe),
}
"""What lm-eval calls each, and its texts."""


def _template_tokens(harness: Any) -> int:
    """Tokens that the chat template puts around a message and the begin of its answer, and the first token."""
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    return len(harness.tok_encode(harness.apply_chat_template(history, add_generation_prompt=False)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings of what is meant here, what its generators print, and a bar for each of its steps."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
