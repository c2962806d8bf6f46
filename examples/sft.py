"""TRL's SFT script with this package's trainer: three names differ, each marked with what it was.

    python examples/sft.py \
        --model_name_or_path meta-llama/Llama-2-7b-hf --dtype bfloat16 \
        --dataset_name emozilla/pg19 \
        --stages '[{"max_length": 8192, "max_steps": 100}, {"max_length": 32768, "max_steps": 400}]' \
        --packing --packing_strategy wrapped --per_device_train_batch_size 1 --gradient_accumulation_steps 8 \
        --use_peft --lora_r 8 --lora_alpha 16 --lora_dropout 0 \
        --output_dir llama-2-7b-32k

`hf-longlora train` takes the same options, reads local text files too, and resumes by itself; a script of your own is
for what an option can't say.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from hf_longlora import LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, LongLoraSFTConfig, ModelConfig))  # SFTConfig
    script, args, model = parser.parse_args_and_config()
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "quantization_config": get_quantization_config(model),
        **(args.model_init_kwargs or {}),
    }
    dataset = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = LongLoraSFTTrainer(  # SFTTrainer
        model=model.model_name_or_path,
        args=args,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if args.eval_strategy != "no" else None,
        peft_config=LongLoraConfig(  # LoraConfig; without an adapter all weights are trained
            r=model.lora_r, lora_alpha=model.lora_alpha, lora_dropout=model.lora_dropout
        )
        if model.use_peft
        else None,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main()
