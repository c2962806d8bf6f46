"""A Hub cache with the tiny models that other projects' tests ask for: `python hub_cache.py $HF_HUB_CACHE`.

Random weights under the models' names, so that suites written against the Hub run without it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

REVISION = "0" * 40
# PEFT's decoder suite uses token ids up to 1000.
TOKENS: dict[str, Any] = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Its weighted combinations want projections wider than rank 20.
SHAPE: dict[str, Any] = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT: dict[str, Any] = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
OPT: dict[str, Any] = TOKENS | {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

# The names that PEFT 0.21's tests/test_decoder_models.py gives to LoRA's tests.
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (OPTForCausalLM, OPTConfig(**OPT, word_embed_proj_dim=32)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (GPT2LMHeadModel, GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (GPTJForCausalLM, GPTJConfig(**GPT, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (MistralForCausalLM, MistralConfig(**SHAPE)),
    "peft-internal-testing/tiny-dummy-qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**SHAPE | {"hidden_size": 32}, head_dim=8, sliding_window=64),
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"t{i}": i for i in range(4, 1000)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save(cache: Path, name: str, *parts: PreTrainedModel | PreTrainedTokenizerFast) -> None:
    """Put a model, a tokenizer or both into the cache, as if they had been downloaded."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for part in parts:
        part.save_pretrained(folder / "snapshots" / REVISION)
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(REVISION)


def main(cache: Path) -> None:
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(0)
        save(cache, name, model_class(config), tokenizer())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
