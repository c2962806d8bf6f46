"""transformers' common model tests with `"s2attn"` as the attention of every model (`make test-third-party`).

Copied beside them into the sdist, which leaves two modules out that they import.
"""

import importlib.util
import sys
import types
import unittest
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

import hf_longlora  # noqa: F401 (registers s2attn)

for name, mixin in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    if importlib.util.find_spec(f"tests.{name.partition('.')[0]}") is None:
        package, module = types.ModuleType(f"tests.{name.partition('.')[0]}"), types.ModuleType(f"tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules |= {package.__name__: package, module.__name__: module}

from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402

_stock = PreTrainedModel.get_correct_attn_implementation


def _s2attn_by_default(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
    return _stock(self, requested_attention or "s2attn", *args, **kwargs)


PreTrainedModel.get_correct_attn_implementation = _s2attn_by_default  # type: ignore[method-assign]


class Tester:
    """What the mixin asks of a model's own tester: a tiny configuration and inputs."""

    batch_size, seq_length, is_training = 2, 13, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, config_class: type, **options: Any) -> None:
        self.config_class, self.options = config_class, options

    def get_config(self) -> Any:
        return self.config_class(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        # Padded on the left, each row by another amount; random holes, which others' testers have, are refused.
        mask = (torch.arange(self.seq_length) >= torch.tensor([[0], [4]])).long()
        return self.get_config(), {"input_ids": ids_tensor(shape, 99), "attention_mask": mask}


class Common(ModelTesterMixin):
    @unittest.skip("the sdist leaves GenerationTesterMixin out")
    def test_generation_tester_mixin_inheritance(self) -> None:
        pass

    @unittest.skip("wants sdpa as the default")
    def test_sdpa_can_dispatch_non_composite_models(self) -> None:
        pass


class LlamaTest(Common, unittest.TestCase):
    all_model_classes = (LlamaModel, LlamaForCausalLM)

    def setUp(self) -> None:
        self.model_tester = Tester(LlamaConfig)


class MistralTest(Common, unittest.TestCase):
    all_model_classes = (MistralModel, MistralForCausalLM)

    def setUp(self) -> None:
        self.model_tester = Tester(MistralConfig, sliding_window=None)


class Qwen3Test(Common, unittest.TestCase):
    all_model_classes = (Qwen3Model, Qwen3ForCausalLM)

    def setUp(self) -> None:
        self.model_tester = Tester(Qwen3Config, head_dim=8)


class TheAttentionIsOurs(unittest.TestCase):
    def test_default(self) -> None:
        for model_class, config_class in ((LlamaModel, LlamaConfig), (MistralForCausalLM, MistralConfig)):
            assert model_class(Tester(config_class).get_config()).config._attn_implementation == "s2attn"
