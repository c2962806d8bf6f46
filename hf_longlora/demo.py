"""The demonstration: a small model, made and extended on this machine, offline.

The text is the source of Python's own standard library: it needs no download, and many of its files are long.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from .evaluation import perplexity_by_length
from .evaluation.plots import plot_perplexity, require_matplotlib
from .rope import apply_rope, scaled_rope
from .trainer import ContextStage, LongLoraSFTConfig, LongLoraSFTTrainer, last_checkpoint
from .tuner import LongLoraConfig

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"})
TEST_PERCENT = 10


def stdlib_documents() -> tuple[dict[str, str], dict[str, str]]:
    """The running Python's standard library as two sets of documents, split by file.

    A file goes to the test set by the SHA-256 of its name relative to the library's folder, so the same file always
    lands on the same side (another Python version has other files and other text). Tests, vendored applications,
    installed packages, files that are not UTF-8 and files of less than 512 characters are left out.

    Returns:
        `(train, test)`, each from the relative name (`"json/decoder.py"`) to the text, sorted by name. About nine
        files in ten are in `train`.

    Raises:
        FileNotFoundError: this Python carries no library sources (a frozen or zipped one).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    test: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(name.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) < 512:
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        is_test = int.from_bytes(digest[:4], "big") % 100 < TEST_PERCENT
        (test if is_test else train)[name.as_posix()] = text
    if not train or not test:
        raise FileNotFoundError(f"no Python sources under {root}: the demo reads the standard library's own text")
    return train, test


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text round-trips, no unknown token.

    Args:
        texts: the documents to learn from (give it the training set only).
        vocab_size: entries, the 256 bytes and the two special tokens (`<|endoftext|>` = 0, `<|pad|>` = 1) included.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [EOS_TOKEN, PAD_TOKEN]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size={vocab_size} is below the {256 + len(special)} that bytes and special tokens need"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )


def demo_model_config(vocab_size: int = 512) -> LlamaConfig:
    """A Llama of 0.78 M parameters that two CPU cores pretrain in two minutes at a context of 256 tokens.

    Narrow on purpose: at the same number of training tokens it is faster than a wider one, and not worse.
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def pretrain(
    config: LlamaConfig,
    token_ids: Sequence[Sequence[int]],
    *,
    steps: int = 1000,
    batch_size: int = 8,
    muon_lr: float = 0.03,
    adamw_lr: float = 0.01,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> LlamaForCausalLM:
    """Train a model from random weights at its `max_position_embeddings`.

    The matrices are trained with Muon, the embeddings and norms with AdamW: in two minutes of two CPU cores, AdamW
    alone gets nowhere near.

    Args:
        config: the model to make; its `max_position_embeddings` is the context in tokens.
        token_ids: one sequence of ids for each document. They are joined in a shuffled order and cut into rows of one
            context.
        steps: optimizer steps of `batch_size` rows each; the data is repeated where it is too short.
        muon_lr, adamw_lr: peak learning rates: 20 steps of warm-up, and down to zero over the last 3/4.
        seed: of the weights and of the order of the data.
        checkpoint: a file to keep the state in while training, and to go on from if it is there.
        progress: show a progress bar with the loss.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: the documents hold fewer tokens than one row.
    """
    context = config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(token_ids), generator=generator).tolist()
    stream = torch.tensor(list(chain.from_iterable(token_ids[index] for index in order)))
    if len(stream) < context:
        raise ValueError(f"the documents hold {len(stream)} tokens, fewer than one row of {context}")
    rows_NS = stream[: len(stream) // context * context].view(-1, context)
    rows_NS = rows_NS[torch.randperm(len(rows_NS), generator=generator)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
    if torch.cuda.is_available():
        model.to("cuda")
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    matrices = [p for p in model.parameters() if p.dim() == 2 and p not in embeddings]
    others = [p for p in model.parameters() if p.dim() != 2 or p in embeddings]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    parts: list[Any] = [model, *optimizers]
    first = 0
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        for part, values in zip(parts, state["parts"], strict=True):
            part.load_state_dict(values)

    with logging.tqdm(total=steps, initial=first, desc="base model", unit="step", disable=not progress) as bar:
        for step in range(first, steps):
            if checkpoint is not None and step % 100 == 0 and step > first:
                state = {"step": step, "parts": [part.state_dict() for part in parts]}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)  # whole or not at all
            scale = min(1.0, (step + 1) / 20, 1.3 * (1 - step / steps))
            for optimizer, peak in zip(optimizers, (muon_lr, adamw_lr), strict=True):
                optimizer.param_groups[0]["lr"] = peak * scale
            input_ids_BS = rows_NS[torch.arange(step * batch_size, (step + 1) * batch_size) % len(rows_NS)]
            input_ids_BS = input_ids_BS.to(model.device)
            loss = model(input_ids=input_ids_BS, labels=input_ids_BS, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
            bar.update()
    return model.eval()


# --------------------------------------------------------------------------------------------------------------------
# The demonstration itself


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
