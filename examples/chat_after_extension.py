"""Fine-tune on long conversations after extension: the same adapter goes on, at a length that it reaches already.

    python examples/chat_after_extension.py \
        --adapter llama-3.1-8b-262k \
        --dataset_name zai-org/LongAlign-10k \
        --stages '[{"max_length": 65536, "max_steps": 300, "rope_type": null}]' \
        --chat_template_path examples/chat.jinja --assistant_only_loss \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --mlp_tile 8192 \
        --output_dir llama-3.1-8b-262k-chat

`rope_type: null` keeps the RoPE of the extension: the conversations are shorter than what the model reaches, and it
has to stay what the model was trained with. Longer ones are cut at max_length, and left out where that cuts off all
that the assistant says. The result is one adapter on the same base, loaded and merged as the first. Leave
`--chat_template_path` out where the tokenizer has a template (of an instruct model, for example).

From a merged model, no script is needed: give it to `hf-longlora train` as model_name_or_path, with the same stages,
and a second adapter is trained on it.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import ScriptArguments, TrlParser

from hf_longlora import LongLoraSFTConfig, LongLoraSFTTrainer


@dataclass
class ChatArguments(ScriptArguments):
    adapter: str | None = field(default=None, metadata={"help": "The extension's adapter: a folder, or on the Hub."})
    dtype: str = field(default="bfloat16", metadata={"help": "The base's dtype; what is trained is fp32."})


def main() -> None:
    parser = TrlParser((ChatArguments, LongLoraSFTConfig))
    script, args = parser.parse_args_and_config()
    if script.adapter is None or script.dataset_name is None:
        parser.error("--adapter and --dataset_name are required")
    model = AutoPeftModelForCausalLM.from_pretrained(script.adapter, is_trainable=True, dtype=script.dtype)
    trainer = LongLoraSFTTrainer(
        model=model,
        args=args,
        train_dataset=load_dataset(script.dataset_name, name=script.dataset_config)[script.dataset_train_split],
        processing_class=AutoTokenizer.from_pretrained(script.adapter),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main()
