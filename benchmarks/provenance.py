"""Where a row comes from: the columns that every result carries, and appending a row to a table."""

import csv
import datetime
import fcntl
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, str]:
    """GPU, versions, commit and date. `BENCH_COMMIT` names the commit where the code runs without its repository."""
    row = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": os.environ.get("BENCH_COMMIT") or _commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or "") if torch.cuda.is_available() else "",
    }
    for name in ("transformers", "peft", "trl"):
        try:
            row[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            row[name] = ""
    return row


def _commit() -> str:
    """The checkout's commit, with a + if files that are tracked differ from it."""
    try:
        where = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run(
            [*where, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*where, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed else "")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no table yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a table, at once and under a lock, so that a run cut short loses nothing.

    Raises:
        ValueError: if the row has a column that the table lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        columns = next(csv.reader(file), None)
        if columns is None:
            columns = list(row)
            csv.writer(file, lineterminator="\n").writerow(columns)
        if unknown := set(row) - set(columns):
            raise ValueError(f"{path} has no columns {sorted(unknown)}.")
        csv.DictWriter(file, columns, lineterminator="\n").writerow({k: _text(v) for k, v in row.items()})
        file.flush()
        os.fsync(file.fileno())


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
