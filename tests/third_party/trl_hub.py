"""What TRL's SFT tests ask of the Hub, made here: `python trl_hub.py CHECKOUT $HF_HUB_CACHE`.

Models under the names they use, with random weights and a small tokenizer with TRL's chat templates; and the datasets,
by the scripts in TRL's checkout that made those on the Hub. Models that see pictures are left out.
"""

import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import trl
from datasets import Dataset, DatasetDict, disable_progress_bars
from hub_cache import save
from modeling_remote import RemoteConfig, RemoteForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TEMPLATES = Path(trl.__file__).with_name("chat_templates")
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),  # gpt-oss
]

# The shapes are those of scripts/generate_tiny_models in TRL's repository.
SHAPE: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = SHAPE | {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LAYERS_OF_EACH_KIND: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layers_block_type": ["mamba", "attention", "moe"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "mamba_n_groups": 1,
    "ssm_state_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}
LFM2: dict[str, Any] = SHAPE | {"full_attn_idxs": [1], "block_multiple_of": 8}

# Name -> its class, its configuration, the template of its tokenizer. The names are those of TRL 1.10's tests.
MODELS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any], str | None]] = {
    "Qwen2ForCausalLM-2.5": (Qwen2ForCausalLM, Qwen2Config, SHAPE, "qwen2_5"),
    "Qwen3ForCausalLM": (Qwen3ForCausalLM, Qwen3Config, SHAPE | {"head_dim": 2}, "qwen3"),
    "Qwen3MoeForCausalLM": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS | {"num_experts": 4}, "qwen3"),
    "GptOssForCausalLM": (
        GptOssForCausalLM,
        GptOssConfig,
        SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "gptoss",
    ),
    "Cohere2ForCausalLM": (Cohere2ForCausalLM, Cohere2Config, SHAPE | {"logit_scale": 1.0}, None),
    "Glm4MoeForCausalLM": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig,
        EXPERTS | {"head_dim": 2, "n_routed_experts": 4, "use_qk_norm": True},
        None,
    ),
    "GPTNeoXForCausalLM": (GPTNeoXForCausalLM, GPTNeoXConfig, SHAPE, None),
    "Lfm2ForCausalLM": (Lfm2ForCausalLM, Lfm2Config, LFM2, None),
    "Lfm2ForCausalLM-2.5": (Lfm2ForCausalLM, Lfm2Config, LFM2, None),
    "NemotronHForCausalLM-nano": (NemotronHForCausalLM, NemotronHConfig, LAYERS_OF_EACH_KIND, None),
    "Olmo3ForCausalLM": (Olmo3ForCausalLM, Olmo3Config, SHAPE, None),
    "RemoteForCausalLM": (RemoteForCausalLM, RemoteConfig, SHAPE, None),
}


def texts(datasets: Path) -> Iterator[str]:
    """What the tokenizer learns its words from."""
    for file in sorted(datasets.rglob("*.parquet")):
        yield from map(str, Dataset.from_parquet(str(file)))


def tokenizer(corpus: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of few tokens, which leaves no text unknown."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny(model_class: type[PreTrainedModel], config_class: type, fields: dict[str, Any], size: int) -> PreTrainedModel:
    torch.manual_seed(0)
    tokens = {"vocab_size": size, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    model = model_class(config_class(**fields | tokens))
    for parameter in model.parameters():
        if parameter.dim() == 2:  # larger than by default: gradients of a model this narrow would vanish
            torch.nn.init.xavier_uniform_(parameter)
    return model


def make_datasets(checkout: Path, folder: Path) -> None:
    def to_folder(self: DatasetDict, repo_id: str, config_name: str) -> None:
        for split, rows in self.items():
            file = folder / repo_id / config_name / f"{split}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(str(file))

    with patch.object(DatasetDict, "push_to_hub", to_folder):
        for name in ("zen", "harmony", "toolcall"):
            script = runpy.run_path(str(checkout / "scripts" / f"generate_{name}_dataset.py"))
            script["main"](test_size=0.1, push_to_hub=True, repo_id=f"trl-internal-testing/{name}")


def main(checkout: Path, cache: Path) -> None:
    datasets = cache / "datasets"
    shutil.rmtree(datasets, ignore_errors=True)
    make_datasets(checkout, datasets)
    words = tokenizer(texts(datasets))
    for name, (model_class, config_class, fields, template) in MODELS.items():
        words.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if template else None
        model = tiny(model_class, config_class, fields, len(words))
        save(cache, f"trl-internal-testing/tiny-{name}", model, words)
        if name == "Qwen3ForCausalLM":
            save(cache, "Qwen/Qwen3-4B", model, words)  # for its template


if __name__ == "__main__":
    disable_progress_bars()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
