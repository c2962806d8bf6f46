"""A tiny staged run, new or resumed, for `test_distributed.py`: OUTPUT BATCH_SIZE [tied] [bf16] ... [pose]."""

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import json
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer
from hf_longlora.trainer import last_checkpoint


def tiny_model(*options: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64 if "qlora" in options else 32,  # bitsandbytes quantizes 64 weights together
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings="tied" in options,
        )
    )
    if "qlora" in options:
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        state = model.state_dict()
        return LlamaForCausalLM.from_pretrained(
            None, config=model.config, state_dict=state, quantization_config=four_bits
        )
    return model.to(torch.bfloat16) if "bf16" in options else model


def main(output: str, batch_size: int, *options: str) -> None:
    torch.set_num_threads(1)
    model = tiny_model(*options)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, 128)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    # Of PoSE, a process may have one window where another has four: a step then takes as many forwards in each.
    lengths = [256, 256, 150, 40] if "pose" in options else [256]
    rows = [[3 + (i * 7 + j * j) % 100 for j in range(lengths[i % len(lengths)])] for i in range(40)]
    data = {"input_ids": rows}
    if "answers" in options:  # fewer in the one half of a sequence than in the other, and in one row than in the next
        data["labels"] = [[-100 if j < 90 + i % 37 else x for j, x in enumerate(row)] for i, row in enumerate(rows)]
    if "packed" in options:
        data = {"input_ids": [row[: (64, 192)[i % 2]] for i, row in enumerate(rows)]}
    train_dataset = Dataset.from_dict(data)
    evaluated = [row[:length] for row, length in zip(rows, (256, 150, 90, 33), strict=False)]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Gloo gathers no batches of two stages at once: as many of each as processes read in turn.
    steps = 3 if "shards" not in options or "thirds" in options else 4
    args = LongLoraSFTConfig(
        output_dir=output,
        stages=[
            ContextStage(128, steps),
            ContextStage(256, steps, **({"sparse": "pose", "dense_every": 0} if "pose" in options else {})),
        ],
        sequence_parallel=max(1, processes // 2 if "groups" in options else processes) if "shards" in options else 1,
        mlp_tile=20 if "tiles" in options else None,
        per_device_eval_batch_size=1,
        # What bitsandbytes 0.50 packs for a CPU's evaluation gives no gradients afterwards.
        eval_strategy="steps" if "shards" in options and "qlora" not in options else "no",
        eval_steps=3,
        gradient_accumulation_steps=2 if "packed" in options else 1,
        packing="packed" in options,
        shuffle_buffer=5,
        dense_every=2,
        sparse="s2",
        use_cpu=not torch.cuda.is_available(),
        bf16="bf16" in options,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        warmup_steps=1,
        save_strategy="steps",
        save_steps=2,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        # accelerate looks at FSDP's settings on accelerators alone, and takes the CPU for DDP.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    trainer = LongLoraSFTTrainer(
        model,
        args,
        train_dataset=train_dataset.to_iterable_dataset(num_shards=4) if "stream" in options else train_dataset,
        eval_dataset=Dataset.from_dict({"input_ids": evaluated}) if "shards" in options else None,
        processing_class=tokenizer,
        peft_config=LongLoraConfig(r=4),
    )
    tokens = []

    def count(module, args, kwargs, output):
        if not module.training:
            tokens.append(output.last_hidden_state.shape[1])

    for module in trainer.model.modules():
        if isinstance(module, LlamaModel):
            module.register_forward_hook(count, with_kwargs=True)
    checkpoint = last_checkpoint(output)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    after = trainer.evaluate()["eval_loss"] if "shards" in options else None
    if trainer.is_world_process_zero():
        keys = ("loss", "stage", "attention", "num_tokens")
        logs = [{key: log[key] for key in keys} for log in trainer.state.log_history if "stage" in log]
        kinds = {type(p).__name__ for p in trainer.model.parameters()}
        run = {"logs": logs, "by": str(trainer.accelerator.distributed_type), "parameters": sorted(kinds)}
        if "shards" in options:
            run |= {"after": after, "evaluated": max(tokens)}
            run["others"] = [
                {key: log[key] for key in ("grad_norm", "eval_loss") if key in log}
                for log in trainer.state.log_history
                if "grad_norm" in log or "eval_loss" in log
            ]
        run["from"] = checkpoint and Path(checkpoint).name
        Path(output, "run.json").write_text(json.dumps(run))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
