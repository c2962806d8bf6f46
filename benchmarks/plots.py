"""What `train_step.csv` says: Markdown tables on standard output, and time and memory against length as a plot.

python -m benchmarks.plots [--results FILE] [--plot FILE] [--gpu NAME] [--model 8b]

Of several rows of one method and length the newest counts, and ratios are between rows of one GPU. A * marks a step
that was the first at its length: kernels are chosen in it and memory is taken.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from .provenance import RESULTS, read_rows

Row = dict[str, str]
FUSED = ("casts", "compile", "liger")
FITTING = ("tile", "offload", "qlora")
DENSE_EVERY = (8, 4)
BY_LENGTH = "+liger+tile"
"""Options of the methods in the table of lengths."""


class Steps:
    """The rows of one model on one GPU, by method and length."""

    def __init__(self, rows: Iterable[Row], model: str, gpu: str) -> None:
        self.rows = {(r["method"], int(r["length"])): r for r in rows if r["model"] == model and r["gpu"] == gpu}
        self.lengths = sorted({length for _, length in self.rows})
        self.methods = list(dict.fromkeys(method for method, _ in self.rows))

    def value(self, method: str, length: int, column: str = "s_p50") -> float | None:
        """Of a step that was taken; `None` if it didn't fit, or was not tried."""
        row = self.rows.get((method, length))
        return float(row[column]) if row is not None and row["status"] == "ok" else None

    def best_dense(self, length: int) -> str | None:
        """The fastest stock method, whatever its kernel."""
        stock = [m for m in self.methods if m.startswith("stock") and not _options(m) & {*FUSED, *FITTING}]
        taken = {m: s for m in stock if (s := self.value(m, length)) is not None}
        return min(taken, key=lambda m: taken[m]) if taken else None

    def first(self, method: str, length: int) -> str:
        """A mark on a step before which none of its length was taken."""
        row = self.rows.get((method, length))
        return "*" if row is not None and row["warm"] == "0" else ""

    def mixed(self, sparse: float | None, dense: float | None, every: int) -> float | None:
        """Seconds a step with each `every`th dense: the mean of the two kinds of steps, each measured."""
        return None if sparse is None or dense is None else sparse + (dense - sparse) / every


def _options(method: str) -> set[str]:
    return set(method.split("+")[1:])


# --------------------------------------------------------------------------------------------------------------------
# Tables


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _text(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}}"


def _ratio(numerator: float | None, denominator: float | None, form: str = ".2f") -> str:
    return "" if numerator is None or denominator is None else f"{numerator / denominator:{form}}"


def of_methods(steps: Steps, length: int) -> str:
    """All methods at one length, and the ratios that the targets are about."""
    dense = steps.best_dense(length)
    best = steps.value(dense, length) if dense else None
    stock, floor = steps.value("stock", length), steps.value("floor", length)
    taken = [m for m in steps.methods if steps.value(m, length) is not None]
    lines = []
    for method in sorted(taken, key=lambda m: -(steps.value(m, length) or 0)):
        seconds = steps.value(method, length)
        lines.append(
            [
                method,
                _text(seconds) + steps.first(method, length),
                _text(steps.value(method, length, "tokens_per_s"), ",.0f"),
                _text(steps.value(method, length, "peak_gpu_gib"), ".1f"),
                _ratio(stock, seconds),
                _ratio(best, seconds),
                _ratio(seconds, floor, ".3f"),
            ]
        )
    return table(["method", "s a step", "tokens/s", "GiB", "stock / this", "best dense / this", "this / floor"], lines)


def of_lengths(steps: Steps) -> str:
    """Seconds, tokens a second and memory by length, with the options `BY_LENGTH`."""
    dense, quarter, fixed = (f"ours-{name}{BY_LENGTH}" for name in ("dense", "n/4", "2048"))
    lines = []
    for length in steps.lengths:
        if steps.value(fixed, length) is None:
            continue
        cells = [f"{length:,}", _text(steps.value(fixed, length, "peak_gpu_gib"), ".0f")]
        seconds = [(steps.value(m, length), steps.first(m, length)) for m in (dense, quarter, fixed)]
        for every in DENSE_EVERY:
            seconds.append((steps.mixed(seconds[2][0], seconds[0][0], every), seconds[0][1]))
        cells += ["" if s is None else f"{s:.2f}{mark} s, {length / s:,.0f}" for s, mark in seconds]
        lines.append(cells)
    mixed = [f"2,048, each {every}th step dense" for every in DENSE_EVERY]
    return table(["tokens", "GiB", "dense", "n/4", "2,048", *mixed], lines)


def of_fused(steps: Steps) -> str:
    """What the fused parts take off each method."""
    lines = []
    for method in steps.methods:
        plain = "+".join(part for part in method.split("+") if part not in FUSED)
        for length in steps.lengths:
            after, before = steps.value(method, length), steps.value(plain, length)
            if plain != method and after is not None and before is not None:
                memory = [steps.value(m, length, "peak_gpu_gib") for m in (plain, method)]
                gib = " -> ".join(_text(m, ".1f") for m in memory)
                change = f"{(after / before - 1) * 100:+.1f}%"
                lines.append([method, f"{length:,}", f"{before:.2f} -> {after:.2f}", change, gib])
    return table(["method", "tokens", "s a step", "", "GiB"], lines)


def of_longest(steps: Steps) -> str:
    """What fits, and what it takes."""
    lines = []
    for method in steps.methods:
        if not _options(method) & set(FITTING):
            continue
        for length in steps.lengths:
            row = steps.rows.get((method, length))
            if row is None:
                continue
            taken = steps.value(method, length) is not None
            cells = [_text(steps.value(method, length)) + steps.first(method, length) if taken else row["status"]]
            for column in ("tokens_per_s", "peak_gpu_gib", "peak_pinned_gib", "peak_host_gib"):
                form = ",.0f" if column == "tokens_per_s" else ".1f"
                cells.append(_text(float(row[column]), form) if row[column] and (taken or "gpu" in column) else "")
            lines.append([method, f"{length:,}", *cells])
    head = ["method", "tokens", "s a step", "tokens/s", "GPU GiB", "pinned host GiB", "host GiB (resident)"]
    return table(head, lines)


# --------------------------------------------------------------------------------------------------------------------
# The plot


def draw(steps: Steps, path: Path, title: str) -> bool:
    """Seconds a step and GiB against length, a line per method; `False` if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from hf_longlora.evaluation.plots import COLOURS, MARKERS

    shown = {
        "stock": "stock TRL + PEFT",
        "stock+fa4": "stock, FlashAttention 4",
        "floor": "no attention (the floor)",
        "ours-dense+liger+tile": "dense, Liger, tiled MLP",
        "ours-n/4+liger+tile": "groups of n/4, Liger, tiled MLP",
        "ours-2048+liger+tile": "groups of 2,048, Liger, tiled MLP",
    }
    shown = {method: name for method, name in shown.items() if any(steps.value(method, n) for n in steps.lengths)}
    if not shown:
        return False
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("s_p50", "seconds a step", True), ("peak_gpu_gib", "peak GPU memory, GiB", False))
    for axes, (column, label, logarithmic) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, (method, name) in enumerate(shown.items()):
            points = [(n, v) for n in steps.lengths if (v := steps.value(method, n, column)) is not None]
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(steps.lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:.0f}k" if n >= 1024 else f"{n:.0f}"))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{s:g}"))
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the sequence")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small", frameon=False)
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "train_step.csv")
    parser.add_argument("--plot", type=Path, default=RESULTS / "train_step.png")
    parser.add_argument("--model", default="8b")
    parser.add_argument("--gpu", help="as in the rows; default: that of the newest row of the model")
    args = parser.parse_args()
    rows = [row for row in read_rows(args.results) if row["model"] == args.model]
    rows = [row for row in rows if args.gpu in (None, row["gpu"])]
    if not rows:
        raise SystemExit(
            f"{args.results} has no rows of the model {args.model!r}{f' on {args.gpu}' * bool(args.gpu)}."
        )
    gpu = rows[-1]["gpu"]
    steps = Steps(rows, args.model, gpu)
    versions = ", ".join(f"{name} {rows[-1][name]}" for name in ("torch", "transformers", "peft", "trl"))
    print(f"{args.model} on {gpu}; {versions}\n")
    for length in steps.lengths:
        print(f"### {length:,} tokens\n\n{of_methods(steps, length)}\n")
    for name, make in (("By length", of_lengths), ("Fused parts", of_fused), ("What fits", of_longest)):
        print(f"### {name}\n\n{make(steps)}\n")
    if draw(steps, args.plot, f"One optimizer step of a Llama-3 {args.model.upper()} shape, LoRA, on one {gpu}"):
        print(f"Plot: {args.plot}")


if __name__ == "__main__":
    main()
