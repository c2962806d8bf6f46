"""RULER of a model that others trained, extended in several ways: retrieval, tracing and counting by length.

    python -m benchmarks.quality.ruler --work DIR --methods "yarn alone" dense default --trials 20
    python -m benchmarks.quality.ruler --work DIR --adapter DIR --trials 20

A method is one of `benchmarks.quality.pretrained`, trained as there (by default on books, at `--train-length` 65,536)
and merged; "base" and "yarn alone" train nothing. The tasks are those of `hf-longlora evaluate --tasks ruler` and need
lm-eval. A row of `results/ruler.csv` for each task and length; what is there is not done again.

Time is in decoding: 584 tokens for a text of each of the six tasks, one at a time (a batch would be padded, and dense
attention then holds a mask of the length's square; `--batch-size` is for short lengths). One process leaves most of a
GPU idle, so run several at once, a method each: rows are appended under a lock.

On a machine without a package index, beside this package's own dependencies (`pip install --no-index --no-deps
--find-links DIR`): lm-eval 0.4.13 (9.1 MB), lxml (5.2), nltk (1.7), regex (0.8), charset-normalizer (0.3), urllib3,
certifi, portalocker, sacrebleu, requests, idna, wonderwords, tabulate and colorama (0.8 together); for `fwe` scipy
(35 MB), too. Nothing else that lm-eval declares is imported.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longlora import ruler_accuracy
from hf_longlora.evaluation.ruler import TASKS, require_lm_eval

from ..provenance import RESULTS, append_row, provenance, read_rows
from .models import SOURCES
from .pretrained import METHODS, STEPS, Run, train

KEY = ("model", "corpus", "train_length", "method", "seed", "length", "task", "trials", "chat_template")


def extended(run: Run, folder: Path) -> Any:
    """A model extended as `run` says, with what was trained merged into it: decoding calls half as many kernels."""
    model, _ = train(run, folder, read_rows(RESULTS / "pretrained.csv"))
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def loaded(adapter: Path, folder: Path) -> Any:
    """The base with an adapter merged into it."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="what benchmarks.quality.models has filled")
    parser.add_argument("--model", default="smollm2", choices=list(SOURCES))
    parser.add_argument("--methods", nargs="+", default=["default"], choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--adapter", type=Path, help="a saved adapter in the place of methods")
    parser.add_argument("--corpus", default="books", help="what methods train on")
    parser.add_argument("--train-length", type=int, default=65_536, choices=list(STEPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16_384, 32_768, 65_536])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--no-chat-template", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "ruler.csv")
    args = parser.parse_args()
    require_lm_eval(args.tasks)
    folder, chat = args.work / args.model, not args.no_chat_template
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    reached = PeftConfig.from_pretrained(args.adapter).scaling.length if args.adapter else args.train_length
    for method in [f"adapter {args.adapter.name}"] if args.adapter else args.methods:
        known = {
            "model": args.model,
            "corpus": args.corpus,
            "train_length": reached,
            "method": method,
            "seed": args.seed,
            "trials": args.trials,
            "chat_template": int(chat),
        }
        done = {tuple(row[name] for name in KEY) for row in read_rows(args.results)}
        due = {
            length: [
                task
                for task in args.tasks
                if tuple(str((known | {"length": length, "task": task})[name]) for name in KEY) not in done
            ]
            for length in args.lengths
        }
        if not any(due.values()):
            continue
        if args.adapter:
            model = loaded(args.adapter, folder)
        else:
            where = {"model": args.model, "corpus": args.corpus, "length": args.train_length}
            model = extended(Run(**where, method=method, seed=args.seed), folder)
        if torch.cuda.is_available():
            model.cuda()
        for length, tasks in due.items():
            for task in tasks:
                started = time.perf_counter()
                options = {"trials": args.trials, "batch_size": args.batch_size, "chat_template": chat}
                [record] = ruler_accuracy(model, tokenizer, length, [task], progress=False, **options)
                row = {name: (known | record | {"chat_template": int(chat)})[name] for name in KEY}
                row |= {"accuracy": record["accuracy"], "error": record["error"]}
                row["seconds"] = time.perf_counter() - started
                append_row(args.results, row | provenance())
                print(
                    f"{method:34s} {length:6d} {task:16s} {record['accuracy']:.1%} ({row['seconds']:.0f} s)",
                    flush=True,
                )
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
