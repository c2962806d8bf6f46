"""Fixtures for the whole suite: tiny models and a tiny tokenizer, made in memory. Nothing is downloaded."""

import gc
import os

# Read by the libraries when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .parallel.processes import Processes

# A machine with much else to do is slow, and that is no finding.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
torch.set_num_threads(1)  # pytest-xdist fills the cores; more threads per worker slow it down

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A long book has many chapters, and the last one answers the first.",
    "Remember the pass key: it is 0123456789. What is the pass key?",
    "the and of to in a is that it was for on with as he be at by",
]
ASCII = "".join(map(chr, range(32, 127))) + "\n"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ bos_token if loop.first }}{{ message["role"] }}: {% if message["role"] == "assistant" -%}
{% generation %}{{ message["content"] }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ message["content"] }}
{% endif %}
{%- endfor -%}
{%- if add_generation_prompt %}assistant: {% endif %}"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.freeze()  # all that was imported: each run of Trainer collects garbage, and would look through it (0.3 s)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """A factory of randomly initialised Llamas on the CPU: `tiny_llama(num_hidden_layers=1)`.

    Keywords override the fields of `LlamaConfig`. Two calls in one test give different weights, the same in every run.
    """

    def make(**overrides: Any) -> LlamaForCausalLM:
        fields: dict[str, Any] = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return LlamaForCausalLM(LlamaConfig(**fields | overrides))

    return make


@pytest.fixture(scope="session")
def _tokenizer_model() -> Tokenizer:
    """Byte-level BPE over ASCII, with 128 tokens so that each id fits `tiny_llama`; other bytes become <unk>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=128, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([ASCII, *SENTENCES], trainer)
    return tokenizer


@pytest.fixture
def tiny_tokenizer(_tokenizer_model: Tokenizer) -> PreTrainedTokenizerFast:
    """A fresh tokenizer with `<pad>` 0, `<s>` 1, `</s>` 2 and a chat template that marks the assistant's tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer_model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Four processes that talk by gloo, started once for all tests."""
    started = Processes()
    yield started
    started.stop()
