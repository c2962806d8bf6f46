"""The rows as a Markdown table, each beside dense training of the same base, length, steps and seed; and their plot.

python -m benchmarks.quality.table [--target 4096] [--plot FILE]
"""

import argparse
from pathlib import Path
from typing import Any

from ..provenance import RESULTS, read_rows
from .data import CORPORA

Row = dict[str, str]


def group(row: Row) -> tuple[str, ...]:
    """Rows of one group may be compared: their differences are the methods'."""
    return tuple(row[k] for k in ("base", "target", "rope_type", "seed", "learning_rate", "eval_windows"))


def excess(rows: list[Row]) -> list[tuple[Row, dict[str, float]]]:
    """Rows with the excess of their dense perplexity at the target over dense training's, in per cent."""
    dense = {group(row): row for row in rows if row["name"] == "dense"}
    found = []
    for row in rows:
        beside = dense.get(group(row))
        if beside is not None:
            columns = {corpus: f"{corpus}_{row['target']}" for corpus in CORPORA}
            found.append((row, {c: (float(row[k]) / float(beside[k]) - 1) * 100 for c, k in columns.items()}))
    return found


def markdown(rows: list[Row]) -> str:
    target = rows[0]["target"]
    names = [f"{corpus} {what}" for corpus in CORPORA for what in ("512", target, "above dense", "as trained")]
    lines = ["| run | seed | cost | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for row, above in excess(rows):
        cells = [row["name"], row["seed"], f"{float(row['attention_cost'] or 0):.2f}"]
        for corpus in CORPORA:
            cells += [f"{float(row[f'{corpus}_{what}']):.2f}" for what in ("512", target)]
            cells += [f"{above[corpus]:+.1f}%", f"{float(row[f'{corpus}_trained']):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Excess perplexity against attention cost, both corpora; the front is what nothing beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CORPORA), figsize=(13, 5.5), sharey=True)
    points: list[tuple[Row, dict[str, float]]] = [
        (row, above) for row, above in excess(rows) if row["attention_cost"] and row["name"] != "dense"
    ]
    for axis, corpus in zip(axes, CORPORA, strict=True):
        kinds: dict[str, list[Any]] = {}
        for row, above in points:
            kind = "dense, cut short" if row["method"] == "dense" else "S2"
            kind = "S2, then dense" if float(row["dense_tail"]) else kind
            kind = "S2, each layer dense in turn" if int(row["rotate"]) else kind
            kind = "S2, each k-th step dense" if int(row["dense_every"]) else kind
            kinds.setdefault(kind, []).append((float(row["attention_cost"]), above[corpus], row["name"], row["seed"]))
        for kind, found in kinds.items():
            axis.scatter([p[0] for p in found], [p[1] for p in found], label=kind, s=28)
            for cost, value, name, seed in found:
                if seed == "0":
                    axis.annotate(
                        name.replace("s2 ", "").replace("dense_every", "k"),
                        (cost, value),
                        fontsize=6.5,
                        xytext=(4, 3),
                        textcoords="offset points",
                    )
        front, best = [], float("inf")
        for cost, value in sorted(p[:2] for found in kinds.values() for p in found if p[3] == "0"):
            if value < best:
                front.append((cost, value))
                best = value
        axis.plot(*zip(*front, strict=True), color="grey", linewidth=0.8, zorder=0)
        axis.axhline(0.5, color="green", linewidth=0.8, linestyle=":")
        axis.axvline(0.3, color="green", linewidth=0.8, linestyle=":")
        axis.set_yscale("log")
        axis.set_xlabel("attention FLOPs of training, dense = 1")
        axis.set_title(f"{corpus}.validation, {rows[0]['target']} tokens, tested dense")
    axes[0].set_ylabel("perplexity above dense training, %")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--target", default="4096")
    parser.add_argument("--base", help="the base's id; default: that of the last row")
    parser.add_argument("--plot", type=Path, help="draw cost against perplexity into this file")
    args = parser.parse_args()
    rows = read_rows(args.results)
    base = args.base or rows[-1]["base"]
    rows = [row for row in rows if row["base"] == base and row["target"] == args.target]
    print(markdown(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
