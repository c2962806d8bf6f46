"""Learn from rewards after extension, by TRL's own GRPOTrainer: the adapter goes on from where it was left.

    python examples/grpo_after_extension.py \
        --adapter llama-3.1-8b-262k \
        --dataset_name questions.jsonl \
        --max_completion_length 1024 --num_generations 8 --max_steps 300 --learning_rate 1e-6 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
        --output_dir llama-3.1-8b-262k-grpo

A row has a long `prompt` and the `answer` that a completion is to contain. What the model says is drawn by dense
attention, and has to be scored by the same: hence `s2_attention_mode(model, "dense")`. Sparse training would score it
as another model's words.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, TrlParser

from hf_longlora import s2_attention_mode


@dataclass
class RewardArguments:
    adapter: str = field(metadata={"help": "The extension's adapter: a folder, or on the Hub."})
    dataset_name: str = field(metadata={"help": "A file of rows with prompt and answer."})
    dtype: str = field(default="bfloat16", metadata={"help": "The base's dtype; what is trained is fp32."})


def found(completions: list[str], answer: list[str], **kwargs: object) -> list[float]:
    """1 where the answer is in the completion, and a little for being short."""
    return [float(wanted in text) - 1e-4 * len(text) for text, wanted in zip(completions, answer, strict=True)]


def main() -> None:
    script, args = TrlParser((RewardArguments, GRPOConfig)).parse_args_and_config()
    model = AutoPeftModelForCausalLM.from_pretrained(
        script.adapter, is_trainable=True, dtype=script.dtype, attn_implementation="s2attn"
    )
    trainer = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=found,
        train_dataset=load_dataset("json", data_files=script.dataset_name, split="train"),
        processing_class=AutoTokenizer.from_pretrained(script.adapter),
    )
    with s2_attention_mode(model, "dense"):
        trainer.train()
    model.save_pretrained(args.output_dir, selected_adapters=["default"])  # not the reference that a beta asks for


if __name__ == "__main__":
    main()
