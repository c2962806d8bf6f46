"""A pytest plugin for TRL's own SFT tests without the Hub: datasets from the cache (`make test-third-party`)."""

import ast
import importlib
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

DATASETS = Path(os.environ["HF_HUB_CACHE"], "datasets")
TESTS = (Path("tests", "test_sft_trainer.py"), Path("tests", "testing_utils.py"))  # beside which this runs
_load_dataset = datasets.load_dataset


def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
    """What `trl_hub.py` has made in the place of a dataset on the Hub."""
    return _load_dataset(str(DATASETS / path / (name or "")), **kwargs)


datasets.load_dataset = load_dataset  # before the suite imports it


def _stand_in(name: str) -> Any:
    def missing(*args: Any, **kwargs: Any) -> bool:
        if name.startswith("is_"):
            return False
        pytest.fail(f"the installed TRL has no {name}")

    return missing


# Tests of another version than the installed import what it may not have. Those that use it fail, and no others.
for file in TESTS:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl."):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    setattr(module, alias.name, _stand_in(alias.name))
