"""A million tokens through `LongLoraSFTTrainer`: seconds, memory and communication of a user's run over several GPUs.

    accelerate launch --config_file examples/accelerate_configs/zero2.yaml --num_processes 8 -m benchmarks.million
    accelerate launch --config_file examples/accelerate_configs/zero2.yaml --num_processes 4 \\
        -m benchmarks.million --stages dense@262144x2 sparse-2048@1048576x3 --offload 0.4

The model is Qwen3-8B's shape with random weights in bf16 (TRL documents 380 s a step and 56.2 GB a card for that model
at 1,048,576 tokens on 8 H100, by context parallelism), and the run that of `examples/million_tokens.yaml`: DeepSpeed's
ZeRO-2, all processes sharing each sequence, LoRA r = 8, embeddings and norms trained on fp32 masters, Liger's kernels,
an MLP of 8,192 tokens at a time, gradient checkpointing. A sequence is one document of random tokens.

A stage is KIND@TOKENSxSTEPS, of a length that is no shorter than the one before; KIND is

    sparse-2048     groups of 2,048, with 4 first tokens that all groups see; or any number, or n/16
    dense           dense attention
    mixed-2048      sparse, each 4th step dense; --dense-every says another

`results/million.csv` gets a row for each stage and kind of step, when the stage is over. A step's seconds go from the
end of the one before to its own, reading and exchanging its batch included, and are those of the slowest process; the
first step of each kind in a stage is a warm-up where the stage has others of that kind. `exchange_s` is how long the
computation stood still for what other processes send, keys, values and heads, and their parts of the batch (the
largest of the processes), and `sent_gib` is what each sent of these.
"""

import argparse
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", os.environ["PYTORCH_ALLOC_CONF"])

import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer, S2AttentionConfig

from .parallel import Exchanges, own_kernel
from .provenance import RESULTS, append_row, provenance
from .step_methods import QWEN3_8B
from .train_step import synchronize

CUDA = torch.cuda.is_available()
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": QWEN3_8B,
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
    },
}
STAGES = ["mixed-2048@1048576x5", "sparse-n/16@1048576x2"]


class Stage(NamedTuple):
    """What `KIND@TOKENSxSTEPS` says."""

    name: str
    group: int | None
    dense_every: int
    tokens: int
    steps: int

    @classmethod
    def parse(cls, text: str, dense_every: int) -> "Stage":
        found = re.fullmatch(r"(dense|(sparse|mixed)-(n/)?(\d+))@(\d+)x(\d+)", text)
        if found is None:
            raise SystemExit(f"{text!r}: a stage is KIND@TOKENSxSTEPS, as in sparse-2048@1048576x3.")
        name, kind, share, number, tokens, steps = found.groups()
        group = None if kind is None else -(-int(tokens) // int(number)) if share else int(number)
        return cls(name, group, dense_every if kind == "mixed" else 0, int(tokens), int(steps))

    def context(self) -> ContextStage:
        if self.group is None:
            return ContextStage(self.tokens, self.steps, attention="dense")
        return ContextStage(self.tokens, self.steps, group_size=self.group, dense_every=self.dense_every, sparse="s2")


class Clock(TrainerCallback):
    """Of each step: seconds, how long it stood still for others and GiB sent; peaks of memory since it began.

    Args:
        report: What is called when a stage is over.
    """

    def __init__(self, stages: Sequence[Stage], report: Callable[[int], None]) -> None:
        self.exchanges = Exchanges()
        self.steps: list[dict[str, float]] = []
        self.ends = list(accumulate(stage.steps for stage in stages))
        self.report = report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()

    def _begin(self) -> None:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        self.exchanges.reset()
        self._started = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step in self.ends:  # the last step's loss is known by now, and the run may not last
            self.report(self.ends.index(state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.report(len(self.ends) - 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        synchronize()
        dist.barrier()
        synchronize()
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) if CUDA else 0
        step = {
            "seconds": time.perf_counter() - self._started,
            "exchange_s": self.exchanges.seconds(),
            "sent_gib": self.exchanges.bytes / 2**30,
            "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if CUDA else 0.0,
            "pinned_gib": pinned / 2**30,
            "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        each: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(each, step)
        summed = ("pinned_gib", "host_gib")
        self.steps.append({name: (sum if name in summed else max)(x[name] for x in each) for name in step})
        if state.is_world_process_zero:
            said = ", ".join(f"{name} {value:.3f}" for name, value in self.steps[-1].items())
            print(f"  step {state.global_step}: {said}", flush=True)
        self._begin()


def random_model(name: str) -> Any:
    """The shape with random weights, the same in all processes, made where they are trained."""
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        return AutoModelForCausalLM.from_config(
            Qwen3Config(**SHAPES[name], tie_word_embeddings=False),
            dtype=torch.bfloat16 if CUDA else torch.float32,
            attn_implementation="s2attn",
        )


def train(args: argparse.Namespace, stages: Sequence[Stage], output: str) -> None:
    """Run the stages; rows of each as it ends."""
    vocabulary = SHAPES[args.model]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    longest, steps = stages[-1].tokens, sum(stage.steps for stage in stages)
    ids = torch.randint(4, vocabulary, (steps, longest), generator=generator)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    config = LongLoraSFTConfig(
        output_dir=output,
        stages=[stage.context() for stage in stages],
        sequence_parallel=int(os.environ.get("WORLD_SIZE", "1")),
        per_device_train_batch_size=1,
        gradient_checkpointing=True,
        use_liger_kernel=args.liger,
        mlp_tile=args.tile or None,
        activation_offloading=args.offload > 0,
        offload_share=args.offload or 1.0,
        bf16=CUDA,
        use_cpu=not CUDA,
        train_sampling_strategy="sequential",
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        report=False,
        report_to="none",
    )

    def report(number: int) -> None:
        if trainer.is_world_process_zero():
            for row in rows(args, stages[number], number, trainer, clock.steps):
                append_row(args.results / "million.csv", row)
                print(describe(row), flush=True)

    clock = Clock(stages, report)
    trainer = LongLoraSFTTrainer(
        model=random_model(args.model),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids.numpy()}),
        processing_class=tokenizer,
        peft_config=LongLoraConfig(r=8, lora_alpha=16),
        callbacks=[clock],
    )
    with clock.exchanges.watched():
        trainer.train()


def rows(
    args: argparse.Namespace,
    stage: Stage,
    number: int,
    trainer: LongLoraSFTTrainer,
    steps: Sequence[dict[str, float]],
) -> Iterator[dict[str, Any]]:
    """A row for each kind of step in a stage."""
    kinds = [(step.stage, step.mode) for step in map(trainer.schedule.step, range(len(steps)))]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for dense in (False, True):
        of_kind = [i for i, (at, mode) in enumerate(kinds) if at == number and (mode == "dense") == dense]
        if not of_kind:
            continue
        warm = len(of_kind) > 1
        timed = [steps[i] for i in of_kind[warm:]]
        seconds = torch.tensor([step["seconds"] for step in timed])
        quantiles = seconds.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        stalled = torch.tensor([step["exchange_s"] for step in timed]).median().item()
        yield {
            "model": args.model,
            "tokens": stage.tokens,
            "processes": dist.get_world_size(),
            "step": "dense" if dense else "sparse",
            "group": 0 if dense else stage.group,
            "sink_tokens": 0 if dense else S2AttentionConfig.sink_tokens,
            "kernel": own_kernel(),
            "liger": int(args.liger),
            "mlp_tile": args.tile,
            "offload": args.offload,
            **dict(zip(("s_p20", "s_p50", "s_p80"), quantiles, strict=True)),
            "steps": len(timed),
            "warm": int(warm),
            "tokens_per_s": stage.tokens / quantiles[1],
            "exchange_s": stalled,
            "exchange_share": stalled / quantiles[1],
            **{name: max(step[name] for step in timed) for name in timed[0] if name not in ("seconds", "exchange_s")},
            "loss": losses[of_kind[-1]],
            **provenance(),
        }


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['model']} {row['tokens']:,} tokens on {row['processes']}, {row['step']} {row['group']}: "
        f"{row['s_p50']:.2f} s, {100 * row['exchange_share']:.1f}% exchanges, {row['peak_gpu_gib']:.1f} GiB a card, "
        f"host {row['host_gib']:.0f} GiB (pinned {row['pinned_gib']:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", help=f"KIND@TOKENSxSTEPS; default: {' '.join(STAGES)}")
    parser.add_argument("--model", choices=list(SHAPES), help="default: tiny without a GPU, else qwen3-8b")
    parser.add_argument("--dense-every", type=int, default=4, help="of mixed stages")
    parser.add_argument("--offload", type=float, default=0.0, help="share of activations that is sent to the host")
    parser.add_argument("--tile", type=int, default=8192, help="tokens that an MLP takes at a time; 0 for all")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=CUDA)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the tables' folder")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("start it by accelerate launch, with two processes or more")
    args.model = args.model or ("qwen3-8b" if CUDA else "tiny")
    stages = [Stage.parse(text, args.dense_every) for text in args.stages or STAGES]
    with tempfile.TemporaryDirectory() as output:
        train(args, stages, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
