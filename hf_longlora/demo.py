"""The demonstration: a small model, made and extended on this machine, offline."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from .demo_base import demo_model_config, pretrain, stdlib_documents, train_tokenizer
from .evaluation import perplexity_by_length
from .evaluation.plots import no_plots, plot_perplexity
from .rope import apply_rope, scaled_rope
from .trainer import ContextStage, LongLoraSFTConfig, LongLoraSFTTrainer, last_checkpoint
from .trainer.data import without_bars
from .tuner import LongLoraConfig

BASE_LENGTH, TARGET_LENGTH = 256, 2048
LENGTHS = (256, 512, 1024, 2048)
# YaRN, and not the paper's linear scaling: untrained, perplexity at 2,048 is 14 with it and 35 with
# that, and trained 12.8 and 17.1 (benchmarks/results/demo.csv).
ROPE_TYPE = "yarn"
EVALUATION = {"lengths": LENGTHS, "stride": 128, "batch_size": 4}
RESULT = "LongLoRA"
RUNS: dict[str, dict[str, Any]] = {
    "LoRA, dense": {"attention": "dense"},
    "LongLoRA, S2 alone": {"sparse": "s2", "dense_every": 0},
    RESULT: {},
}
"""Three ways to extend the same base: what is special in each stage, by the name in table and plot."""
SCRIPT = """\
  from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer
  args = LongLoraSFTConfig(stages=[ContextStage(8192, 200), ContextStage(32768, 800)], ...)
  LongLoraSFTTrainer(model, args, train_dataset=dataset, peft_config=LongLoraConfig()).train()"""


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    base_steps: int
    """Steps of the base's training, of 2,048 tokens each."""
    extension_steps: int
    """Steps of each extension: 1,024 tokens each in the first three of ten, 2,048 in the others."""
    runs: tuple[str, ...]
    max_windows: int
    """At each length of the evaluation."""
    threads: int | None = None
    """CPU threads; `None` until the machine is measured. Sums round differently by their number."""

    @property
    def stages(self) -> list[ContextStage]:
        first = 3 * self.extension_steps // 10
        lengths = (TARGET_LENGTH // 2, first), (TARGET_LENGTH, self.extension_steps - first)
        return [ContextStage(length, steps, rope_type=ROPE_TYPE) for length, steps in lengths]

    @property
    def cost(self) -> float:
        """The cost of the whole, in steps of the base's training (0.25 s of CPU time each on a slow core)."""
        evaluated = 2 + len(self.runs)  # the base, with a longer RoPE, too
        trained = self.base_steps + EXTENSION_STEP * self.extension_steps * len(self.runs)
        return trained + EVALUATED_WINDOW * self.max_windows * evaluated + LOADING


# What things cost, in steps of the base's training, by CPU time on an EPYC without AVX-512, where a step takes 0.25 s.
EXTENSION_STEP, EVALUATED_WINDOW, LOADING = 1.35, 0.9, 30.0
FULL = Plan(1000, 100, tuple(RUNS), 48)
LEAST = Plan(250, 40, (RESULT,), 24)
"""What still shows a base that fails beyond its length, and an extended one that doesn't."""
MINUTES = 4.0


def plan_demo(minutes: float, seconds: float) -> Plan:
    """As much of `FULL` as `minutes` allow, one extension and no less than `LEAST`.

    `seconds` is what a step of the base's training takes on this machine.
    """
    left = 60 * minutes / seconds - (LEAST.cost - LEAST.base_steps - EXTENSION_STEP * LEAST.extension_steps)
    share = FULL.extension_steps / FULL.base_steps
    steps = int(left / (1 + EXTENSION_STEP * share))
    steps = min(max(steps, LEAST.base_steps), FULL.base_steps)
    return replace(LEAST, base_steps=steps, extension_steps=max(int(share * steps), LEAST.extension_steps))


def run_demo(
    output_dir: str | Path = "longlora-demo", *, seed: int = 0, minutes: float = MINUTES, full: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Train a small base at 256 tokens, extend it to 2,048, and compare.

    What is done stays in `output_dir`, and what was interrupted goes on from its last checkpoint: call it again.
    Steps are as many as this machine can do in `minutes` (`plan_demo`); `full`: all of three ways to extend the base.

    Returns:
        The records of `perplexity_by_length`, by model.

    Raises:
        ValueError: a demo of another size is in `output_dir`.
    """
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes must be a number above 0, got {minutes}")
    threads = torch.get_num_threads()
    try:
        with without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the libraries, for each other
            return _run(Console(), Path(output_dir), seed, minutes, full)
    finally:
        torch.set_num_threads(threads)


def _run(console: Console, out: Path, seed: int, minutes: float, full: bool) -> dict[str, list[dict[str, Any]]]:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train, test = stdlib_documents()
    console.print(f"{len(train)} files of Python's standard library, {len(test)} held out", highlight=False)
    tokenizer = _tokenizer(out / "base", list(train.values()))
    documents = _encode(tokenizer, train.values())
    config = demo_model_config(len(tokenizer))
    console.print("Measuring this machine")
    seconds = seconds_of_a_step(config, documents)
    spent = (time.perf_counter() - started) / 60
    plan = FULL if full else plan_demo(max(minutes - spent, 0), seconds)
    plan = _kept(out / "plan.json", replace(plan, threads=torch.get_num_threads()), full)
    torch.set_num_threads(plan.threads or torch.get_num_threads())
    expected = 60 * spent + plan.cost * seconds
    if not full and expected > 90 * minutes:
        console.print(f"This machine is slow or busy, and less than {plan.base_steps} steps would show nothing.")

    def head(part: str, text: str) -> None:
        clock = f"{_clock(time.perf_counter() - started)} of about {_clock(expected)} min"
        console.print(f"[bold]{part}[/bold]: {text} [dim]({clock})[/dim]", highlight=False)

    head("1/3 Base model", f"{plan.base_steps:,} steps at {BASE_LENGTH} tokens, {seconds:.2g} s each")
    begun = any((out / "base" / name).is_file() for name in ("config.json", "training.pt"))
    before = time.perf_counter()
    base = _base(out / "base", config, documents, plan.base_steps, seed)
    if not begun:  # the machine may have become busier, or less so
        seconds = (time.perf_counter() - before) / plan.base_steps
        expected = time.perf_counter() - started + (plan.cost - plan.base_steps) * seconds
    dataset = Dataset.from_dict({"input_ids": documents})
    held_out = [ids for ids in _encode(tokenizer, test.values()) if len(ids) > TARGET_LENGTH]

    lengths = " -> ".join(f"{n:,}" for n in (BASE_LENGTH, *(stage.max_length for stage in plan.stages)))
    for number, name in enumerate(plan.runs, start=1):
        head(f"2/3 Extension {number} of {len(plan.runs)}", f"{lengths} tokens, {plan.extension_steps} steps: {name}")
        stages = [replace(stage, **RUNS[name]) for stage in plan.stages]
        _extend(_adapter(out, name), base, dataset, tokenizer, stages, seed)

    head("3/3 Evaluation", f"{len(held_out)} held-out files of more than {TARGET_LENGTH:,} tokens")
    evaluation = EVALUATION | {"max_windows": plan.max_windows}
    records = _evaluate(out / "perplexity.json", out, base, held_out, plan.runs, evaluation)
    plot = no_plots() or plot_perplexity(
        records,
        out / "perplexity.png",
        base_length=BASE_LENGTH,
        train_length=TARGET_LENGTH,
        title="Perplexity of held-out Python files by context length",
    )

    _show(console, records)
    files = f"Base {base}\nAdapter {_adapter(out, RESULT)}\nPlot: {plot}"
    console.print(f"{files}\n{time.perf_counter() - started:.0f} s in all\n", highlight=False, soft_wrap=True)
    console.print("[bold]The same for your model[/bold], in your TRL script:")
    console.print(SCRIPT, highlight=False, soft_wrap=True)
    return records


def _show(console: Console, records: dict[str, list[dict[str, Any]]]) -> None:
    """Perplexity by model and length, and what becomes of it beyond the base's length."""
    table = Table(*("Perplexity at", *(f"{n:,}" for n in LENGTHS)))
    for name, rows in records.items():
        table.add_row(name, *(f"{row['perplexity']:.2f}" for row in rows))
    console.print(table)
    failed, held = (records[name][-1]["perplexity"] / records[name][0]["perplexity"] for name in ("base", RESULT))
    console.print(
        f"From {BASE_LENGTH} to {TARGET_LENGTH:,} tokens perplexity is multiplied by {failed:.2f} in the base, and by "
        f"{held:.2f} in the extended model.",
        highlight=False,
    )


def _adapter(out: Path, name: str) -> Path:
    return out / "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _encode(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def _tokenizer(folder: Path, texts: list[str]) -> Any:
    """The base's, trained unless it is there already."""
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def seconds_of_a_step(config: LlamaConfig, documents: list[list[int]]) -> float:
    """Seconds a step of the base's training takes on this machine now, with one thread or all; the faster stays set.

    On a busy machine threads wait for each other: beside 15 processes on two cores a step took 34 s with two threads,
    and 3.5 s with one.
    """

    def timed(threads: int, steps: int) -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        pretrain(config, documents[:50], steps=steps, progress=False)
        return (time.perf_counter() - started) / steps

    threads = torch.get_num_threads()
    timed(1, 2)  # what is made once is no step's
    one = timed(1, 6)
    if threads == 1 or timed(threads, 1) > 2 * one or (several := timed(threads, 6)) > one:
        torch.set_num_threads(1)
        return one
    return several


def _kept(file: Path, plan: Plan, full: bool) -> Plan:
    """The plan of a demo that has been begun, or this one."""
    if not file.is_file():
        file.write_text(json.dumps(asdict(plan)))
        return plan
    values = json.loads(file.read_text())
    begun = Plan(**values | {"runs": tuple(values["runs"])})
    if (replace(begun, threads=None) == FULL) != full:
        raise ValueError(
            f"{file.parent} holds a demo that was begun {'without' if full else 'with'} --full: give another "
            "--output-dir, or remove it"
        )
    return begun


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _base(folder: Path, config: LlamaConfig, documents: list[list[int]], steps: int, seed: int) -> str:
    """The base model, trained unless it is there already."""
    if not (folder / "config.json").is_file():
        checkpoint = folder / "training.pt"
        model = pretrain(config, documents, steps=steps, seed=seed, checkpoint=checkpoint)
        model.save_pretrained(folder)
        checkpoint.unlink(missing_ok=True)
    return str(folder)


def _extend(folder: Path, base: str, dataset: Dataset, tokenizer: Any, stages: list[ContextStage], seed: int) -> None:
    """Train an adapter, unless it is there already; from its last checkpoint if there is one."""
    if (folder / "adapter_model.safetensors").is_file():
        return
    args = LongLoraSFTConfig(
        output_dir=str(folder),
        stages=stages,
        seed=seed,
        packing=True,
        packing_strategy="wrapped",
        per_device_train_batch_size=1,
        learning_rate=3e-3,  # a tiny model wants far more than the default, which is for large ones
        warmup_steps=5,
        lr_scheduler_type="cosine",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",  # but for the line that ends each stage
        save_steps=20,
        save_total_limit=1,
        report_to="none",
    )
    trainer = LongLoraSFTTrainer(
        base, args, train_dataset=dataset, processing_class=tokenizer, peft_config=LongLoraConfig(r=8)
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()


def _evaluate(
    file: Path, out: Path, base: str, documents: list[list[int]], runs: Sequence[str], evaluation: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Perplexity by length of each model as it is saved, computed unless it is in `file` already."""
    records: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.is_file() else {}
    for name in ("base", "base + RoPE scaling", *runs):
        if name in records:
            continue
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if name == "base + RoPE scaling":
            apply_rope(model, scaled_rope(model.config, TARGET_LENGTH, ROPE_TYPE))
        elif name in runs:
            model = PeftModel.from_pretrained(model, str(_adapter(out, name)))
        if torch.cuda.is_available():
            model.to("cuda")
        records[name] = perplexity_by_length(model, documents, **evaluation)
        file.write_text(json.dumps(records, indent=2))
    return records
