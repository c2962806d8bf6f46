"""Learn from preferences after extension, by TRL's own DPOTrainer: the adapter goes on from where it was left.

    python examples/dpo_after_extension.py \
        --adapter llama-3.1-8b-262k \
        --dataset_name preferences.jsonl \
        --max_length 65536 --max_steps 300 --learning_rate 5e-6 \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 8 \
        --output_dir llama-3.1-8b-262k-dpo

The trainer is given the PeftModel, and keeps a copy of its adapter as the reference: the extended model, as it was.
From a bare base and a `LongLoraConfig` with a `target_length` it would take the reference by switching the adapter
off, which is the base with its own, shorter RoPE. The loss starts at ln 2 = 0.693 where the reference is right.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, TrlParser

import hf_longlora  # noqa: F401  (registers "s2attn" and the adapter)


@dataclass
class PreferenceArguments:
    adapter: str = field(metadata={"help": "The extension's adapter: a folder, or on the Hub."})
    dataset_name: str = field(metadata={"help": "A file of rows with prompt, chosen and rejected."})
    dtype: str = field(default="bfloat16", metadata={"help": "The base's dtype; what is trained is fp32."})


def main() -> None:
    script, args = TrlParser((PreferenceArguments, DPOConfig)).parse_args_and_config()
    model = AutoPeftModelForCausalLM.from_pretrained(
        script.adapter, is_trainable=True, dtype=script.dtype, attn_implementation="s2attn"
    )
    trainer = DPOTrainer(
        model=model.train(),  # a reference that is computed beforehand sees the attention of training, too
        args=args,
        train_dataset=load_dataset("json", data_files=script.dataset_name, split="train"),
        processing_class=AutoTokenizer.from_pretrained(script.adapter),
    )
    trainer.train()
    model.save_pretrained(args.output_dir, selected_adapters=["default"])  # not the reference


if __name__ == "__main__":
    main()
