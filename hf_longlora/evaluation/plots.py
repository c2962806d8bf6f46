"""The pictures of a context extension: perplexity by length, loss by position, retrieval by length and depth.

Each function draws one into a file, whose format follows its suffix and whose folder is made, and returns its path.
Without matplotlib they raise the `ImportError` that says what to install.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from .tables import basis

# A curve this many times above the best value explodes: it gets a log axis, and is cut off at CLIP times the best.
EXPLODES = 4.0
CLIP = 20.0
SIZE = (7, 3.6)  # inches, at 150 dpi
# Okabe and Ito's palette without the yellow: told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")
MARKERS = "osD^vPX"
DASHES = ("--", ":", "-.")


def no_plots() -> str | None:
    """Why there are none; `None` if there can be. For what is worth having without them, said before it starts."""
    return None if find_spec("matplotlib") else "plots need matplotlib: pip install 'hf-longlora[plot]'"


def plot_perplexity(
    records_by_name: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path,
    *,
    base_length: int | None = None,
    train_length: int | None = None,
    title: str | None = None,
) -> Path:
    """Draw perplexity by context length, one line per name, and save it.

    The y axis is logarithmic where a curve explodes (above 4 times the best value), and ends at 20 times the best:
    what lies above stands at the upper edge with an arrow and its value.

    Args:
        records_by_name: what `perplexity_by_length` returned, by the name to show, in drawing order.
        path: the file to write.
        base_length: the base model's own context length in tokens: a dashed vertical line.
        train_length: the length of the extension's training: another.
        title: above the axes.

    Raises:
        ValueError: there is nothing to draw.
    """
    figure, axes = _figure(*SIZE)
    from matplotlib.ticker import LogLocator

    curves = {
        name: sorted((int(record["length"]), float(record["perplexity"])) for record in records)
        for name, records in records_by_name.items()
        if records
    }
    finite = [value for curve in curves.values() for _, value in curve if math.isfinite(value)]
    if not finite:
        raise ValueError("nothing to draw: no record with a finite perplexity")
    lengths = sorted({length for curve in curves.values() for length, _ in curve})
    ceiling = min(max(finite), CLIP * min(finite))
    axes.set_xscale("log", base=2)
    if log_scale := max(finite) > EXPLODES * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")

    for label, length in (("base context", base_length), ("trained to", train_length)):
        if length is not None:
            axes.axvline(length, color="#999999", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
            axes.annotate(
                f"{label} {_short(length)}",
                (length, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="left" if length <= lengths[0] else "right" if length >= lengths[-1] else "center",
                fontsize=8,
                color="#666666",
            )

    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            [length for length, _ in curve],
            [min(value, ceiling) for _, value in curve],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.8,
            label=f"{name}  {_number(curve[-1][1])}",
        )
        for length, value in curve:
            if value > ceiling:
                axes.annotate(
                    f"\N{UPWARDS ARROW}{_number(value)}",
                    (length, ceiling),
                    xytext=(-5, 0),
                    textcoords="offset points",
                    ha="right",
                    va="bottom",
                    fontsize=7.5,
                    color=colour,
                )
    ticks = sorted({*lengths, *(length for length in (base_length, train_length) if length)})
    axes.set_xticks(ticks, [_short(length) for length in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _style(axes, "context length (tokens)", "perplexity" + (" (log scale)" if log_scale else ""))
    _title(axes, title, pad=18 if base_length or train_length else 8)
    return _save(figure, path)


def plot_retrieval(records: Sequence[Mapping[str, Any]], path: str | Path, *, title: str | None = None) -> Path:
    """Draw accuracy over length and depth as a heat map, and save it.

    Args:
        records: what `passkey_accuracy` or `multi_needle_accuracy` returned: a record for each length and each depth.
        path, title: as in `plot_perplexity`.

    Raises:
        ValueError: there is nothing to draw, or a length lacks a depth that another has.
    """
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records})
    accuracy = {(record["depth"], record["length"]): record["accuracy"] for record in records}
    if not lengths or len(accuracy) != len(lengths) * len(depths):
        raise ValueError("records must hold every depth at every length, and at least one of each")
    figure, axes = _figure(max(2.4 + 0.75 * len(lengths), 4.4), max(1.6 + 0.42 * len(depths), 2.4))
    grid = [[accuracy[depth, length] for length in lengths] for depth in depths]
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            ink = "black" if value > 0.5 else "white"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("text length (tokens)")
    axes.set_ylabel("depth of the passkey")
    axes.tick_params(labelsize=9)
    _title(axes, title)
    bar = figure.colorbar(image, ax=axes, format=lambda share, _: f"{share:.0%}")
    bar.ax.tick_params(labelsize=9)
    bar.set_label(f"found, of {texts}" if (texts := basis(records)) else "found")
    return _save(figure, path)


def plot_positions(
    records_by_name: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, *, title: str | None = None
) -> Path:
    """Draw mean loss by position, one stepped line per name with its standard error, and save it.

    Args:
        records_by_name: what `loss_by_position` returned, by the name to show, in drawing order.
        path, title: as in `plot_perplexity`.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(records_by_name.values()):
        raise ValueError("nothing to draw: no record")
    figure, axes = _figure(*SIZE)
    for index, (name, records) in enumerate(records_by_name.items()):
        colour = COLOURS[index % len(COLOURS)]
        edges = [max(records[0]["start"], 1), *(record["end"] for record in records)]
        values = [record["nll"] for record in records]
        axes.stairs(values, edges, baseline=None, color=colour, linewidth=1.8, label=name)
        centres = [math.sqrt(low * high) for low, high in pairwise(edges)]
        errors = [record["nll_error"] for record in records]
        axes.errorbar(centres, values, errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: _short(round(value)))
    _style(axes, "position in the text (tokens of context)", "loss (nats per token)")
    _title(axes, title)
    axes.legend(fontsize=8.5, frameon=False)
    return _save(figure, path)


def plot_history(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: str | Path,
    *,
    ylabel: str,
    evaluated: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] | None = None,
    from_zero: bool = False,
) -> Path:
    """Draw what a run logged by optimizer step, one line per name, and save it.

    Args:
        curves: (step, value) pairs by the name to show, in drawing order.
        path: as in `plot_perplexity`.
        ylabel: what the values are, and their unit.
        evaluated: the same of evaluations, by what was evaluated: dashed, in the colour of the curve of that name.
        from_zero: begin the y axis at 0, so that heights compare.
    """
    figure, axes = _figure(*SIZE)
    thin = dict(markersize=5, linewidth=1.2)
    for index, (name, points) in enumerate(curves.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        single = marker if len(points) < 3 else None
        axes.plot(*zip(*points, strict=True), color=colour, marker=single, linewidth=1.8, label=name)
        for dashes, by_name in zip(cycle(DASHES), (evaluated or {}).values()):
            if name in by_name:
                axes.plot(*zip(*by_name[name], strict=True), dashes, color=colour, marker=marker, **thin)
    for dashes, what in zip(cycle(DASHES), evaluated or ()):
        axes.plot([], [], dashes, color="#666666", marker="o", label=what, **thin)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(left=0)
    if from_zero:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    _style(axes, "optimizer step", ylabel)
    axes.legend(fontsize=8.5, frameon=False)
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure (in inches) and its axes, on a canvas of its own: pyplot's state and backend stay as they are."""
    if (missing := no_plots()) is not None:
        raise ImportError(missing)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _style(axes: Any, xlabel: str, ylabel: str) -> None:
    """What is along the axes; faint lines to read values off, and no box."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _title(axes: Any, title: str | None, pad: float = 8) -> None:
    axes.set_title(title or "", fontsize=11, pad=pad)


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _number(value: float) -> str:
    """Three digits or so: `7.91`, `19.5`, `1,800`."""
    if not math.isfinite(value):
        return "inf"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _short(length: int) -> str:
    """`8192` -> `8k`; `700` -> `700`."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
