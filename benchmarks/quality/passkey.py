"""Passkey retrieval by length and depth, of models extended in several ways.

    python -m benchmarks.quality.passkey --work DIR [--only dense "s2 1/4 dense_every 8"] [--steps 60]

A base this small answers no question by itself, so each extended model is first fine-tuned on the task for a few
steps, the loss on the answer alone: at the base's own length, densely, all of them alike. What is then found at longer
lengths is the extension's doing. `--teach-length 4096` fine-tunes at the target's length instead, under the attention
of the extension; sparse steps then teach little, for they seldom see the passkey. Rows: `results/passkey.csv`.
"""

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_longlora import ContextStage, LongLoraSFTConfig, LongLoraSFTTrainer, passkey_accuracy
from hf_longlora.attention import get_s2_attention
from hf_longlora.evaluation import passkey_example

from ..provenance import RESULTS, append_row, provenance, read_rows
from .data import load_tokenizer
from .extend import Run, train
from .run import FINAL, SCHEDULE

DEPTHS = tuple(i / 8 for i in range(9))


def examples(tokenizer: Any, target: int, count: int, seed: int) -> Dataset:
    """Texts of `target` tokens, each with another passkey at another depth; labels on the answer alone."""
    draw = random.Random(seed)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for _ in range(count):
        key = str(draw.randrange(10_000, 100_000))
        prompt, answer = passkey_example(tokenizer, target, draw.random(), key)
        rows["input_ids"].append(prompt + answer)
        rows["labels"].append([-100] * len(prompt) + answer)
    return Dataset.from_dict(rows)


def teach(
    model: Any, run: Run, tokenizer: Any, steps: int, learning_rate: float, length: int = 512, batch: int = 32
) -> None:
    """Fine-tune an extended model on the task: at its target length under its own schedule, at others densely."""
    attention: Any = "s2attn" if run.method == "s2" and length == run.target else "dense"
    stage = ContextStage(length, steps, rope_type=None, attention=attention)
    with tempfile.TemporaryDirectory() as output:
        args = LongLoraSFTConfig(
            output_dir=output,
            stages=[stage],
            dense_every=run.dense_every,
            group_size_ratio=run.group_size_ratio,
            sink_tokens=0,  # as all rows
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            warmup_steps=5,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            seed=run.seed,
            logging_strategy="no",
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        )
        dataset = examples(tokenizer, length, steps * batch, run.seed)
        trainer = LongLoraSFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        get_s2_attention(trainer.model).shift = run.shift
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="base", help="folder of the base in the work directory")
    parser.add_argument("--results", type=Path, default=RESULTS / "passkey.csv")
    parser.add_argument(
        "--only", nargs="*", default=["dense", "s2 1/4", "s2 1/4 dense_every 8", "s2 1/16 dense_every 4"]
    )
    parser.add_argument("--target", type=int, default=4096)
    parser.add_argument("--extension-steps", type=int, default=Run.__dataclass_fields__["steps"].default)
    parser.add_argument("--batch", type=int, default=Run.__dataclass_fields__["batch"].default)
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning on the task")
    parser.add_argument("--teach-length", type=int, default=512, help="tokens in a text of the fine-tuning")
    parser.add_argument("--teach-batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--trials", type=int, default=20)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.work)
    done = {(row["name"], row["target"], row["passkey_length"]) for row in read_rows(args.results)}
    runs = {run.name: run for run in (*FINAL, *SCHEDULE)}
    for run in runs.values():
        if run.name not in args.only or (run.name, str(args.target), str(args.teach_length)) in done:
            continue
        run = replace(run, target=args.target, steps=args.extension_steps, batch=args.batch)
        started = time.perf_counter()
        model, _ = train(run, args.work / args.base, args.work)
        teach(model, run, tokenizer, args.steps, args.learning_rate, args.teach_length, args.teach_batch)
        lengths = [args.target // 2**i for i in (3, 2, 1, 0)]
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            records = passkey_accuracy(model, tokenizer, lengths, DEPTHS, trials=args.trials, progress=False)
        for record in records:
            append_row(
                args.results,
                {
                    "name": run.name,
                    "target": run.target,
                    "extension_steps": run.steps,
                    "passkey_steps": args.steps,
                    "passkey_length": args.teach_length,
                    "passkey_batch": args.teach_batch,
                    "learning_rate": args.learning_rate,
                    "seed": run.seed,
                    **record,
                    "seconds": time.perf_counter() - started,
                    **provenance(),
                },
            )
        worst = min(record["accuracy"] for record in records)
        mean = sum(record["accuracy"] for record in records) / len(records)
        print(f"{run.name:24} passkey accuracy mean {mean:.2f} worst {worst:.2f}", flush=True)


if __name__ == "__main__":
    main()
