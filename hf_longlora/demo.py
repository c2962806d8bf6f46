"""The demonstration: a small model, made and extended on this machine, offline."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from .demo_base import demo_model_config, pretrain, stdlib_documents, train_tokenizer
from .evaluation import perplexity_by_length
from .evaluation.plots import plot_perplexity, require_matplotlib
from .rope import apply_rope, scaled_rope
from .trainer import ContextStage, LongLoraSFTConfig, LongLoraSFTTrainer, last_checkpoint
from .tuner import LongLoraConfig

BASE_LENGTH, TARGET_LENGTH = 256, 2048
LENGTHS = (256, 512, 1024, 2048)
# YaRN, and not the paper's linear scaling: untrained, perplexity at 2,048 is 14 with it and 35 with
# that, and trained 12.8 and 17.1 (benchmarks/results/demo.csv).
ROPE_TYPE = "yarn"
STAGES = (
    ContextStage(1024, 30, rope_type=ROPE_TYPE),
    ContextStage(TARGET_LENGTH, 70, rope_type=ROPE_TYPE),
)
EVALUATION = {"lengths": LENGTHS, "stride": 128, "max_windows": 48, "batch_size": 4}
RESULT = "LongLoRA, S2 + dense_every=4"
RUNS: dict[str, dict[str, Any]] = {
    "LoRA, dense": {"attention": "dense"},
    "LongLoRA, S2": {"dense_every": 0},
    RESULT: {"dense_every": 4},
}
"""Three ways to extend the same base: what is special in each stage, by the name in table and plot."""


def run_demo(output_dir: str | Path = "longlora-demo", *, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Train a small base at 256 tokens, extend it to 2,048 in three ways, compare, and reload the adapter.

    What is done stays in `output_dir`, and what was interrupted goes on from its last checkpoint: call it again.

    Returns:
        The records of `perplexity_by_length`, by model.

    Raises:
        ImportError: matplotlib is missing.
        RuntimeError: the reloaded adapter does not give the perplexity that the trained one gave.
    """
    require_matplotlib()
    with _quiet():
        return _run(Console(), Path(output_dir), seed)


def _run(console: Console, out: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train, test = stdlib_documents()
    console.print(f"[bold]1/4 Base model[/bold]: {len(train)} files of the standard library, {len(test)} held out")
    base = _base(out / "base", list(train.values()), seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    dataset = Dataset.from_dict({"input_ids": _encode(tokenizer, train.values())})
    held_out = [ids for ids in _encode(tokenizer, test.values()) if len(ids) > TARGET_LENGTH]

    lengths = " -> ".join(f"{n:,}" for n in (BASE_LENGTH, *(stage.max_length for stage in STAGES)))
    for number, (name, options) in enumerate(RUNS.items(), start=1):
        console.print(f"[bold]2/4 Extension[/bold] {number} of {len(RUNS)}, {lengths} tokens: {name}")
        stages = [replace(stage, **options) for stage in STAGES]
        _extend(_adapter(out, name), base, dataset, tokenizer, stages, seed)

    console.print(f"[bold]3/4 Evaluation[/bold]: {len(held_out)} held-out files of more than {TARGET_LENGTH:,} tokens")
    records = _evaluate(out / "perplexity.json", out, base, held_out)
    plot = plot_perplexity(
        records,
        out / "perplexity.png",
        base_length=BASE_LENGTH,
        train_length=TARGET_LENGTH,
        title="Perplexity of held-out Python files by context length",
    )

    console.print("[bold]4/4 Reload[/bold] of the saved adapter in a fresh process")
    adapter = _adapter(out, RESULT)
    again = _reload(adapter, base, held_out, out / "held_out.json")
    expected = records[RESULT][-1]["perplexity"]
    if abs(again / expected - 1) > 1e-5:
        raise RuntimeError(f"The reloaded adapter gives perplexity {again:.4f}, the trained one gave {expected:.4f}.")

    table = Table(*("Perplexity at", *(f"{n:,}" for n in LENGTHS)))
    for name, rows in records.items():
        table.add_row(name, *(f"{row['perplexity']:.2f}" for row in rows))
    console.print(table)
    console.print(f"Reloaded in a fresh process: {again:.2f} at {TARGET_LENGTH:,}, as above.")
    files = f"Base {base}\nAdapter {adapter}\nPlot {plot}"
    console.print(f"{files}\n{time.perf_counter() - started:.0f} s in all\n", highlight=False, soft_wrap=True)
    console.print("[bold]The same for your model[/bold], in your TRL script:")
    console.print(
        "  from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer\n"
        "  args = LongLoraSFTConfig(stages=[ContextStage(8192, 200), ContextStage(32768, 800)], ...)\n"
        "  LongLoraSFTTrainer(model, args, train_dataset=dataset, peft_config=LongLoraConfig()).train()",
        highlight=False,
        soft_wrap=True,
    )
    return records


def _adapter(out: Path, name: str) -> Path:
    return out / "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _encode(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def _base(folder: Path, texts: list[str], seed: int) -> str:
    """Tokenizer and base model, trained unless they are there already."""
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(folder)
        checkpoint = folder / "training.pt"
        model = pretrain(
            demo_model_config(len(tokenizer)), _encode(tokenizer, texts), seed=seed, checkpoint=checkpoint
        )
        model.save_pretrained(folder)
        checkpoint.unlink(missing_ok=True)
    return str(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own bars and notices of deprecation: the training bar is enough here."""
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()


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
        learning_rate=3e-3,  # a tiny model wants far more than the 2e-5 of a large one
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


def _evaluate(file: Path, out: Path, base: str, documents: list[list[int]]) -> dict[str, list[dict[str, Any]]]:
    """Perplexity by length of each model, computed unless it is in `file` already."""
    records: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.is_file() else {}
    for name in ("base", "base + RoPE scaling", *RUNS):
        if name in records:
            continue
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if name == "base + RoPE scaling":
            apply_rope(model, scaled_rope(model.config, TARGET_LENGTH, ROPE_TYPE))
        elif name in RUNS:
            model = PeftModel.from_pretrained(model, str(_adapter(out, name)))
        if torch.cuda.is_available():
            model.to("cuda")
        records[name] = perplexity_by_length(model, documents, **EVALUATION)  # type: ignore[arg-type]
        file.write_text(json.dumps(records, indent=2))
    return records


def _reload(adapter: Path, base: str, documents: list[list[int]], file: Path) -> float:
    """Perplexity at the target length, measured by a process that knows no more than the files."""
    file.write_text(json.dumps(documents))
    code = (
        "import json, sys\n"
        "import hf_longlora, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "adapter, base, documents, options = sys.argv[1:]\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)\n"
        "model.to('cuda' if torch.cuda.is_available() else 'cpu')\n"
        "records = hf_longlora.perplexity_by_length(\n"
        "    model, json.load(open(documents)), **json.loads(options), progress=False)\n"
        "print(records[-1]['perplexity'])\n"
    )
    arguments = [str(adapter), base, str(file), json.dumps(EVALUATION)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The saved adapter could not be loaded in a fresh process:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])
