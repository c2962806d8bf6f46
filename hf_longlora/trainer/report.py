"""What a run leaves for a person to look at: `report.html` and its pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..evaluation.plots import plot_history, plot_perplexity, require_matplotlib
from .checkpoints import SCHEDULE_NAME
from .stages import Schedule

logger = logging.get_logger(__name__)

CURVES = {
    "loss": ("loss", "training loss"),
    "speed": ("tokens_per_second", "tokens a second"),
    "memory": ("peak_memory_gib", "peak memory, GiB"),
}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;"
    "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def write_report(folder: Path, history: Sequence[Mapping[str, Any]], schedule: Schedule) -> Path:
    """Write `report.html`, with loss, speed and memory by stage, into a run's output directory.

    What `hf-longlora evaluate --output-dir` has left in the same folder (`evaluation.json`) is shown, too; see
    `update_report`. Without matplotlib the report has its tables and says how to get the pictures.

    Args:
        folder: The output directory.
        history: The trainer's `state.log_history`.
        schedule: The stages.

    Returns:
        The file.
    """
    logged = [entry for entry in history if "loss" in entry and "stage" in entry]
    rows = [_stage_row(number, logged, schedule) for number in range(len(schedule.stages))]
    body = [
        "<h1>Context extension</h1>",
        _table(("stage", "tokens", "steps", "attention", "group", "first loss", "last loss", "tokens/s", "GiB"), rows),
    ]
    body += _evaluation(folder)
    try:
        require_matplotlib()
    except ImportError as error:
        logger.warning(f"{folder / 'report.html'} has no pictures: {error}")
        body.append(f"<p>No pictures: {html.escape(str(error))}.</p>")
    else:
        for name, (key, label) in CURVES.items():
            by_stage: dict[str, list[tuple[int, float]]] = {}
            for entry in logged:
                title = f"stage {entry['stage']}, {entry['context_length']:,} tokens"
                if key in entry:
                    by_stage.setdefault(title, []).append((entry["step"], float(entry[key])))
            if by_stage:
                plot_history(by_stage, folder / f"{name}.png", ylabel=label)
                body.append(f'<img src="{name}.png" alt="{label} by step">')
        evaluated = [(entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
        if evaluated:
            plot_history({"evaluation": evaluated}, folder / "eval_loss.png", ylabel="evaluation loss")
            body.append('<img src="eval_loss.png" alt="evaluation loss by step">')
    page = f"<!doctype html><meta charset=utf-8><title>Context extension</title><style>{STYLE}</style>\n"
    file = folder / "report.html"
    file.write_text(page + "\n".join(body) + "\n", encoding="utf-8")
    return file


def update_report(folder: Path) -> Path:
    """Write the report of a run that has ended once more, with what has been evaluated since.

    Args:
        folder: The run's output directory.

    Returns:
        The file.

    Raises:
        FileNotFoundError: if no run has ended there.
    """
    state, schedule = folder / TRAINER_STATE_NAME, folder / SCHEDULE_NAME
    for file in (state, schedule):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: no run of LongLoraSFTTrainer has ended in {folder}.")
    history = TrainerState.load_from_json(str(state)).log_history
    return write_report(folder, history, Schedule.from_dict(json.loads(schedule.read_text())))


def _stage_row(number: int, logged: Sequence[Mapping[str, Any]], schedule: Schedule) -> tuple[str, ...]:
    stage = schedule.stages[number]
    entries = [entry for entry in logged if entry["stage"] == number + 1]
    every = schedule.dense_every if stage.dense_every is None else stage.dense_every
    group = schedule.attention_config(number).group_size
    dense = stage.attention == "dense"
    attention = "dense" if dense else "sparse" + (f", each {every}th step dense" if every else "")
    found = ("", "", "", "")
    if entries:
        speeds = [float(entry["tokens_per_second"]) for entry in entries]
        found = (
            f"{entries[0]['loss']:.3f}",
            f"{entries[-1]['loss']:.3f}",
            f"{sum(speeds) / len(speeds):,.0f}",
            f"{max(float(entry['peak_memory_gib']) for entry in entries):.1f}",
        )
    group_size = "" if dense else f"{group:,}"
    return (str(number + 1), f"{stage.max_length:,}", str(stage.max_steps), attention, group_size, *found)


def _evaluation(folder: Path) -> list[str]:
    """Perplexity by length, if the model was evaluated into this folder."""
    file = folder / "evaluation.json"
    if not file.is_file():
        return []
    records = json.loads(file.read_text()).get("perplexity")
    if not records:
        return []
    lengths = [f"{record['length']:,}" for record in next(iter(records.values()))]
    rows = [(name, *(f"{record['perplexity']:.2f}" for record in found)) for name, found in records.items()]
    parts = ["<h2>Perplexity by length</h2>", _table(("attention", *lengths), rows)]
    try:
        plot_perplexity(records, folder / "perplexity.png")
        parts.append('<img src="perplexity.png" alt="perplexity by length">')
    except ImportError:
        pass  # said once, by the caller
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"
