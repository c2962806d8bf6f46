"""The whole bench in one command: prepare the data, train the base, fill the tables; what is there is not done again.

    python -m benchmarks.quality.run --corpus DIR --work DIR [--tables schedule what_to_train]

Rows are appended to the table as they finish. With `--shard 0/2` and `--shard 1/2` two processes share the work and
the GPU; their rows say so, for their times are not those of a run that has the GPU to itself.
"""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..provenance import RESULTS, append_row, provenance, read_rows
from .base import BaseRun, train_base
from .extend import Run, extend
from .prepare import prepare


def schedule_table(target: int = 4096, seed: int = 0) -> list[Run]:
    """Group size and dense steps: perplexity against attention cost (issue 3's third table), by priority."""
    common = {"target": target, "seed": seed}

    def s2(ratio: int, every: int = 0, **more: object) -> Run:
        label = f"s2 1/{ratio}" + (f" dense_every {every}" if every else "")
        label += "".join(f" {key} {value}" for key, value in more.items())
        return Run(name=label, group_size_ratio=1 / ratio, dense_every=every, **common, **more)  # type: ignore[arg-type]

    return [
        Run(name="rope only", method="rope", steps=0, **common),
        Run(name="dense", method="dense", **common),
        s2(4),
        s2(4, 8),
        s2(4, 16),
        s2(8, 8),
        s2(4, 4),
        s2(16, 4),
        s2(8, 4),
        s2(4, 10),
        s2(4, dense_tail=0.1),
        Run(name="dense cut 0.3", method="dense", cut=0.3, **common),
        s2(8, dense_tail=0.2),
        s2(8, rotate=8),
        s2(16, 8),
        s2(32, 4),
        s2(4, rotate=12),
        s2(16, rotate=4),
        s2(8, 6),
        Run(name="dense cut 0.2", method="dense", cut=0.2, **common),
        Run(name="dense cut 0.1", method="dense", cut=0.1, **common),
    ]


def what_to_train_table(target: int = 4096, seed: int = 0) -> list[Run]:
    """LoRA alone, with norms, with embeddings, with both (the paper's Table 2), under the default schedule."""
    common = {"target": target, "seed": seed, "dense_every": 8, "rank": 8}
    return [
        Run(name="lora", train_norms=False, train_embeddings=False, **common),
        Run(name="lora + norm", train_embeddings=False, **common),
        Run(name="lora + embed", train_norms=False, **common),
        Run(name="lora + both", **common),
    ]


TABLES = {
    "schedule": schedule_table,
    "what_to_train": what_to_train_table,
}


def key(row: dict[str, object]) -> tuple[str, ...]:
    """What makes a row the same row."""
    return tuple(str(row[k]) for k in ("name", "base", "target", "seed", "learning_rate", "steps", "batch", "rank"))


def wanted(tables: list[str], target: int, seeds: list[int], overrides: dict[str, object]) -> Iterator[Run]:
    for seed in seeds:
        for table in tables:
            for run in TABLES[table](target, seed):
                yield replace(run, **{k: v for k, v in overrides.items() if run.method != "rope"})  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="the corpus; not needed once --work holds its encoding")
    parser.add_argument("--work", type=Path, required=True, help="tokens, tokenizer and base; outside the repository")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--base", default="base", help="folder of the base in the work directory")
    parser.add_argument("--tables", nargs="*", choices=sorted(TABLES), default=["schedule"])
    parser.add_argument("--only", nargs="*", help="of these tables, the rows of these names")
    parser.add_argument("--target", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--eval-windows", type=int, default=384)
    parser.add_argument("--shard", default="0/1", help="which of how many processes this one is, e.g. 0/2")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many seconds")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.corpus is not None:
        prepare(args.corpus, args.work)
    base = args.work / args.base
    if not (base / "base.json").is_file():
        train_base(args.work, args.base, BaseRun())
    index, shards = map(int, args.shard.split("/"))
    overrides = {k: v for k in ("learning_rate", "steps", "batch") if (v := getattr(args, k)) is not None}
    base_id = json.loads((base / "base.json").read_text())["id"]
    runs = [run for run in wanted(args.tables, args.target, args.seeds, overrides)]
    if args.only:
        runs = [run for run in runs if run.name in args.only]
    done = {key(row) for row in read_rows(args.results)}
    for run in runs[index::shards]:
        if key({**vars(run), "base": base_id}) in done:
            continue
        if time.perf_counter() - started > args.seconds:
            print("out of time", flush=True)
            break
        begun = time.perf_counter()
        try:
            row = extend(run, base, args.work, windows=args.eval_windows)
        except Exception:  # the next row may well go
            print(f"FAILED {run.name}\n{traceback.format_exc()}", flush=True)
            continue
        append_row(args.results, {**row, "processes": shards, **provenance()})
        scores = " ".join(
            f"{k} {row[k]:.2f}" for c in ("books", "math") for k in (f"{c}_{run.target}", f"{c}_trained")
        )
        cost = row["attention_cost"] or 0.0
        print(f"{run.name:24} cost {cost:.3f} {scores} ({time.perf_counter() - begun:.0f} s)", flush=True)
        del row
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
