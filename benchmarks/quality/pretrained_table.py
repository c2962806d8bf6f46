"""The tables of `benchmarks/README.md` on models that others trained, and their plot, from `results/pretrained.csv`,
and of RULER's tasks from `results/ruler.csv`.

    python -m benchmarks.quality.pretrained_table            # the tables of benchmarks/README.md
    python -m benchmarks.quality.pretrained_table --all      # each method that has a row
    python -m benchmarks.quality.pretrained_table --write    # put there, the plot drawn; in README.md and docs a part

A line for each method: of dense training mean perplexities, of others how far they lie above dense training of the
same seed, corpus and length, in %, a number for each seed; over all of a window; over its last 2,048 tokens. Time is
that of the steps, on a GPU without other work, as a share of dense training's on the same kind of GPU with the same
kernels.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_longlora.evaluation.ruler import TASKS

from ..provenance import RESULTS, read_rows
from .models import SOURCES
from .pretrained import CHANGES, RECIPE

Row = dict[str, str]
ROOT = Path(__file__).parents[2]
THETA = ", abf 1.5"
"""What the names of methods with a larger theta end with."""
DENSE = "dense" + THETA
NAMES = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B", "gemma": "Gemma 3 270M"}
LINES = {
    DENSE: "dense",
    "dense of equal time" + THETA: "dense, as many steps as take the default's time",
    "dense, a quarter of the steps" + THETA: "dense, a quarter of the steps",
    RECIPE + THETA: "**each 2nd dense, windows (the default for plain text)**",
    **{f"windows, {n} dense{THETA}": f"each {n} dense, windows" for n in ("3rd", "4th", "10th")},
    **{f"pose of many rows, {n} dense{THETA}": f"each {n} dense, PoSE" for n in ("2nd", "3rd", "4th", "10th")},
    **{
        f"s2 native + sinks, {n} dense{THETA}": f"each {n} dense, S2 of the native length, 4 sink tokens"
        for n in ("2nd", "3rd", "4th", "10th")
    },
    f"s2 native, 4th dense{THETA}": "each 4th dense, S2 of the native length, no sink tokens",
    **{
        f"s2 native + {k} sinks, 4th dense{THETA}": f"each 4th dense, the same with {k} sink token{'s' * (k > 1)}"
        for k in (1, 16, 64)
    },
    f"s2 native + sinks, half of the shift undone, 4th dense{THETA}": "each 4th dense, with 4, half unshifted",
    f"s2 1/16 + sinks, 4th dense{THETA}": "each 4th dense, S2 1/16, 4 sink tokens",
    f"s2 1/16 to 1/4 + sinks, 4th dense{THETA}": "each 4th dense, S2 1/16, then 1/8, then 1/4, 4 sink tokens",
    f"native windows, 4th dense{THETA}": "each 4th dense, windows of the step's row alone",
    f"pose, 4th dense{THETA}": "each 4th dense, PoSE in the step's row",
    f"s2 native + sinks, 4th layer dense{THETA}": "each 4th layer dense, S2 of the native length, 4 sink tokens",
    f"windows{THETA}": "no dense step, windows",
    f"native windows, scattered{THETA}": "no dense step, windows of rows that are shuffled beforehand",
    f"native windows{THETA}": "no dense step, windows of the step's row alone",
    f"pose{THETA}": "no dense step, PoSE in the step's row",
    f"s2 1/4{THETA}": "no dense step, S2 1/4",
    "s2 1/4": "no dense step, S2 1/4, YaRN",
    "s2 1/4 linear (the paper)": "no dense step, S2 1/4, linear RoPE (the paper's recipe)",
    "dense": "dense, YaRN in the place of theta",
    "native windows": "no dense step, windows of the step's row alone, YaRN",
    "yarn alone": "nothing trained, YaRN",
    "abf 1.5 alone": "nothing trained, theta raised",
    "base": "the base as it is",
}
"""What the tables of benchmarks/README.md show, in their order, and how they call it."""
SHORT = (
    DENSE,
    f"dense of equal time{THETA}",
    *(f"windows, {n} dense{THETA}" for n in ("2nd", "3rd", "4th")),
    f"pose of many rows, 4th dense{THETA}",
    f"s2 native + sinks, 4th dense{THETA}",
    f"native windows, scattered{THETA}",
    f"pose{THETA}",
    "dense",
    "s2 1/4 linear (the paper)",
    "yarn alone",
)
"""What other pages show of them, at 65,536 tokens."""
UNTIMED = {f"pose, 4th dense{THETA}", f"pose{THETA}", "pose, 4th dense"}
"""Methods with rows from before the windows of a step ran at once (LOG, 2026-11-28)."""


def above(row: Row, dense: Sequence[Row], column: str) -> float | None:
    """How far a row lies above dense training of its seed, in %, with the same kernels where there is such a row."""
    for other in sorted(dense, key=lambda other: other["liger"] != row["liger"]):
        if all(row[name] == other[name] for name in ("model", "corpus", "length", "seed", "split")):
            return 100 * (float(row[column]) / float(other[column]) - 1)
    return None


def share(row: Row, dense: Sequence[Row]) -> float | None:
    """Seconds of training as a share of dense training's, on the same GPU with the same kernels."""
    if not row["train_seconds"] or row["shared_gpu"] == "1" or row["method"] in UNTIMED:
        return None
    same = ("model", "length", "gpu", "liger")
    times = [
        float(other["train_seconds"])
        for other in dense
        if all(row[name] == other[name] for name in same) and other["shared_gpu"] == "0"
    ]
    return float(row["train_seconds"]) / statistics.mean(times) if times else None


class Cell:
    """The rows of one method at one length, a row for each corpus and seed: that with Liger, where there are two."""

    def __init__(self, rows: Iterable[Row], dense: Sequence[Row]) -> None:
        kept: dict[tuple[str, int], Row] = {}
        for row in sorted(rows, key=lambda row: row["liger"]):
            kept[row["corpus"], int(row["seed"])] = row
        self.rows = [kept[key] for key in sorted(kept)]
        self.dense = dense

    def of(self, corpus: str) -> list[Row]:
        return [row for row in self.rows if row["corpus"] == corpus]

    def mean(self, corpus: str, column: str) -> float | None:
        values = [float(row[column]) for row in self.of(corpus) if row[column]]
        return statistics.mean(values) if values else None

    def above(self, corpus: str, column: str) -> list[float]:
        found = [above(row, self.dense, column) for row in self.of(corpus)]
        return [value for value in found if value is not None]

    @property
    def share(self) -> float | None:
        found = [value for row in self.rows if (value := share(row, self.dense)) is not None]
        return statistics.mean(found) if found else None

    @property
    def seconds(self) -> float:
        """Of dense training, this being its rows: with the faster kernels, where rows are of several."""
        timed = [row for row in self.rows if row["shared_gpu"] == "0"]
        kernels = max(row["liger"] for row in timed)
        return statistics.mean(float(row["train_seconds"]) for row in timed if row["liger"] == kernels)


def table(
    rows: Sequence[Row], model: str, length: str, split: str, against: str = DENSE, methods: Mapping[str, str] = LINES
) -> list[str]:
    """The Markdown lines of one model and length: of `methods`, each with what it is called there."""
    chosen = [r for r in rows if (r["model"], r["length"], r["split"]) == (model, length, split)]
    dense = [r for r in chosen if r["method"] == against]
    corpora = sorted({r["corpus"] for r in chosen})
    heads = [f"{NAMES[model]}, {native(model):,} -> {int(length):,}", *(f"{c}, above, %" for c in corpora)]
    lines = [_line([*heads, f"first 8,192, {' / '.join(corpora)}", "time"])]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for method, name in methods.items():
        cell = Cell((r for r in chosen if r["method"] == method), dense)
        if not cell.rows:
            continue
        texts = [name]
        for corpus in corpora:
            if method == against:
                found = [cell.mean(corpus, column) for column in ("ppl", "ppl_last_2048")]
                texts.append("; ".join(_number(value) for value in found if value is not None))
            else:
                texts.append(_gaps(cell, corpus))
        short = [cell.mean(corpus, "ppl_first_8192") for corpus in corpora]
        texts.append(" / ".join("-" if value is None else _number(value) for value in short))
        texts.append(f"1 ({cell.seconds:.1f} s)" if method == against else f"{cell.share:.2f}" if cell.share else "")
        lines.append(_line(texts))
    return lines


def changes(rows: Sequence[Row], split: str) -> list[str]:
    """The default with one thing changed: Markdown lines, none without rows."""
    rows = [r for r in rows if r["split"] == split]
    lines: list[str] = []
    for model, length, corpus in dict.fromkeys((r["model"], r["length"], r["corpus"]) for r in rows):
        here = [r for r in rows if (r["model"], r["length"], r["corpus"]) == (model, length, corpus)]
        found = []
        for change in CHANGES:
            of = {name: [r for r in here if r["method"] == name + THETA] for name in (RECIPE, "dense")}
            own, densely = ([r for r in here if r["method"] == f"{name}, {change}{THETA}"] for name in of)
            pairs = ((own, of[RECIPE]), (densely, of["dense"]), (own, densely))
            if own or densely:
                found.append(_line([change, *(_gaps(Cell(some, others), corpus) for some, others in pairs)]))
        if found:
            heads = [f"{NAMES[model]}, {int(length):,}, {corpus}, %"]
            heads += [
                "the default, against unchanged",
                "dense, against unchanged",
                "the default above dense, both changed",
            ]
            lines += [_line(heads), "|" + "---|" * len(heads), *found, ""]
    return lines[:-1]


def retrieval(rows: Sequence[Row]) -> list[str]:
    """RULER by method and length, of `ruler.csv`: Markdown lines, none without rows."""
    lines: list[str] = []
    runs = dict.fromkeys((r["model"], r["train_length"], r["corpus"], r["seed"], r["trials"]) for r in rows)
    for model, reached, corpus, seed, trials in runs:
        here = [
            r
            for r in rows
            if (r["model"], r["train_length"], r["corpus"], r["seed"], r["trials"])
            == (model, reached, corpus, seed, trials)
        ]
        lengths = sorted({int(r["length"]) for r in here})
        head = f"RULER, %, {NAMES[model]}, {native(model):,} -> {int(reached):,} on {corpus}, {trials} texts a task"
        lines += [_line([head, *(f"{length:,}" for length in lengths)]), "|" + "---|" * (len(lengths) + 1)]
        for method in dict.fromkeys(r["method"] for r in here):
            own = [r for r in here if r["method"] == method]
            for task in sorted({r["task"] for r in own}, key=list(TASKS).index):
                scores = {int(r["length"]): r for r in own if r["task"] == task}
                cells = [
                    f"{100 * float(row['accuracy']):.0f} ± {100 * float(row['error']):.0f}"
                    if (row := scores.get(length))
                    else ""
                    for length in lengths
                ]
                lines.append(_line([f"{LINES.get(method, method)}: {task}", *cells]))
        lines.append("")
    return lines[:-1]


def _gaps(cell: Cell, corpus: str) -> str:
    """How far the rows lie above their dense ones: over all; over the last 2,048 tokens."""
    gaps = [cell.above(corpus, column) for column in ("ppl", "ppl_last_2048")]
    return "; ".join(", ".join(f"{gap:+,.{2 if gap < 1000 else 0}f}" for gap in own) for own in gaps if own)


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def native(model: str) -> int:
    return SOURCES[model].native


# --------------------------------------------------------------------------------------------------------------------
# The plot

_NTHS = ("10th", "4th", "3rd", "2nd")
FAMILIES = {
    "dense, fewer steps": {
        f"dense, a quarter of the steps{THETA}": "a quarter",
        f"dense of equal time{THETA}": "equal time",
        DENSE: "dense",
    },
    "windows": {
        f"native windows, scattered{THETA}": "none dense",
        f"windows{THETA}": "none dense",
        **{f"windows, {n} dense{THETA}": n for n in _NTHS},
    },
    "PoSE": {f"pose of many rows, {n} dense{THETA}": n for n in _NTHS},
    "S2, native length, 4 sink tokens": {
        f"s2 native + sinks{THETA}": "none dense",
        **{f"s2 native + sinks, {n} dense{THETA}": n for n in _NTHS},
    },
    "S2 1/4, no dense step": {f"s2 1/4{THETA}": ""},
}
"""What is joined by a line, from the cheapest, and what stands beside the points."""
MEASURES = {"ppl": "all of a window", "ppl_last_2048": "its last 2,048 tokens"}


class Point(NamedTuple):
    """A method in the plot.

    Args:
        label: Beside the point.
        seconds: Its share of dense training's time, by the seconds of that.
        above: For each of `MEASURES` how far it lies above dense training, in %, the mean of its seeds.
    """

    label: str
    seconds: float
    above: dict[str, float]


def points(rows: Sequence[Row], model: str, length: str, corpus: str, split: str) -> dict[str, list[Point]]:
    """Of each family the methods that were timed."""
    chosen = [r for r in rows if (r["model"], r["length"], r["split"]) == (model, length, split)]
    dense = [r for r in chosen if r["method"] == DENSE]
    found: dict[str, list[Point]] = {}
    for family, methods in FAMILIES.items():
        for method, label in methods.items():
            cell = Cell((r for r in chosen if r["method"] == method), dense)  # of all corpora: time is of the length
            if cell.share is not None and cell.of(corpus):
                gaps = {column: statistics.mean(cell.above(corpus, column)) for column in MEASURES}
                seconds = cell.share * Cell(dense, dense).seconds
                found.setdefault(family, []).append(Point(label, seconds, gaps))
    return found


def plot(rows: Sequence[Row], split: str, path: Path) -> None:
    """Perplexity above dense training against measured seconds, a panel for each model, length and corpus."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    from hf_longlora.evaluation.plots import COLOURS, MARKERS

    columns = sorted({(int(r["length"]), r["model"]) for r in rows if r["method"] == DENSE and r["shared_gpu"] == "0"})
    corpora = sorted({r["corpus"] for r in rows})
    figure = Figure(figsize=(4.6 * len(columns), 3.4 * len(corpora) + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(corpora), len(columns), squeeze=False)
    for place, (length, model) in enumerate(columns):
        for axes, corpus in zip(grid[:, place], corpora, strict=True):
            families = points(rows, model, str(length), corpus, split)
            if not families:
                axes.set_axis_off()
                continue
            for i, known in enumerate(families.get(family, []) for family in FAMILIES):
                for measure in MEASURES:
                    style = {"fillstyle": "full", "linestyle": "-"} if measure == "ppl" else {"fillstyle": "none"}
                    xs, ys = [point.seconds for point in known], [point.above[measure] for point in known]
                    axes.plot(xs, ys, color=COLOURS[i], marker=MARKERS[i], linewidth=1, **{"linestyle": ":"} | style)
                for point in known:
                    place_of = {"fontsize": 7, "xytext": (4, 4), "textcoords": "offset points"}
                    axes.annotate(point.label, (point.seconds, point.above["ppl"]), **place_of)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_locator(FixedLocator([-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.margins(0.12)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
            axes.set_title(f"{NAMES[model]}, {native(model):,} -> {length:,}, {corpus}", fontsize="medium")
            axes.set_xlabel("seconds of training steps")
        grid[0, 0].set_ylabel("perplexity above dense training, %")
    marks: Any = {"color": "grey", "marker": "o"}
    handles = [
        *(Line2D([], [], color=COLOURS[i], marker=MARKERS[i], label=name) for i, name in enumerate(FAMILIES)),
        Line2D([], [], label=MEASURES["ppl"], **marks),
        Line2D([], [], label=MEASURES["ppl_last_2048"], fillstyle="none", linestyle=":", **marks),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path)


BEGIN = "<!-- Written by benchmarks.quality.pretrained_table from rows of benchmarks/results/pretrained.csv. -->\n\n"
END = "\n<!-- Until here. -->\n"


def written(text: str, tables: str) -> str:
    """A page with its tables in the place of those before.

    Raises:
        ValueError: if it has no place for them.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"The page has lost the marks between which its tables stand: {BEGIN}{END}")
    return f"{before}{BEGIN}{tables}{END}{after}"


def pages(rows: Sequence[Row], split: str) -> dict[Path, str]:
    """The pages that quote rows, and their tables."""
    keys = sorted(
        {(r["model"], r["length"]) for r in rows}, key=lambda key: (list(SOURCES).index(key[0]), -int(key[1]))
    )
    found = [table(rows, model, length, split) for model, length in keys]
    found += [lines for lines in (changes(rows, split), retrieval(read_rows(RESULTS / "ruler.csv"))) if lines]
    short = table(rows, "smollm2", "65536", split, methods={method: LINES[method] for method in SHORT})
    return {
        ROOT / "benchmarks" / "README.md": "\n\n".join("\n".join(lines) for lines in found) + "\n",
        **{ROOT / name: "\n".join(short) + "\n" for name in ("README.md", "docs/groups.md")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--against", default=DENSE)
    parser.add_argument("--all", action="store_true", help="each method that has a row, by its own name")
    parser.add_argument("--write", action="store_true", help="put the tables into the pages, and draw the plot")
    parser.add_argument("--plot", type=Path, default=RESULTS / "pretrained.png", help="where --write draws it")
    parser.add_argument("--results", type=Path, default=RESULTS / "pretrained.csv")
    args = parser.parse_args()
    rows = read_rows(args.results)
    if args.all:
        for model, length in dict.fromkeys((r["model"], r["length"]) for r in rows):
            methods = {r["method"]: r["method"] for r in rows}
            print("\n".join(table(rows, model, length, args.split, args.against, methods)), end="\n\n")
        return
    found = pages(rows, args.split)
    if not args.write:
        print(found[ROOT / "benchmarks" / "README.md"])
        return
    for page, tables in found.items():
        page.write_text(written(page.read_text(), tables))
    plot(rows, args.split, args.plot)


if __name__ == "__main__":
    main()
