"""Facts of a run, for the model card."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from .. import __version__
from ..schedule import Schedule

RUN_NAME = "run.json"
"""The facts, beside the adapter."""
EMISSIONS_NAME = "emissions.csv"
"""Where codecarbon (`report_to="codecarbon"`) writes the energy it has measured."""
LIBRARIES = ("torch", "transformers", "peft", "trl")


def run_facts(args: Any, state: TrainerState) -> dict[str, str]:
    """Facts of a run so far, in the order of the card: steps, tokens, rate, loss, hardware, time, energy, versions.

    What the log history of `state` doesn't tell is left out.
    """
    logged = [entry for entry in state.log_history if "loss" in entry]
    facts = {}
    # TRL's own configuration, whose run may push an adapter of ours, shares no sequences between processes.
    replicas = getattr(args, "data_parallel", args.world_size)
    batch = args.train_batch_size * args.gradient_accumulation_steps * replicas
    steps = f"{state.global_step:,} of {state.max_steps:,}" if state.global_step < state.max_steps else ""
    facts["steps"] = f"{steps or f'{state.global_step:,}'}, batch size {batch:,}"
    if logged and "num_tokens" in logged[-1]:
        facts["tokens"] = f"{int(logged[-1]['num_tokens']):,}"
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    warmup = args.get_warmup_steps(state.max_steps)
    facts["learning rate"] = f"{args.learning_rate:g}, {kind}"
    if warmup:
        facts["learning rate"] += f", warm-up over {warmup:,} {'step' if warmup == 1 else 'steps'}"
    if logged:
        facts["loss"] = f"{float(logged[0]['loss']):.3f} at first, {float(logged[-1]['loss']):.3f} at last"
    evaluated: dict[str, list[float]] = {}
    for entry in state.log_history:
        for what, loss in evaluation_losses(entry).items():
            evaluated.setdefault(what, []).append(loss)
    for what, losses in evaluated.items():
        facts[what] = f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last"
    facts["hardware"] = hardware(args.world_size, args.device)
    seconds = training_seconds(logged)
    if seconds:
        facts["time"] = f"{duration(seconds)} of training"
    peaks = [float(entry["peak_memory_gib"]) for entry in logged if "peak_memory_gib" in entry]
    if peaks:
        where = "on the GPU" if args.device.type == "cuda" else "of the process"
        facts["peak memory"] = f"{max(peaks):.1f} GiB {where}"
    energy = energy_used(Path(args.output_dir))
    if energy is not None:
        facts["energy"] = f"{energy:.3g} kWh, by codecarbon"
    versions = {"hf-longlora": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return facts


def evaluation_losses(entry: Mapping[str, Any]) -> dict[str, float]:
    """The losses of evaluations in an entry of a log, by "evaluation loss", or with ", NAME" for each of several sets.

    Trainer logs those of a dict of datasets as `eval_NAME_loss`.
    """
    found = {}
    for key, value in entry.items():
        if (match := re.fullmatch(r"eval_(?:(.+)_)?loss", key)) is not None:
            found["evaluation loss" + (f", {match[1]}" if match[1] else "")] = float(value)
    return found


STAGES = ("stage", "tokens", "steps", "attention", "group", "sink tokens", "a dense step each")
ATTENTION = {"dense": "dense", "s2": "shifted sparse", "windows": "dense in windows", "pose": "PoSE"}


def stage_cells(schedule: Schedule, number: int) -> list[str]:
    """A stage, counted from 0, under the heads of `STAGES`."""
    stage, (kind, size, sinks, every) = schedule.stages[number], schedule.pattern(number)
    cells = [f"{number + 1}", f"{stage.max_length:,}", f"{stage.max_steps}", ATTENTION[kind]]
    if kind == "dense":
        return [*cells, "-", "-", "-"]
    groups = [f"{size:,}", f"{sinks:,}"] if kind == "s2" else [f"windows of {size:,}", "-"]
    return [*cells, *groups, str(every or "never")]


def read_facts(folder: Path) -> dict[str, str]:
    """What `write_facts` has left in a folder; nothing if it hasn't."""
    file = folder / RUN_NAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_facts(folder: Path, facts: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_NAME).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hardware(processes: int, device: torch.device) -> str:
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"{processes} x {device.type}"


def training_seconds(logged: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the logged steps took, those before a stop and a resumption included, evaluations and saving not.

    A log has the tokens so far and the speed since the log before it.
    """
    seconds, before = 0.0, 0.0
    for entry in logged:
        if entry.get("tokens_per_second") and "num_tokens" in entry:
            seconds += (float(entry["num_tokens"]) - before) / float(entry["tokens_per_second"])
            before = float(entry["num_tokens"])
    return seconds


def duration(seconds: float) -> str:
    """`1 h 12 min`, `12 min`, `34 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def energy_used(folder: Path) -> float | None:
    """kWh that codecarbon has written into a run's output directory, over all its starts; `None` if it didn't run."""
    file = folder / EMISSIONS_NAME
    if not file.is_file():
        return None
    with file.open(newline="") as lines:
        return sum(float(row["energy_consumed"]) for row in csv.DictReader(lines))
