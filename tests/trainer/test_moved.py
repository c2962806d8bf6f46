"""What is trained moves at the paper's rate, element by element: on any base, by any trainer, in each part."""

import importlib.util

import pytest
import torch
from datasets import Dataset
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer

STEPS = 4
BITS = {
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "8": {"load_in_8bit": True},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = ["4-bit, bf16", "4-bit, fp32", "4-bit, prepared", "8-bit, bf16", "8-bit, fp16"]
without_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="QLoRA needs bitsandbytes"
)
BASES = [*DTYPES, *(pytest.param(name, marks=without_library) for name in QUANTIZED)]
IDS = [[3 + (i * 7 + j * (i + 1)) % 125 for j in range(125)] for i in range(8)]
"""Each token that the tiny tokenizer doesn't keep for itself."""


@pytest.fixture
def load(tiny_llama, tmp_path):
    """A base by its name: its numbers in a dtype, or quantized with the rest in one."""

    def make(name):
        quantization, _, rest = name.rpartition(", ")
        # bitsandbytes' 4-bit CPU kernels take widths that its blocks of 64 and 32 divide.
        tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
        dtype = DTYPES.get(rest, torch.bfloat16)
        options = {}
        if quantization:
            options = {
                "quantization_config": BitsAndBytesConfig(**BITS[quantization[0]]),
                "device_map": {"": "cpu"},
            }
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype, **options)
        return prepare_model_for_kbit_training(model) if rest == "prepared" else model

    return make


def trainer_of(kind, model, tokenizer, output, peft_config, **options):
    shared = dict(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        **options,
    )
    texts = Dataset.from_dict({"input_ids": IDS})
    if kind == "ours":
        stages = [ContextStage(128, STEPS)]
        args = LongLoraSFTConfig(**shared, stages=stages, report=False)
        return LongLoraSFTTrainer(
            model, args, train_dataset=texts, processing_class=tokenizer, peft_config=peft_config
        )
    if kind == "SFTTrainer":
        args = SFTConfig(**shared, max_steps=STEPS, max_length=128)
        return SFTTrainer(model, args=args, train_dataset=texts, processing_class=tokenizer, peft_config=peft_config)
    words = [tokenizer.decode(ids) for ids in IDS]
    pairs = {"prompt": ["q"] * 8, "chosen": words, "rejected": [text[::-1] for text in words]}
    args = DPOConfig(**shared, max_steps=STEPS, max_length=256)
    data = Dataset.from_dict(pairs)
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


def moved(trainer):
    """Train, and count the elements of each part that are not what they were."""
    tuner = trainer.model.base_model
    parts = {part: [p.detach().clone() for p in found] for part, found in tuner.parts().items()}
    trainer.train()
    counts = {}
    for part, found in tuner.parts().items():
        assert {p.dtype for p in found} == {torch.float32}
        changed = [p.detach() != before.float() for p, before in zip(found, parts[part], strict=True)]
        counts[part] = (sum(int(c.sum()) for c in changed), sum(c.numel() for c in changed))
    return counts


@pytest.mark.parametrize("kind", ["ours", "SFTTrainer", "DPOTrainer"])
@pytest.mark.parametrize("base", BASES)
def test_all_that_is_trained_moves(kind, base, load, tiny_tokenizer, tmp_path):
    config = LongLoraConfig(r=4, target_length=None if kind == "ours" else 128)
    options = {"bf16": base not in ("fp32", "4-bit, fp32")}
    counts = moved(trainer_of(kind, load(base), tiny_tokenizer, tmp_path / "out", config, **options))
    lora, norms, embeddings = (counts[part] for part in ("LoRA", "norms", "embeddings"))
    assert norms[1] == 5 * 64 and norms[0] >= 0.98 * norms[1]  # one may have come back to where it was
    assert lora[0] >= 0.98 * lora[1] > 0
    assert embeddings[0] >= 0.9 * embeddings[1]  # of tokens that occur


@pytest.mark.parametrize("part", [{"embedding_rank": 2}, {"trainable_token_indices": [10, 11, 12]}], ids=str)
@pytest.mark.parametrize("base", ["bf16", pytest.param("4-bit, bf16", marks=without_library)])
def test_embeddings_trained_in_part_move(part, base, load, tiny_tokenizer, tmp_path):
    trainer = trainer_of(
        "SFTTrainer", load(base), tiny_tokenizer, tmp_path / "out", LongLoraConfig(r=4, **part), bf16=True
    )
    count, of = moved(trainer)["embeddings"]
    assert count > 0.9 * of > 0
