"""A pytest plugin for PEFT's own suite: `LongLoraConfig` wherever it says `LoraConfig` (`make test-third-party`).

Read from the environment: LONGLORA_TARGET_LENGTH, to which the adapters scale RoPE (models without one are left out
then), and LONGLORA_LORA_ALONE, with which norms and embeddings are not trained.
"""

import contextlib
import importlib.util
import os
import sys
import types
from typing import Any

import peft
import pytest

from hf_longlora import LongLoraConfig

if importlib.util.find_spec("diffusers") is None:
    # The suite's helpers import one class of it, which these tests never use.
    stand_in: Any = types.ModuleType("diffusers")
    stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stand_in

TARGET_LENGTH = int(os.environ.get("LONGLORA_TARGET_LENGTH") or 0) or None
LORA_ALONE = bool(os.environ.get("LONGLORA_LORA_ALONE"))


class LoraConfig(LongLoraConfig):
    """LongLoraConfig with the defaults of LoraConfig that the suite's expectations rest on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("task_type", None)
        kwargs.setdefault("lora_alpha", 8)
        kwargs.setdefault("target_length", TARGET_LENGTH)
        kwargs.setdefault("train_norms", not LORA_ALONE)
        kwargs.setdefault("train_embeddings", not LORA_ALONE)
        super().__init__(*args, **kwargs)


peft.LoraConfig = LoraConfig  # before the suite imports it

from tests import testing_utils  # noqa: E402  (PEFT's; the working directory is its sdist)

# It goes online for the first use of each model.
testing_utils.hub_online_once = lambda model_id: contextlib.nullcontext()

# What can't hold for this adapter, or not here: part of a test's id -> reason.
DESELECTED = {
    "test_save_pretrained_pickle": "pickled weights are refused: loading one can run code",
    "test_save_pretrained_selected_adapters_pickle": "pickled weights are refused: loading one can run code",
    "test_override_lora_linear": "loads a model from the Hub",
}
DECODERS = "test_decoder_models.py::TestDecoderModels::"
if not LORA_ALONE:
    DESELECTED |= {
        "test_active_adapter[Embedding + transformers Conv1D 1 LoRA": "expects embeddings untrained; we train them",
        "test_active_adapter[Embedding + transformers Conv1D 1 DoRA": "expects embeddings untrained; we train them",
        "test_requires_grad_lora_emb_conv1d": "expects embeddings untrained; we train them",
        f"{DECODERS}test_prepare_for_training_parametrized": "expects embeddings untrained; we train them",
        f"{DECODERS}test_lora_layer_replication": "expects embeddings untrained; we train them",
        f"{DECODERS}test_training_decoders_layer_indexing": "expects gradients of LoRA alone; norms have them too",
        f"{DECODERS}test_training_decoders_gradient": "expects gradients of LoRA alone; norms have them too",
        f"{DECODERS}test_mixed_adapter_batches": "PEFT mixes no whole norms in a batch",
        f"{DECODERS}test_generate_with_mixed_adapter_batches": "PEFT mixes no whole norms in a batch",
        f"{DECODERS}test_merge_layers_multi": "no model has the whole norms of two adapters, merged together",
        f"{DECODERS}test_weighted_combination_of_adapters": "PEFT adds up no modules that are trained whole",
    }
if TARGET_LENGTH is not None:
    DESELECTED |= {
        "tiny-random-OPTForCausalLM": "no RoPE to scale",
        "tiny-random-GPT2LMHeadModel": "no RoPE to scale",
        "tiny-random-GPTJForCausalLM": "its RoPE is not in its config",
    }


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if any(name in item.nodeid for name in DESELECTED)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("deselected in PEFT's suite")
    for name, reason in DESELECTED.items():
        terminalreporter.line(f"{name}: {reason}")
