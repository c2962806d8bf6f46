"""The rows as Markdown, a table for each of `run.TABLES`, beside dense training of the same seed; and their plot.

python -m benchmarks.quality.table [--tables schedule rope] [--plot FILE]
python -m benchmarks.quality.table --results benchmarks/results/test.csv --tables final
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from ..provenance import RESULTS, read_rows
from .data import CORPORA
from .extend import Run
from .run import TABLES, key

Row = dict[str, str]


def group(row: Row) -> tuple[str, ...]:
    """Rows of one group may be compared: their differences are the methods'."""
    return tuple(row[k] for k in ("base", "target", "rope_type", "seed", "learning_rate", "steps", "eval_windows"))


def above_dense(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """By a row's `key`: its dense perplexity at the target above that of dense training, in per cent."""
    rows = list(rows)
    dense = {group(row): row for row in rows if row["name"] == "dense"}
    return {
        key(row): {c: (score(row, c) / score(dense[group(row)], c) - 1) * 100 for c in CORPORA}
        for row in rows
        if group(row) in dense
    }


def score(row: Row, corpus: str, what: str = "") -> float:
    """Perplexity with dense attention at the target, or what else is asked for."""
    return float(row[f"{corpus}_{what or row['target']}"])


def find(rows: Iterable[Row], run: Run) -> list[Row]:
    """A run's rows, one a seed."""
    rows = list(rows)
    asked = {key({**vars(replace(run, seed=int(row["seed"]))), "base": row["base"]}): row for row in rows}
    return [row for row in rows if key(row) in asked]


def markdown(rows: list[Row], runs: Iterable[Run]) -> str:
    """Means over the seeds; the excess of each seed, for it is what is compared."""
    above = above_dense(rows)
    names = [f"{corpus} {what}".strip() for corpus in CORPORA for what in ("", "above dense, %", "as trained")]
    lines = ["| run | cost | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for run in runs:
        found = sorted(find(rows, run), key=lambda row: row["seed"])
        if not found:
            continue
        cells = [run.name, f"{float(found[0]['attention_cost'] or 0):.3f}"]
        for corpus in CORPORA:
            excess = [above[key(row)][corpus] for row in found if key(row) in above]
            trained = mean(score(row, corpus, "trained") for row in found)
            cells.append(f"{mean(score(row, corpus) for row in found):.2f}")
            cells.append("" if run.name == "dense" else ", ".join(f"{value:+.2f}" for value in excess))
            cells.append(f"{trained:.2f}" if run.method == "s2" else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


KINDS = {
    "dense, cut short": lambda run: run.method == "dense",
    "S2 and more dense steps at the end": lambda run: run.dense_tail,
    "S2, each layer dense in turn": lambda run: run.rotate,
    "S2, each k-th step dense": lambda run: run.dense_every,
    "S2 alone": lambda run: True,
}


def plot(rows: list[Row], runs: Iterable[Run], path: Path) -> None:
    """Excess perplexity against attention cost, both corpora, means over the seeds; the line is the Pareto front."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    above = above_dense(rows)
    points: list[tuple[Run, float, dict[str, float]]] = []
    for run in runs:
        found = [row for row in find(rows, run) if key(row) in above and row["attention_cost"]]
        if found and run.name != "dense":
            excess = {corpus: mean(above[key(row)][corpus] for row in found) for corpus in CORPORA}
            points.append((run, float(found[0]["attention_cost"]), excess))
    figure, axes = plt.subplots(1, len(CORPORA), figsize=(13, 5.5))
    for axis, corpus in zip(axes, CORPORA, strict=True):
        kinds: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        for run, cost, excess in points:
            kinds[next(kind for kind, of in KINDS.items() if of(run))].append((cost, excess[corpus]))
            label = run.name.replace("s2 ", "").replace("dense_every ", "k=").replace("dense_tail", "tail")
            axis.annotate(
                label, (cost, excess[corpus]), fontsize=6.5, xytext=(4, 3), textcoords="offset points", clip_on=True
            )
        for kind, found in kinds.items():
            if found:
                axis.scatter(*zip(*found, strict=True), label=kind, s=28)
        front, best = [], float("inf")
        for cost, value in sorted((cost, excess[corpus]) for _, cost, excess in points):
            if value < best:
                front.append((cost, value))
                best = value
        axis.plot(*zip(*front, strict=True), color="grey", linewidth=0.8, zorder=0)
        axis.axhline(0.5, color="green", linewidth=0.8, linestyle=":")
        axis.axvline(0.3, color="green", linewidth=0.8, linestyle=":")
        axis.set_xlabel("attention FLOPs of training, dense = 1")
        axis.set_title(f"{corpus}, {rows[0]['target']} tokens, tested dense")
    axes[0].set_ylabel("perplexity above dense training, %")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--tables", nargs="*", choices=sorted(TABLES), default=list(TABLES))
    parser.add_argument("--base", help="the base's id; default: that of the last row")
    parser.add_argument("--plot", type=Path, help="draw the first table's perplexity against its cost into this file")
    args = parser.parse_args()
    rows = read_rows(args.results)
    if not rows:
        parser.error(f"{args.results} has no rows: python -m benchmarks.quality.run makes them")
    rows = [row for row in rows if row["base"] == (args.base or rows[-1]["base"])]
    for name in args.tables:
        print(f"### {name}\n\n{markdown(rows, TABLES[name])}\n")
    if args.plot:
        target = str(TABLES[args.tables[0]][0].target)
        plot([row for row in rows if row["target"] == target], TABLES[args.tables[0]], args.plot)


if __name__ == "__main__":
    main()
