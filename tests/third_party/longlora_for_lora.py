"""A pytest plugin for PEFT's own suite: `LongLoraConfig` wherever it says `LoraConfig` (`make test-third-party`)."""

import importlib.util
import sys
import types
from typing import Any

import peft
import pytest

from hf_longlora import LongLoraConfig

if importlib.util.find_spec("diffusers") is None:
    # The suite's helpers import one class of it, which the custom models never use.
    stand_in: Any = types.ModuleType("diffusers")
    stand_in.StableDiffusionPipeline = object
    sys.modules["diffusers"] = stand_in


class LoraConfig(LongLoraConfig):
    """LongLoraConfig with the defaults of LoraConfig that the suite's expectations rest on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("task_type", None)
        kwargs.setdefault("lora_alpha", 8)
        super().__init__(*args, **kwargs)


peft.LoraConfig = LoraConfig  # before the suite imports it

# What can't hold for this adapter, or not here: test's name -> reason.
DESELECTED = {
    "test_save_pretrained_pickle": "pickled weights are refused: loading one can run code",
    "test_active_adapter[Embedding + transformers Conv1D 1 LoRA": "expects embeddings untrained; we train them",
    "test_active_adapter[Embedding + transformers Conv1D 1 DoRA": "expects embeddings untrained; we train them",
    "test_requires_grad_lora_emb_conv1d": "expects embeddings untrained; we train them",
    "test_override_lora_linear": "loads a model from the Hub",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if any(name in item.nodeid for name in DESELECTED)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("deselected in PEFT's suite")
    for name, reason in DESELECTED.items():
        terminalreporter.line(f"{name}: {reason}")
