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

from ..evaluation.plots import no_plots, plot_history
from ..evaluation.tables import perplexity_of, sections
from ..hub.card import read_evaluation
from ..hub.run import STAGES, evaluation_losses, read_facts, stage_cells, training_seconds
from ..schedule import Schedule
from .checkpoints import SCHEDULE_NAME

logger = logging.get_logger(__name__)

CURVES = {
    "loss": ("Loss", "loss", "loss (nats per token)"),
    "speed": ("Speed", "tokens_per_second", "tokens a second"),
    "memory": ("Memory", "peak_memory_gib", "peak memory (GiB)"),
}
"""Title, key in the log and axis of each picture of the run."""
Evaluated = dict[str, dict[int, list[tuple[int, float]]]]
"""What was evaluated -> stage, from 0 -> (step, loss)."""
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;"
    "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def write_report(
    folder: Path,
    history: Sequence[Mapping[str, Any]],
    schedule: Schedule,
    evaluation: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html`, with losses, speed and memory by stage and the run's facts, into its output directory.

    Without matplotlib the report has its tables and says how to get the pictures.

    Args:
        history: The trainer's `state.log_history`.
        evaluation: What `hf-longlora evaluate` has found since, its pictures in the same folder. None of a run that
            has just ended: what lies there is of the run before.
    """
    logged = [entry for entry in history if "loss" in entry and "stage" in entry]
    evaluated: Evaluated = {}
    for entry in history:
        for what, loss in evaluation_losses(entry).items():
            number = schedule.step(max(entry["step"] - 1, 0)).stage
            evaluated.setdefault(what, {}).setdefault(number, []).append((entry["step"], loss))
    facts = read_facts(folder)
    title = f"Context extension of {facts['base']}" if "base" in facts else "Context extension"
    rows = [_stage_row(number, logged, evaluated, schedule) for number in range(len(schedule.stages))]
    head = (*STAGES, "first loss", "last loss", *evaluated, "tokens/s", "peak GiB")
    body = [f"<h1>{html.escape(title)}</h1>", _table(head, rows)]
    if (missing := no_plots()) is not None:
        logger.warning(f"{folder / 'report.html'} has no pictures: {missing}")
        body.append(f"<p>No pictures: {html.escape(missing)}.</p>")
    else:
        for name, (heading, key, label) in CURVES.items():
            curves: dict[str, Any] = {}
            dashed: dict[str, Any] = {}
            for number, stage in enumerate(schedule.stages):
                curve = f"stage {number + 1}, {stage.max_length:,} tokens"
                points = [(e["step"], float(e[key])) for e in logged if e["stage"] == number + 1 and key in e]
                curves |= {curve: points} if points else {}
                for what, by_stage in evaluated.items():
                    if key == "loss" and number in by_stage:
                        dashed.setdefault(what, {})[curve] = by_stage[number]
            if curves:
                file = folder / f"{name}.png"
                plot_history(curves, file, ylabel=label, evaluated=dashed, from_zero=key != "loss")
                body += [f"<h2>{heading}</h2>", *_picture(file)]
            if dashed:
                longest = f"{schedule.stages[-1].max_length:,}"
                body.append(f"<p>Evaluation is dense, on up to {longest} tokens in every stage.</p>")
    body += _evaluation(folder, evaluation or {})
    if facts:
        body += ["<h2>The run</h2>", _table((), list(facts.items()))]
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>\n"
    file = folder / "report.html"
    file.write_text(page + "\n".join(body) + "\n", encoding="utf-8")
    return file


def update_report(folder: Path) -> Path:
    """Write the report of a run that has ended once more, with what `hf-longlora evaluate` has left in its folder.

    Raises:
        FileNotFoundError: if no run has ended there.
    """
    state, schedule = folder / TRAINER_STATE_NAME, folder / SCHEDULE_NAME
    for file in (state, schedule):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: no run of LongLoraSFTTrainer has ended in {folder}.")
    history = TrainerState.load_from_json(str(state)).log_history
    stages = Schedule.from_dict(json.loads(schedule.read_text()))
    return write_report(folder, history, stages, read_evaluation(folder))


def _stage_row(
    number: int,
    logged: Sequence[Mapping[str, Any]],
    evaluated: Evaluated,
    schedule: Schedule,
) -> list[str]:
    stage = schedule.stages[number]
    entries = [entry for entry in logged if entry["stage"] == number + 1]
    done = entries[-1]["step"] - schedule.ends[number] + stage.max_steps if entries else 0
    row = stage_cells(schedule, number)
    if done < stage.max_steps:
        row[STAGES.index("steps")] = f"{done} of {stage.max_steps}"
    row += [f"{entries[at]['loss']:.3f}" if entries else "" for at in (0, -1)]
    row += [f"{by_stage[number][-1][1]:.3f}" if number in by_stage else "" for by_stage in evaluated.values()]
    if not entries:
        return [*row, "", ""]
    so_far, earlier = ([entry for entry in logged if entry["stage"] <= stage] for stage in (number + 1, number))
    seconds = training_seconds(so_far) - training_seconds(earlier)
    tokens = so_far[-1]["num_tokens"] - (earlier[-1]["num_tokens"] if earlier else 0)
    peak = max(float(entry["peak_memory_gib"]) for entry in entries)
    return [*row, f"{tokens / seconds:,.0f}" if seconds else "", f"{peak:.1f}"]


def _evaluation(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """What `hf-longlora evaluate` has found."""
    parts = []
    for section in sections(perplexity_of(results), results):
        parts += [f"<h2>{html.escape(section.title)}</h2>", _table(*section.table)]
        parts += [f"<p>{html.escape(section.note)}</p>"] if section.note else []
        parts += _picture(folder / section.picture) if section.picture else []
    if "far_context" in results:
        parts += ["<h2>Loss by position</h2>", f"<p>{html.escape(results['far_context'])}</p>"]
        parts += _picture(folder / "positions.png")
    return parts


def _picture(file: Path) -> list[str]:
    return [f'<img src="{file.name}" alt="{file.stem}">'] if file.is_file() else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + (row(head, "th") if head else "") + "".join(row(cells, "td") for cells in rows) + "</table>"
