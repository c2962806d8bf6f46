"""One extension run: the base, `LongLoraSFTTrainer`, and what the result scores on the validation splits."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_longlora import (
    ContextStage,
    LongLoraConfig,
    LongLoraSFTConfig,
    LongLoraSFTTrainer,
    perplexity_by_length,
    s2_attention_mode,
    set_s2_attention,
)
from hf_longlora.attention import get_s2_attention, segments
from hf_longlora.attention.interface import Shift
from hf_longlora.modules import attention_modules
from hf_longlora.rope import apply_rope, scaled_rope
from hf_longlora.schedule import Schedule

from .data import CORPORA, load_documents, load_tokenizer, train_windows
from .trial import TrialCallback

LENGTHS = (512, 1024, 2048, 4096, 8192)
STRIDE = 256


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one row is. Its name is one of a table's methods; the other fields say what that means.

    Args:
        method: "s2", "dense", "rope" (RoPE scaled and nothing trained) or "base" (nothing done).
        group_size_ratio: As the trainer's.
        dense_every: As the trainer's.
        dense_tail: Share of the steps, at the end, that are a stage of their own, with more dense steps.
        tail_every: Each so many steps of that stage are dense; 1: all of them.
        rotate: Each layer runs dense at one step in `rotate`, the layers taking turns; 0: never.
        shift: What is shifted by half a group, as `S2AttentionConfig` has it (the paper's Table 6).
        through: How many stages lead to the target, each twice as long as the one before, at equal tokens for each;
            1: the target alone.
        cut: Share of the steps that are run at all: dense training of equal attention cost.
        full: Train all weights, without an adapter.
        trial: What else is tried, in the words of `trial`.
    """

    name: str
    method: str = "s2"
    target: int = 4096
    steps: int = 160
    batch: int = 8
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup: int = 16
    group_size_ratio: float = 0.25
    dense_every: int = 0
    dense_tail: float = 0.0
    tail_every: int = 1
    rotate: int = 0
    shift: Shift = "heads"
    through: int = 1
    cut: float = 1.0
    full: bool = False
    rank: int = 16
    train_norms: bool = True
    train_embeddings: bool = True
    rope_type: str = "yarn"
    kernel: str = "auto"
    trial: str = ""
    seed: int = 0

    def stages(self) -> list[ContextStage]:
        steps = max(1, round(self.steps * self.cut))
        tail = round(steps * self.dense_tail)
        attention: Any = "dense" if self.method == "dense" else "s2attn"
        stages = []
        for halvings in reversed(range(self.through)):  # a step of half the length has half the tokens
            count = max(1, round((steps - tail) * 2**halvings / self.through))
            length = self.target // 2**halvings
            stages.append(ContextStage(length, count, rope_type=self.rope_type, attention=attention))
        if tail:
            stages.append(ContextStage(self.target, tail, rope_type=self.rope_type, dense_every=self.tail_every))
        return stages


class RotatingDenseLayers(TrainerCallback):
    """At each step, every `period`-th layer dense, beginning with another one: even cost over the steps."""

    def __init__(self, period: int) -> None:
        self.period = period

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shared = get_s2_attention(kwargs["model"])
        for index, (_, module) in enumerate(attention_modules(kwargs["model"].get_base_model())):
            dense = (index + state.global_step) % self.period == 0
            module.s2_attention_state = replace(shared, mode="dense") if dense else shared


def attention_cost(run: Run, schedule: Schedule) -> float:
    """Attention FLOPs of a run, relative to dense training for its full number of steps.

    Counted from the segments that the kernels get: half of the heads are shifted, and their outer groups shorter.
    """
    whole = run.target * (run.target + 1) // 2
    shifted = {"heads": 0.5, "layers": 0.5, "none": 0.0, "all": 1.0}[run.shift]
    total = 0.0
    for step in range(schedule.max_steps):
        plan = schedule.step(step)
        length = schedule.stages[plan.stage].max_length
        attention = TrialCallback(run.trial, schedule).attention(step)
        size = attention.group_size
        dense = length * (length + 1) // 2
        plain, moved = (
            sum(segment.pairs for segment in segments([(0, length)], size, shift, attention.sink_tokens))
            for shift in (0, size // 2)
        )
        pairs = (1 - shifted) * plain + shifted * moved
        if run.rotate:
            pairs = pairs + (dense - pairs) / run.rotate
        total += (dense if plan.mode == "dense" else pairs) / whole
    return total / run.steps


def evaluate(
    model: Any, work: Path, split: str, target: int, trained: bool, windows: int, batch: int
) -> dict[str, float]:
    """Dense perplexity by length on a split of both corpora, and at the target with the pattern of training."""
    columns: dict[str, float] = {}
    device = model.device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        for corpus in CORPORA:
            documents = [ids for ids in load_documents(work, corpus, split)]
            lengths = [length for length in LENGTHS if length <= target]
            options: dict[str, Any] = {"batch_size": batch, "max_windows": windows, "progress": False}
            for record in perplexity_by_length(model, documents, lengths, STRIDE, **options):
                columns[f"{corpus}_{record['length']}"] = record["perplexity"]
            columns[f"{corpus}_trained"] = columns[f"{corpus}_{target}"]
            if trained:
                with s2_attention_mode(model, "s2"):
                    record = perplexity_by_length(model, documents, target, STRIDE, **options)[0]
                columns[f"{corpus}_trained"] = record["perplexity"]
    return columns


def train(run: Run, base: Path, work: Path) -> tuple[Any, dict[str, Any]]:
    """Extend the base as `run` says: the model, and what the run cost."""
    dtype = torch.float32 if run.full else torch.bfloat16
    set_seed(run.seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="s2attn")
    if torch.cuda.is_available():
        model.cuda()
    if run.method == "rope":
        apply_rope(model, scaled_rope(model.config, run.target, run.rope_type))
    if run.method in ("base", "rope"):
        return model, {}
    stages = run.stages()
    count = run.steps * run.batch
    dataset = Dataset.from_dict({"input_ids": list(train_windows(work, run.target, count, run.seed))})
    with tempfile.TemporaryDirectory() as output:
        args = LongLoraSFTConfig(
            output_dir=output,
            stages=stages,
            dense_every=run.dense_every,
            group_size_ratio=run.group_size_ratio,
            sink_tokens=0,  # as all rows; a trial may have them
            attention_kernel=run.kernel,
            packing=run.through > 1,  # cuts the target's rows to a shorter stage's, and loses none of their tokens
            packing_strategy="wrapped",
            per_device_train_batch_size=run.batch,
            learning_rate=run.learning_rate,
            lr_scheduler_type=run.schedule,
            warmup_steps=run.warmup,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            seed=run.seed,
            logging_steps=20,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        )
        config = LongLoraConfig(
            r=run.rank,
            lora_alpha=2 * run.rank,
            train_norms=run.train_norms,
            train_embeddings=run.train_embeddings,
        )
        trainer = LongLoraSFTTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=load_tokenizer(work),
            peft_config=None if run.full else config,
            callbacks=[RotatingDenseLayers(run.rotate)] if run.rotate else [TrialCallback(run.trial, args.schedule)],
        )
        get_s2_attention(trainer.model).shift = run.shift
        trainer.remove_callback(PrinterCallback)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    if run.rotate or run.trial:  # one state for all layers again
        set_s2_attention(trainer.model, trainer.schedule.attention_config(0))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, {
        "attention_cost": attention_cost(run, trainer.schedule),
        "tokens": sum(stage.max_steps * stage.max_length for stage in stages) * run.batch,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "train_loss": losses[-1] if losses else float("nan"),
        "train_seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
    }


def extend(
    run: Run,
    base: Path,
    work: Path,
    *,
    splits: Sequence[str] = ("validation",),
    windows: int = 384,
    batch: int = 16,
    save: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """A row for each split: the run's fields, its cost, its scores. The model is saved into the folder `save`."""
    known = json.loads((base / "base.json").read_text())
    model, cost = train(run, base, work)
    if save is not None:
        model.save_pretrained(save)
    columns = [f"{corpus}_{what}" for corpus in CORPORA for what in (*LENGTHS, "trained")]
    costs = ("attention_cost", "tokens", "trainable", "train_loss", "train_seconds", "peak_gib")
    rows = {}
    for split in splits:
        started = time.perf_counter()
        scores = evaluate(model, work, split, run.target, run.method == "s2", windows, batch)
        rows[split] = {
            **asdict(run),
            "base": known["id"],
            "base_parameters": known["parameters"],
            **{name: cost.get(name, "") for name in costs},
            "eval_seconds": time.perf_counter() - started,
            "eval_windows": windows,
            **{column: scores.get(column, "") for column in columns},
        }
    return rows
