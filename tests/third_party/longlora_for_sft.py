"""A pytest plugin for TRL's own SFT tests: our trainer, configuration and adapter in the place of theirs.

`SFTTrainer` is `LongLoraSFTTrainer` with one stage at the length the model has already, `SFTConfig` is
`LongLoraSFTConfig`, and `LoraConfig` is `LongLoraConfig` without norms and embeddings, which the suite expects
untouched (`make test-third-party`). TRL_STOCK in the environment is the report (JUnit's XML) of the same tests with
TRL's own: what passed there has to pass here, unless DESELECTED says why not.
"""

import copy
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import peft
import pytest
import trl
import trl_offline  # noqa: F401 (before the suite imports datasets)

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer

STEPS = 9  # three passes over the 17 examples of TRL's datasets in batches of 8, what TRL's default comes to

# What can't hold for this trainer: part of a test's id -> reason.
DESELECTED = {
    "test_init_with_training_arguments": "TrainingArguments have no stages, and are refused",
    "test_train_dataset_required": "the argument has no default: a TypeError in the place of a ValueError",
    "test_skip_prepare_dataset_with_masks_but_no_labels_raises": "skip_prepare_dataset is refused, in other words",
    "test_padding_free_without_packing_and_max_length_raises": "padding_free alone is refused, in other words",
    # A stage's last step is logged, and with it what TRL would leave to the last entry.
    "test_train[trl-internal-testing/tiny-GptOssForCausalLM]": "aux_loss is in the entry before the log's last",
    "test_train[trl-internal-testing/tiny-Qwen3MoeForCausalLM]": "aux_loss is in the entry before the log's last",
    "test_prompt_tuning": "mean_token_accuracy is in the entry before the log's last",
}
# These count the rows of `train_dataset`, which has those of each pass over the examples: they get the first pass.
COUNT_ROWS = (
    "test_eval_packing",
    "test_only_train_packing",
    "test_fully_masked_examples_dropped_after_truncation",
    "test_dataset_preparation_respects_existing_labels",
    "test_dataset_preparation_builds_labels_for_pretokenized_with_masks",
)


class LoraConfig(LongLoraConfig):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"train_norms": False, "train_embeddings": False} | kwargs)


class SFTConfig(LongLoraSFTConfig):
    """One stage, in groups of 4 tokens, as the suite's sequences are short, and in the order of the dataset."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        stage = ContextStage(kwargs.get("max_length") or 1024, kwargs.get("max_steps", STEPS), rope_type=None)
        own = {"stages": [stage], "group_size": 4, "dense_every": 3, "train_sampling_strategy": "sequential"}
        super().__init__(*args, **own | {"report": False, "max_eval_examples": 100} | kwargs)


class SFTTrainer(LongLoraSFTTrainer):
    first_pass = False

    def __init__(self, model: Any, args: Any = None, **kwargs: Any) -> None:
        args = SFTConfig("out") if args is None else copy.copy(args)
        if "GptOss" in (model if isinstance(model, str) else type(model).__name__):
            args.attention_kernel = "reference"  # the one that has sinks on the CPU
        super().__init__(model, args, **kwargs)
        if self.first_pass:
            rows: Any = self.train_dataset
            self.train_dataset = self._rows = rows.select(range(self._stage_examples[0]))


trl.SFTConfig, trl.SFTTrainer, peft.LoraConfig = SFTConfig, SFTTrainer, LoraConfig  # before the suite imports them


@pytest.fixture(autouse=True)
def first_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTTrainer, "first_pass", request.node.name in COUNT_ROWS)


def stock() -> dict[str, str]:
    """What became of each test with TRL's own trainer: passed, skipped, failure or error."""
    return {
        f"{case.get('classname')}::{case.get('name')}": next(
            (part.tag for part in case if part.tag in ("skipped", "failure", "error")), "passed"
        )
        for case in ElementTree.parse(os.environ["TRL_STOCK"]).iter("testcase")
    }


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    became = stock()
    passed = [i for i in items if became[f"{i.module.__name__}.{i.cls.__name__}::{i.name}"] == "passed"]
    kept = [item for item in passed if not any(name in item.nodeid for name in DESELECTED)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("left out of TRL's SFT tests")
    became = list(stock().values())
    failed = became.count("failure") + became.count("error")
    terminalreporter.line(
        f"Tests of TRL {Path('VERSION').read_text().strip()}, with TRL {trl.__version__}, whose own trainer passes "
        f"{became.count('passed')}, fails {failed} and skips {became.count('skipped')}. Of those passed, not run:"
    )
    for name, reason in DESELECTED.items():
        terminalreporter.line(f"{name}: {reason}")
