"""Models that others trained, extended by `LongLoraSFTTrainer` in every way that a user would weigh.

    python -m benchmarks.quality.models smollm2 --corpus DIR --work DIR
    python -m benchmarks.quality.pretrained --work DIR --lengths 32768 65536 --seeds 0 1 2 [--methods dense default]
    python -m benchmarks.quality.pretrained --work DIR --corpora books --methods factors

A run extends the base on one corpus by `STEPS[length]` steps of one row, and is scored with dense attention on
windows of the validation and the test documents: over all of a window, its last 2,048 tokens, and its first 4,096 and
8,192 (what is left of the short context). A row of `results/pretrained.csv` for each run and split; what is there is
not done again. Seconds are those of the steps, dense and sparse ones apart, the GPU's work waited for.

"windows" and "pose of many rows" are the trainer's own, whose steps have windows of as many rows as a row has windows
(8 at 65,536). In the rows "pose" and "pose, N-th dense", of a trainer before that, they are all of the step's own row,
as those of "native windows" still are; "scattered" shuffles these among the rows of all sparse steps beforehand.

"dense of equal time" is dense training of as many steps as take the time of "windows, 2nd dense", by the times of that
one's steps in `results/pretrained.csv` (of this length and these kernels, on a GPU without other work); its rate falls
to the end of those steps. "papers" and "factors" stand for several methods: the base as it is and the paper's own
recipe; the default recipe with one thing changed, with dense training of the same change where that may tell more.
"""

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
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
    loss_by_position,
    s2_attention_mode,
)
from hf_longlora.attention import get_s2_attention
from hf_longlora.attention.interface import STATE, S2State, Shift
from hf_longlora.modules import attention_modules
from hf_longlora.rope import apply_rope, current_rope, scaled_rope

from ..provenance import RESULTS, append_row, provenance, read_rows
from .models import SOURCES, train_rows

STEPS = {16_384: 100, 32_768: 100, 65_536: 50, 131_072: 20}
WINDOWS = {16_384: 16, 32_768: 16, 65_536: 8, 131_072: 4}
SPLITS = ("validation", "test")
LAST = 2048


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to extend a model: what is said to `ContextStage` and `LongLoraSFTConfig`.

    Args:
        rope_type: As the stage's.
        exponent: For a larger theta: theta grows by this power of the factor (instead of `rope_type`).
        trained: Whether anything is trained; else RoPE is scaled and that is all.
        scaled: Whether RoPE is scaled.
        cut: Share of the steps that are run.
        time_of: Method whose time is to be taken: of `STEPS` as many as that allows.
        scatter: Whether the native windows of all sparse steps are shuffled among these, so that the windows of a step
            are of different documents.
        short: Share of the rows that are documents of the native length, packed. Their order is another one.
        stage: Further fields of the stage.
        grow: Group sizes as shares of the length, one after the other, each for as many steps.
        hybrid: Each how many layers one is always dense; 0: none.
        shift: What is shifted.
        undone: Whether the even layers shift nothing: half of the shift undone (SinkLoRA, arXiv 2406.05678).
        rank, learning_rate: Of LoRA, whose alpha is twice the rank; at the peak.
        adapter: Fields of the adapter that differ.
    """

    rope_type: str = "yarn"
    exponent: float | None = None
    trained: bool = True
    scaled: bool = True
    cut: float = 1.0
    time_of: str | None = None
    scatter: bool = False
    short: float = 0.0
    stage: dict[str, Any] = field(default_factory=dict)
    grow: tuple[float, ...] = ()
    hybrid: int = 0
    shift: Shift = "heads"
    undone: bool = False
    rank: int = 64
    learning_rate: float = 3e-4
    adapter: dict[str, Any] = field(default_factory=dict)


def _s2(every: int, sinks: int = 4, **more: Any) -> dict[str, Any]:
    return {"sparse": "s2", "dense_every": every, "sink_tokens": sinks, **more}


DENSE: dict[str, Any] = {"attention": "dense"}
METHODS: dict[str, Method] = {
    "base": Method(trained=False, scaled=False),
    "yarn alone": Method(trained=False),
    "dense": Method(stage=DENSE),
    "dense, a quarter of the steps": Method(stage=DENSE, cut=0.25),
    # Groups of the native length that neither shift nor share a key are windows of their own, RoPE being relative.
    "native windows": Method(stage=_s2(0, 0), shift="none"),
    "s2 native + sinks, 4th dense": Method(stage=_s2(4)),
    "s2 native + sinks, 10th dense": Method(stage=_s2(10)),
    "s2 native + sinks": Method(stage=_s2(0)),
    "s2 native, 4th dense": Method(stage=_s2(4, 0)),
    "s2 1/16 + sinks, 4th dense": Method(stage=_s2(4, group_size_ratio=1 / 16)),
    "s2 1/16, 4th dense": Method(stage=_s2(4, 0, group_size_ratio=1 / 16)),
    "s2 1/4 linear (the paper)": Method(rope_type="linear", stage=_s2(0, 0, group_size_ratio=1 / 4)),
    "s2 1/4": Method(stage=_s2(0, 0, group_size_ratio=1 / 4)),
}
for _name, _sparse in {"windows": "windows", "pose of many rows": "pose"}.items():
    METHODS[_name] = Method(stage={"sparse": _sparse, "dense_every": 0})
    for _nth, _every in {"2nd": 2, "3rd": 3, "4th": 4, "10th": 10}.items():
        METHODS[f"{_name}, {_nth} dense"] = Method(stage={"sparse": _sparse, "dense_every": _every})
for _nth, _every in {"2nd": 2, "3rd": 3, "4th": 4}.items():
    METHODS[f"native windows, {_nth} dense"] = Method(stage=_s2(_every, 0), shift="none")
    METHODS[f"s2 native + sinks, {_nth} dense"] = Method(stage=_s2(_every))
for _name in ("native windows", "native windows, 3rd dense", "native windows, 4th dense"):
    METHODS[f"{_name}, scattered"] = replace(METHODS[_name], scatter=True)
for _sinks in (1, 16, 64):
    METHODS[f"s2 native + {_sinks} sinks, 4th dense"] = Method(stage=_s2(4, _sinks))
METHODS["s2 native + sinks, half of the shift undone, 4th dense"] = Method(stage=_s2(4), undone=True)
METHODS["s2 native + sinks, 4th layer dense"] = Method(stage=_s2(0), hybrid=4)
METHODS["s2 1/16 to 1/4 + sinks, 4th dense"] = Method(stage=_s2(4), grow=(1 / 16, 1 / 8, 1 / 4))
METHODS["dense of equal time"] = Method(stage=DENSE, time_of="windows, 2nd dense")
RECIPE = "windows, 2nd dense"
CHANGES: dict[str, dict[str, Any]] = {
    "rank 8": {"rank": 8},
    "rank 256": {"rank": 256},
    "neither norms nor embeddings": {"adapter": {"train_norms": False, "train_embeddings": False}},
    "norms only": {"adapter": {"train_embeddings": False}},
    "rate 1e-4": {"learning_rate": 1e-4},
    "rate 1e-3": {"learning_rate": 1e-3},
    "half of the steps": {"cut": 0.5},
    "twice the steps": {"cut": 2.0},
    "a quarter short": {"short": 0.25},
}
for _name in (RECIPE, "dense"):
    for _change, _fields in CHANGES.items():
        METHODS[f"{_name}, {_change}"] = replace(METHODS[_name], **_fields)
for _exponent in (1.0, 1.5, 2.0):
    METHODS[f"abf {_exponent} alone"] = Method(exponent=_exponent, trained=False)
    for _name, _like in list(METHODS.items()):
        if _like.trained and _like.exponent is None and _like.rope_type == "yarn":
            _of = _like.time_of and f"{_like.time_of}, abf {_exponent}"
            METHODS[f"{_name}, abf {_exponent}"] = replace(_like, exponent=_exponent, time_of=_of)
METHODS["default"] = Method(rope_type="auto")

GROUPS = {
    "papers": ["base", "s2 1/4 linear (the paper)", "s2 1/4", "s2 1/4, abf 1.5"],
    "factors": [
        *(f"{RECIPE}, {change}, abf 1.5" for change in CHANGES),
        *(f"dense, {change}, abf 1.5" for change in ("rate 1e-3", "rank 256", "twice the steps")),
        "s2 native + sinks, 4th layer dense, abf 1.5",
        "s2 1/16 to 1/4 + sinks, 4th dense, abf 1.5",
    ],
}
"""Names that stand for several methods."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row but for its split."""

    model: str
    corpus: str
    length: int
    method: str
    seed: int
    liger: int = 0

    def key(self) -> dict[str, str]:
        method = METHODS[self.method]
        known = {**asdict(self), "rank": method.rank, "learning_rate": method.learning_rate}
        return {name: str(known[name]) for name in KEY}


KEY = ("model", "corpus", "length", "method", "seed", "rank", "learning_rate", "liger")
"""The columns that name a run."""


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, from its begin to its end, with the GPU's work done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _wait()
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self._started)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Pattern(TrainerCallback):
    """What of a method no stage can say: what is shifted, group sizes that grow, layers that are always dense.

    Its turn is after the trainer's callback, which sets the group size at the begin of each step, in the one state
    that the trainer has given to all layers.
    """

    def __init__(self, method: Method, length: int, steps: int) -> None:
        self.method, self.length, self.steps = method, length, steps
        self._even: S2State | None = None  # of the even layers, where they have one of their own

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shared = get_s2_attention(kwargs["model"])
        shared.shift = self.method.shift
        if self.method.undone:
            self._even = replace(shared, shift="none")
            for _, module in attention_modules(kwargs["model"]):
                if module.layer_idx % 2 == 0:
                    setattr(module, STATE, self._even)
        if self.method.hybrid:
            dense = replace(shared, config=replace(shared.config, group_size=self.length), mode="auto")
            for _, module in attention_modules(kwargs["model"]):
                if (module.layer_idx + 1) % self.method.hybrid == 0:
                    setattr(module, STATE, dense)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.method.grow:
            shared = get_s2_attention(kwargs["model"])
            ratio = self.method.grow[state.global_step * len(self.method.grow) // self.steps]
            shared.config = replace(shared.config, group_size=round(ratio * self.length))
        if self._even is not None:
            shared = get_s2_attention(kwargs["model"])
            self._even.config, self._even.mode = shared.config, shared.mode


def steps_of(run: Run, known: Iterable[dict[str, str]]) -> int:
    """Optimizer steps of a run.

    Args:
        known: Rows of runs, for the times of steps.

    Raises:
        ValueError: if the steps whose time the run is to take haven't been timed.
    """
    method = METHODS[run.method]
    if method.time_of is None:
        return max(1, round(STEPS[run.length] * method.cut))
    like = replace(run, method=method.time_of)
    same = {name: text for name, text in like.key().items() if name not in ("corpus", "seed")}
    timed = [r for r in known if same.items() <= r.items() and r["shared_gpu"] == "0" and r["dense_step_p50"]]
    if not timed:
        raise ValueError(
            f"{run.method!r} takes the time of {method.time_of!r}, which no row of {run.model} at {run.length} has "
            f"with liger={run.liger} on a GPU without other work: run that first."
        )
    # A run's own dense steps are what its time is measured in, so that the GPU's kind cancels.
    shares = [float(r["train_seconds"]) / (int(r["steps"]) * float(r["dense_step_p50"])) for r in timed]
    return max(1, round(STEPS[run.length] * statistics.median(shares)))


def train(run: Run, folder: Path, known: Iterable[dict[str, str]] = ()) -> tuple[Any, dict[str, Any]]:
    """Extend the base as `run` says: the model, and what that cost. `known`: see `steps_of`."""
    source, method = SOURCES[run.model], METHODS[run.method]
    set_seed(run.seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16, attn_implementation="s2attn")
    if torch.cuda.is_available():
        model.cuda()
    rope: dict[str, Any] = {"rope_type": method.rope_type}
    if method.exponent is not None:
        theta = current_rope(model.config).parameters["rope_theta"]
        theta *= (run.length / source.native) ** method.exponent
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    if not method.trained:
        if method.scaled:
            apply_rope(model, scaled_rope(model.config, run.length, **rope))
        return model, {}
    steps = steps_of(run, known)
    rows = train_rows(folder, run.corpus, run.length, steps, run.seed, source.end, source.begin)
    if method.scatter:
        every = method.stage["dense_every"]
        sparse = [i for i in range(steps) if not every or (i + 1) % every]
        windows = rows[sparse].reshape(-1, source.native)
        rows[sparse] = windows[np.random.default_rng(run.seed).permutation(len(windows))].reshape(-1, run.length)
    short = int(method.short * steps)
    documents = [*rows[short:], *rows[:short].reshape(-1, source.native)]
    with tempfile.TemporaryDirectory() as output:
        args = LongLoraSFTConfig(
            **{
                "output_dir": output,
                "stages": [ContextStage(run.length, steps, **rope, **method.stage)],
                "per_device_train_batch_size": 1,
                "learning_rate": method.learning_rate,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "warmup_steps": min(10, max(1, steps // 5)),
                "packing": bool(short),
                "train_sampling_strategy": "random" if short else "sequential",
                "gradient_checkpointing": source.checkpointed,
                "bf16": True,
                "use_cpu": not torch.cuda.is_available(),
                "seed": run.seed,
                "logging_steps": 10,
                "disable_tqdm": True,
                "save_strategy": "no",
                "report": False,
                "report_to": "none",
                "use_liger_kernel": bool(run.liger),
            }
        )
        clock = StepClock()
        trainer = LongLoraSFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": documents}),
            processing_class=AutoTokenizer.from_pretrained(folder / "base"),
            peft_config=LongLoraConfig(r=method.rank, lora_alpha=2 * method.rank, **method.adapter),
            callbacks=[clock, Pattern(method, run.length, steps)],
        )
        trainer.remove_callback(PrinterCallback)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    modes = ["dense" if trainer.schedule.step(i).mode == "dense" else "sparse" for i in range(steps)]
    cost: dict[str, Any] = {"steps": steps, "train_seconds": 0.0}
    for mode in ("dense", "sparse"):
        # The first step of a kind compiles and tunes.
        timed = [s for s, m in zip(clock.seconds, modes, strict=True) if m == mode]
        warm = timed[1:] or timed
        cost[f"{mode}_steps"] = len(timed)
        if warm:
            cost["train_seconds"] += statistics.median(warm) * len(timed)
            for quantile in (20, 50, 80):
                cost[f"{mode}_step_p{quantile}"] = float(np.percentile(warm, quantile))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    cost["train_loss"] = losses[-1]
    cost["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    cost["theta"] = current_rope(trainer.model.config).parameters["rope_theta"]
    # Prepared for mixed precision it gives logits in fp32: 128 GiB for 131,072 tokens of Gemma's vocabulary.
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), cost


def score(model: Any, run: Run, split: str, folder: Path) -> dict[str, float]:
    """Perplexities of windows of a split, dense."""
    with np.load(folder / f"{run.corpus}.{split}.npz") as file:
        documents = np.split(file["ids"].astype(np.int64), file["ends"][:-1])
    if (begin := SOURCES[run.model].begin) is not None:
        each = run.length - 1
        documents = [np.insert(ids[at : at + each], 0, begin) for ids in documents for at in range(0, len(ids), each)]
    edges = sorted({1, *(n for n in (4096, 8192) if n < run.length - LAST), run.length - LAST, run.length})
    options: dict[str, Any] = {"max_windows": WINDOWS[run.length], "positions_per_window": run.length}
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        records = loss_by_position(model, documents, run.length, buckets=edges, progress=False, **options)
    found = {"ppl": _perplexity(records), "ppl_last_2048": _perplexity(records[-1:])}
    for length in (4096, 8192):
        if length in edges:
            found[f"ppl_first_{length}"] = _perplexity([r for r in records if r["end"] <= length])
    return found


def _perplexity(records: Sequence[dict[str, Any]]) -> float:
    return math.exp(sum(r["nll"] * r["tokens"] for r in records) / sum(r["tokens"] for r in records))


COLUMNS = (
    *KEY,
    "split",
    *("steps", "dense_steps", "sparse_steps", "train_seconds", "train_loss", "peak_gib", "theta", "shared_gpu"),
    *(f"{mode}_step_p{quantile}" for mode in ("dense", "sparse") for quantile in (20, 50, 80)),
    *("windows", "ppl", "ppl_last_2048", "ppl_first_4096", "ppl_first_8192", "ppl_trained", "ppl_trained_last_2048"),
)


def do(run: Run, folder: Path, results: Path, *, shared: bool, as_trained: bool) -> None:
    """Run it and append its rows."""
    started = time.perf_counter()
    model, cost = train(run, folder, [*read_rows(RESULTS / "pretrained.csv"), *read_rows(results)])
    for split in SPLITS:
        scores = score(model, run, split, folder)
        if as_trained and split == SPLITS[0]:
            with s2_attention_mode(model, "s2"):
                trained = score(model, run, split, folder)
            scores |= {"ppl_trained": trained["ppl"], "ppl_trained_last_2048": trained["ppl_last_2048"]}
        known = {
            **run.key(),
            "split": split,
            "windows": WINDOWS[run.length],
            "shared_gpu": int(shared),
            **cost,
            **scores,
        }
        append_row(results, {name: known.get(name, "") for name in COLUMNS} | provenance())
        print(
            f"{run.corpus} {run.length} seed {run.seed} {split:10s} {run.method:34s} all {scores['ppl']:.3f} last "
            f"{scores['ppl_last_2048']:.3f} 8k {scores.get('ppl_first_8192', 0):.3f} train "
            f"{cost.get('train_seconds', 0):.1f} s dense {cost.get('dense_step_p50', 0):.3f} sparse "
            f"{cost.get('sparse_step_p50', 0):.3f} peak {cost.get('peak_gib', 0):.1f} GiB "
            f"({time.perf_counter() - started:.0f} s)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="what benchmarks.quality.models has filled")
    parser.add_argument("--model", default="smollm2", choices=list(SOURCES))
    parser.add_argument("--corpora", nargs="+", default=["books", "math"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32_768])
    names = [*METHODS, *GROUPS]
    parser.add_argument("--methods", nargs="+", default=["dense", "default"], choices=names, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument(
        "--shared", action="store_true", help="another process works on this GPU: times are not its own"
    )
    parser.add_argument("--liger", action="store_true", help="train with Liger's kernels (pip install liger-kernel)")
    parser.add_argument("--as-trained", action="store_true", help="score with the pattern of training, too")
    parser.add_argument("--results", type=Path, default=RESULTS / "pretrained.csv")
    args = parser.parse_args()
    folder = args.work / args.model
    done = [{name: row[name] for name in KEY} for row in read_rows(args.results)]
    started = time.perf_counter()
    runs = [
        Run(model=args.model, corpus=corpus, length=length, method=method, seed=seed, liger=int(args.liger))
        for seed in args.seeds
        for length in args.lengths
        for corpus in args.corpora
        for name in args.methods
        for method in GROUPS.get(name, [name])
    ]
    for run in runs:
        if run.key() in done:
            continue
        if time.perf_counter() - started > args.seconds:
            print(f"out of time before {json.dumps(run.key())}", flush=True)
            break
        try:
            do(run, folder, args.results, shared=args.shared, as_trained=args.as_trained)
        except Exception:  # the others go on; it has no row and will be tried again
            traceback.print_exc()
            print(f"failed: {json.dumps(run.key())}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
