"""The planner against measured steps: the plan of each row of train_step.csv and million.csv, and by how much it errs.

    python -m benchmarks.planning            # a table, and the largest errors
    python -m benchmarks.planning --csv      # the same as results/planning.csv

Needs no GPU. A row is compared if it is of our trainer (ours-*), on a card of the planner's table, and has no option
that the planner doesn't know. Memory is torch's peak of allocated bytes, time the median step, unless that is the
first of its length: kernels are chosen in it, and memory is taken. `floor` rows have no attention and stay out.
"""

import argparse
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import Qwen3Config

from hf_longlora import LongLoraConfig, S2AttentionConfig, plan_run
from hf_longlora.planning import LengthPlan, RunSettings, gpu_called

from .provenance import RESULTS, read_rows
from .step_methods import QWEN3_8B, model_config

KNOWN = {"cudnn", "flash", "liger", "compile", "tile", "selective", "offload", "qlora"}
TILE = 8192
"""As in the rows, from 32,768 tokens on."""
COLUMNS = ("gpu", "model", "method", "length", "gib", "planned_gib", "gib_error", "s", "planned_s", "s_error")


def planned(row: Mapping[str, str]) -> tuple[LengthPlan, float] | None:
    """The plan of a measured row, and its seconds a step; `None` for a row that the planner doesn't cover."""
    base, *options = row["method"].split("+")
    card = gpu_called(row["gpu"])
    if card is None or not base.startswith("ours-") or set(options) - KNOWN:
        return None
    group = int(row["group"] or 0)
    settings = RunSettings(
        adapter=LongLoraConfig(r=8),
        quantization="4bit" if "qlora" in options else None,
        fused="liger" in options or "compile" in options,
        mlp_tile=TILE if "tile" in options else None,
        selective_checkpointing="selective" in options,
        activation_offloading="offload" in options,
        attention=S2AttentionConfig(group_size=group or None, sink_tokens=0),  # rows are of the time before sinks
        dense_every=0,
        backend="flash" if "flash" in options else "cudnn" if "cudnn" in options else None,
    )
    length = int(row["length"])
    (found,) = plan_run(model_config(row["model"], length), [length], gpu=card, settings=settings).lengths
    return found, found.seconds_sparse if group else found.seconds_dense


def planned_shared(row: Mapping[str, str]) -> tuple[LengthPlan, float]:
    """The plan of a row of `million.csv`, whose cards share a sequence, and its seconds a step."""
    group, share = int(row["group"]), float(row["offload"])
    settings = RunSettings(
        adapter=LongLoraConfig(r=8),
        fused=row["liger"] == "1",
        mlp_tile=int(row["mlp_tile"]) or None,
        activation_offloading=share > 0,
        offload_share=share or 1.0,
        attention=S2AttentionConfig(group_size=group or None),
        dense_every=0,
        backend="cudnn" if row["kernel"] == "sdpa" else "flash",
        sequence_parallel=int(row["processes"]),
        sparse="s2",
    )
    config = Qwen3Config(**QWEN3_8B, tie_word_embeddings=False)
    card, length = gpu_called(row["gpu"]), int(row["tokens"])
    assert card is not None
    (found,) = plan_run(config, [length], gpu=card, settings=settings).lengths
    return found, found.seconds_sparse if group else found.seconds_dense


def compared(rows: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """A line for each row of `train_step.csv` that was measured to its end; of rows for the same thing the last, first
    steps aside."""
    rows = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["warm"] != "0")
    latest = {(row["gpu"], row["model"], row["method"], row["length"]): row for row in rows}
    for row in latest.values():
        found = planned(row)
        if found is not None:
            yield line(row, row["method"], int(row["length"]), *found)


def compared_shared(rows: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """A line for each row of `million.csv` on a card of the planner's table."""
    for row in rows:
        if gpu_called(row["gpu"]) is not None:
            step = row["group"] if row["step"] == "sparse" else "dense"
            yield line(row, f"{step} on {row['processes']}", int(row["tokens"]), *planned_shared(row))


def line(row: Mapping[str, str], method: str, length: int, plan: LengthPlan, seconds: float) -> dict[str, Any]:
    """What was measured, what was planned, and by how much that errs: time not where it is of first steps."""
    gib, measured = float(row["peak_gpu_gib"]), float(row["s_p50"])
    return {
        "gpu": row["gpu"],
        "model": row["model"],
        "method": method,
        "length": length,
        "gib": gib,
        "planned_gib": round(plan.total, 2),
        "gib_error": plan.total / gib - 1,
        "s": measured,
        "planned_s": round(seconds, 3),
        "s_error": None if row["warm"] == "0" else seconds / measured - 1,
    }


def percent(error: float | None) -> str:
    return "" if error is None else f"{error:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the tables' folder")
    parser.add_argument("--csv", action="store_true", help="write results/planning.csv")
    args = parser.parse_args()
    lines = list(compared(read_rows(args.results / "train_step.csv")))
    lines += compared_shared(read_rows(args.results / "million.csv"))
    if not lines:
        raise SystemExit(
            f"{args.results} has no row that the planner covers: run benchmarks.train_step on a GPU first."
        )
    for line in lines:
        print(
            f"{line['gpu']:24} {line['model']:5} {line['method']:20} {line['length']:9,}  "
            f"{line['gib']:6.1f} GiB, planned {line['planned_gib']:6.1f} ({line['gib_error']:+6.1%})  "
            f"{line['s']:8.3f} s, planned {line['planned_s']:8.3f} ({percent(line['s_error']):>6})"
        )
    for what in ("gib_error", "s_error"):
        worst = max((line for line in lines if line[what] is not None), key=lambda line: abs(line[what]))
        print(f"largest {what}: {worst[what]:+.1%} ({worst['method']}, {worst['length']:,} tokens)")
    if args.csv:
        with (RESULTS / "planning.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for line in lines:
                errors = {what: percent(line[what]) for what in ("gib_error", "s_error")}
                writer.writerow(line | errors)


if __name__ == "__main__":
    main()
