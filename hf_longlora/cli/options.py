"""What a command has been given that can't be, or would be passed over."""

import argparse
import tempfile
from collections.abc import Collection
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What the weights of a model may be loaded in."""


def given(options: argparse.Namespace) -> list[str]:
    """The options that aren't at their defaults, as they are written; `options.parser` is the command's."""
    actions = [action for action in options.parser._actions if action.option_strings]
    return [a.option_strings[0] for a in actions if getattr(options, a.dest, a.default) != a.default]


def refuse_idle(options: argparse.Namespace, idle: Collection[str], why: str) -> None:
    """Raise a `ValueError` if options were given that say nothing beside the others."""
    found = [name for name in given(options) if name in idle]
    if found:
        raise ValueError(f"{', '.join(found)}: {why}")


def check_device(name: str) -> None:
    """Raise a `ValueError` if there is no such device: now, and not when a model has been loaded."""
    import torch

    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {name}: {error}") from error


def check_writable(folder: Path) -> None:
    """Raise an `OSError` if a folder can't be made or written to: now, and not when the work is done."""
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not found.is_dir():
        raise NotADirectoryError(f"{folder} can't be written to: {found} is no folder")
    try:
        tempfile.TemporaryFile(dir=found).close()  # permissions alone don't tell: a full disk, a read-only mount
    except OSError as error:
        raise OSError(f"{folder} can't be written to: {error.strerror or error} in {found}") from error
