"""The whole bench in one command: prepare the data, train the base, fill the tables; what is there is not done again.

    python -m benchmarks.quality.run --corpus DIR --work DIR [--tables schedule what_to_train] [--processes 4]

Rows are appended to the table as they finish. A model this small does not fill a large GPU: several processes may
share it. Their rows say so, for their times are not those of a run that has the GPU to itself.
"""

import argparse
import gc
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..provenance import RESULTS, append_row, provenance, read_rows
from .base import BaseRun, train_base
from .extend import Run, extend
from .prepare import prepare


def s2(ratio: int, every: int = 0, label: str = "", **more: Any) -> Run:
    if not label:
        label = f"s2 1/{ratio}" + (f" dense_every {every}" if every else "")
        label += "".join(f" {key} {value}" for key, value in more.items())
    return Run(name=label, group_size_ratio=1 / ratio, dense_every=every, **more)


def dense(cut: float = 1.0) -> Run:
    return Run(name="dense" if cut == 1 else f"dense cut {cut}", method="dense", cut=cut)


def lora(run: Run, rank: int) -> Run:
    """The same without norms and embeddings."""
    name = f"{run.name}, lora r {rank}"
    return replace(run, name=name, train_norms=False, train_embeddings=False, rank=rank)


BASE = [Run(name="base", method="base", steps=0), Run(name="rope only", method="rope", steps=0)]

# Group size and dense steps: perplexity against attention cost. In the order in which they matter.
SCHEDULE = [
    *BASE,
    dense(),
    s2(16, 4),
    s2(4),
    s2(4, 8),
    s2(16, 8),
    s2(8, 4),
    s2(32, 4),
    dense(0.3),
    s2(16),
    s2(8, 8),
    s2(4, 16),
    s2(4, 4),
    s2(16, rotate=4),
    s2(16, dense_tail=0.25),
    s2(16, 8, dense_tail=0.3, tail_every=2),
    s2(8),
    s2(2),
    s2(32),
    s2(16, 16),
    s2(16, 3),
    dense(0.2),
    dense(0.1),
]

# What is trained (the paper's Table 2), under the schedule that is the trainer's default.
WHAT_TO_TRAIN = [
    *(lora(s2(16, 4), rank) for rank in (8, 16, 32, 64, 128, 256)),
    s2(16, 4, label="s2 1/16 dense_every 4, lora r 8 + norm", train_embeddings=False, rank=8),
    s2(16, 4, label="s2 1/16 dense_every 4, lora r 8 + embed", train_norms=False, rank=8),
    s2(16, 4, label="s2 1/16 dense_every 4, lora r 8 + both", rank=8),
    s2(16, 4, label="s2 1/16 dense_every 4, full", full=True),
    lora(dense(), 64),
    replace(dense(), name="dense, full", full=True),
]

# What is shifted (Table 6), as the paper trained: without dense steps. Read "as trained" beside the target's column.
PATTERN = [dense(), s2(4), *(s2(4, shift=shift) for shift in ("layers", "none", "all"))]

# How RoPE is scaled, untrained, trained dense and trained as the trainer does by default.
ROPE = [
    replace(run, rope_type=kind)
    for kind in ("yarn", "linear", "dynamic", "llama3")
    for run in (BASE[1], dense(), s2(16, 4))
]

# One stage against two and three, at equal tokens.
# The last ones spend on dense steps what shorter stages save.
STAGES = [
    *(replace(run, name=f"{run.name} through {n}", through=n) for n in (2, 3) for run in (dense(), s2(16, 4))),
    s2(16, 3, through=2),
    s2(32, 2, through=3),
]

SIXTEEN_FOLD = [
    replace(run, target=8192, batch=4)
    for run in (
        *BASE,
        dense(),
        s2(16, 4),
        s2(16, 3, through=2),
        s2(16, 8, dense_tail=0.3, tail_every=2),
        s2(8, 5),
        s2(32, 4),
        s2(32, 2, through=3),
        s2(16, 8),
        s2(4),
        dense(0.3),
        lora(dense(), 64),
        lora(s2(16, 4), 64),
    )
]


def tried(run: Run, trial: str, **more: Any) -> Run:
    return replace(run, name=f"{run.name} {trial}", trial=trial, **more)


def rate(run: Run, learning_rate: float, **more: Any) -> Run:
    name = f"{run.name} lr {learning_rate:g}" + "".join(f" {key} {value}" for key, value in more.items())
    return replace(run, name=name, learning_rate=learning_rate, **more)


TRIAL = [
    replace(run, target=8192, batch=4)
    for run in (
        *(rate(lora(run, 64), 1e-3) for run in (dense(), s2(16, 4))),
        *(lora(run, 64) for run in (dense(), s2(16, 4))),
        rate(lora(s2(16, 2, dense_tail=0.667, tail_every=8), 64), 1e-3),
        *(rate(lora(run, 64), 6e-4) for run in (dense(), s2(16, 4))),
        *(rate(lora(run, 256), 6e-4) for run in (dense(), s2(16, 4))),
        dense(),
        *(rate(lora(run, 64), 1e-3, steps=320) for run in (dense(), s2(16, 4))),
        rate(tried(lora(s2(32, 5), 64), "groups 2 64 64 64"), 1e-3),
        rate(tried(lora(s2(16, 4), 64), "prefix 64"), 1e-3),
        s2(16, 4),
    )
]

# What is scored on the test splits, too.
PAIR = (dense(), s2(16, 4))
FINAL = [
    replace(run, target=target, batch=batch)
    for target, batch in ((4096, 8), (8192, 4))
    for run in (
        *BASE,
        *PAIR,
        *(lora(run, 64) for run in PAIR),
        *(rate(lora(run, 64), 6e-4) for run in PAIR),
        *(rate(lora(run, 64), 1e-3) for run in PAIR),
        *(rate(lora(run, 256), 6e-4) for run in PAIR),
        *(rate(lora(run, 64), 1e-3, steps=320) for run in PAIR),
    )
]

TABLES = {
    "schedule": SCHEDULE,
    "what_to_train": WHAT_TO_TRAIN,
    "pattern": PATTERN,
    "rope": ROPE,
    "stages": STAGES,
    "sixteen_fold": SIXTEEN_FOLD,
    "final": FINAL,
    "trial": TRIAL,
}


def wanted(tables: list[str], seeds: list[int], overrides: dict[str, Any]) -> Iterator[Run]:
    """The tables' runs for each seed; nothing is drawn at random where nothing is trained."""
    for seed in seeds:
        for table in tables:
            for run in TABLES[table]:
                if run.method not in ("base", "rope"):
                    yield replace(run, seed=seed, **overrides)
                elif seed == seeds[0]:
                    yield replace(run, target=overrides.get("target", run.target))


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes a row the same row."""
    return tuple(
        str(row[k]) for k in ("name", "base", "target", "rope_type", "seed", "learning_rate", "steps", "batch")
    )


def folder(run: Run) -> str:
    """Name of the folder that a run's model is saved in."""
    return f"{run.name} {run.target} seed {run.seed}".replace("/", "of").replace(" ", "-")


def one(
    run: Run, base: Path, work: Path, splits: Sequence[str], windows: int, save: Path | None, deadline: float
) -> dict[str, dict[str, Any]]:
    """A row for each split, in a process of the pool; none if the time is up."""
    if time.time() > deadline:
        return {}
    try:
        rows = extend(run, base, work, splits=splits, windows=windows, save=save and save / folder(run))
        return {split: {**row, **provenance()} for split, row in rows.items()}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="the corpus; not needed once --work holds its encoding")
    parser.add_argument("--work", type=Path, required=True, help="tokens, tokenizer and base; outside the repository")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--base", default="base", help="folder of the base in the work directory")
    parser.add_argument("--base-seconds", type=float, default=BaseRun.seconds, help="how long to train the base")
    parser.add_argument("--tables", nargs="*", choices=sorted(TABLES), default=["schedule"])
    parser.add_argument("--only", nargs="*", help="of these tables, the rows of these names")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--target", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--eval-windows", type=int, default=384)
    parser.add_argument("--test", action="store_true", help="score on the test splits, too: results/test.csv")
    parser.add_argument("--save", type=Path, help="save the models that are trained in this folder, a folder each")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many seconds")
    args = parser.parse_args()
    started = time.perf_counter()
    deadline = time.time() + args.seconds
    context = multiprocessing.get_context("spawn")
    if args.corpus is not None:
        prepare(args.corpus, args.work)
    base = args.work / args.base
    if not (base / "base.json").is_file():  # in a process of its own, which gives its memory back
        trainer = context.Process(target=train_base, args=(args.work, args.base, BaseRun(seconds=args.base_seconds)))
        trainer.start()
        trainer.join()
    base_id = json.loads((base / "base.json").read_text())["id"]
    overrides = {k: v for k in ("target", "learning_rate", "steps", "batch") if (v := getattr(args, k)) is not None}
    results = {"validation": args.results}
    if args.test:
        results["test"] = args.results.with_name("test.csv")
    done = {split: {key(row) for row in read_rows(path)} for split, path in results.items()}
    runs = [
        run
        for run in wanted(args.tables, args.seeds, overrides)
        if (not args.only or run.name in args.only)
        and any(key({**vars(run), "base": base_id}) not in keys for keys in done.values())
    ]
    print(f"{len(runs)} runs to do", flush=True)
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        options = (base, args.work, list(results), args.eval_windows, args.save, deadline)
        futures = {pool.submit(one, run, *options): run for run in runs}
        for future in as_completed(futures):
            run = futures[future]
            if error := future.exception():  # the next row may well go
                print(f"FAILED {run.name}", *traceback.format_exception(error), flush=True)
            for split, row in future.result().items() if not error else ():
                if key(row) not in done[split]:
                    append_row(results[split], {**row, "processes": args.processes})
                report(split, row, time.perf_counter() - started)


def report(split: str, row: dict[str, Any], seconds: float) -> None:
    names = [f"{corpus}_{what}" for corpus in ("books", "math") for what in (512, row["target"], "trained")]
    scores = " ".join(f"{name} {row[name]:.2f}" for name in names)
    cost = row["attention_cost"] or 0.0
    print(f"{seconds:4.0f} s {split[:4]} {row['name']:24} seed {row['seed']} cost {cost:.3f} {scores}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
