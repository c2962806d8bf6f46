"""One optimizer step of a Llama-3 shape: stock TRL + PEFT, ours, and the floor without attention.

    python -m benchmarks.train_step --preset targets|lengths|fused|longest|sinks|tiny
    python -m benchmarks.train_step --model 8b --methods stock stock+cudnn ours-2048 floor --lengths 8192 131072

A randomly initialised model takes real steps of `trainer.train()`: LoRA r=8 on q, k, v, o, embeddings and norms
trained, gradient checkpointing, TRL's chunked loss, AdamW, batch 1, one document of random tokens. A method is

    stock           SFTTrainer + LoraConfig(modules_to_save=...), attention as it comes (sdpa: FlashAttention 2)
    ours-n/4        LongLoraSFTTrainer + LongLoraConfig, groups of a quarter of the length
    ours-2048       the same with groups of 2,048 (any number will do)
    ours-dense      its dense steps, what `dense_every` mixes in
    floor           ours with attention replaced by the identity: values repeated for their query heads. q and k get no
                    gradient, so the backward of their projections is left out, too
    floor-qk        the floor with q and k added, so that all projections are computed: what attention alone adds

and each `+NAME` behind it switches on: `cudnn` or `flash` (the backend of scaled_dot_product_attention), `fa3` or
`fa4` (transformers' flash_attention_3 and _4; stock only), `liger` (use_liger_kernel), `compile` (compile_layers),
`tile` (mlp_tile=8192, or a quarter of a shorter length), `selective` (checkpoints keep attention's output), `offload`
(activations to the host), `qlora` (4 bits),
`kernel=NAME` (attention_kernel), `sinks=N` (sink_tokens, else 4), `casts` (adapters' inputs to fp32 and back, as PEFT
does it and our trainer did).

Each method runs in a process of its own, through its lengths in order. A row is appended when a length is done; a
length that does not fit gets a row that says so, and ends its method. Steps are timed from on_step_begin to
on_step_end, the device synchronised; each length has its warm-up steps and its peak memory for itself.
"""

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Lengths share a process, and what one leaves in the allocator's cache must not cost the next its memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", os.environ["PYTORCH_ALLOC_CONF"])

import psutil
import torch

from .provenance import RESULTS, append_row, provenance
from .step_methods import SHAPES, Method, build_model, build_trainer

WARM_UP = 8192
"""Tokens of the first steps of a process, where libraries load, choose and compile."""


class Run(NamedTuple):
    """A method at some lengths: `steps` are timed at each, after `warm` that are not."""

    method: str
    lengths: Sequence[int]
    steps: int = 2
    warm: int = 1


# --------------------------------------------------------------------------------------------------------------------
# One method, in a process of its own


def make_clock(plan: Sequence[int], warm: Sequence[bool], done: Any) -> Any:
    """A callback that times the steps and calls `done(length, seconds, loss)` after the last step of a length."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        started = 0.0
        seconds: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            if step == 0 or plan[step] != plan[step - 1]:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.reset_peak_host_memory_stats()
                self.seconds = []
            synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize()
            elapsed = time.perf_counter() - self.started
            step = state.global_step - 1
            print(f"  {plan[step]:9,} tokens: {elapsed:.3f} s{' (warm-up)' if warm[step] else ''}", flush=True)
            if not warm[step]:
                self.seconds.append(elapsed)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            step = state.global_step - 1
            last = step + 1 == len(plan) or plan[step + 1] != plan[step]
            if "loss" in logs and last and self.seconds:
                done(plan[step], self.seconds, float(logs["loss"]))

    return Clock()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> dict[str, float]:
    """Peaks in GiB: of the device's allocator and what it reserved, of pinned host memory, of this process."""
    row = {"peak_gpu_gib": 0.0, "peak_reserved_gib": 0.0, "peak_pinned_gib": 0.0}
    if torch.cuda.is_available():
        row = {
            "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "peak_pinned_gib": torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 2**30,
        }
    return row | {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def run_method(run: Run, model_name: str, results: Path, progress: Path) -> None:
    """Train, and append a row for each length."""
    from transformers import PrinterCallback

    warnings.simplefilter("ignore")  # what the libraries deprecate among themselves
    method = Method.parse(run.method)
    plan = [n for n in run.lengths for _ in range(run.warm + run.steps)]
    warm = [i < run.warm for _ in run.lengths for i in range(run.warm + run.steps)]
    if run.warm == 0 or "compile" not in method.options:  # compiled for two lengths, it is compiled for any
        plan, warm = [min(WARM_UP, run.lengths[0]), *plan], [True, *warm]
    origin = provenance()
    since = time.perf_counter()

    def row(length: int, status: str, **measured: Any) -> None:
        values = {
            "method": method.name,
            "model": model_name,
            "length": length,
            "group": method.group_at(length),
            "sink_tokens": method.sink_tokens,
            "kernel": method.kernel,
            "status": status,
            **dict.fromkeys(("s_p20", "s_p50", "s_p80", "steps", "tokens_per_s", "loss"), ""),
            "warm": sum(each for n, each in zip(plan, warm, strict=True) if n == length),
            **measured,
            **memory(),
            **origin,
        }
        append_row(results, values)
        progress.write_text(str(length))
        print(describe(values), flush=True)

    def done(length: int, seconds: list[float], loss: float) -> None:
        p20, p50, p80 = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        times = {"s_p20": p20, "s_p50": p50, "s_p80": p80, "steps": len(seconds), "tokens_per_s": length / p50}
        row(length, "ok" if math.isfinite(loss) else "loss not finite", **times, loss=loss)

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = build_model(model_name, max(plan), method.implementation, "qlora" in method.options)
        trainer = build_trainer(method, model, plan, make_clock(plan, warm, done), folder)
        trainer.remove_callback(PrinterCallback)  # the clock says it all
        print(f"  ready after {time.perf_counter() - since:.0f} s", flush=True)
        try:
            with method.backend():
                trainer.train()
        except torch.OutOfMemoryError:
            row(plan[trainer.state.global_step], "out of memory")


def describe(row: dict[str, Any]) -> str:
    text = f"{row['model']} {row['length']:9,} tokens  {row['method']:28} "
    if row["s_p50"] == "":
        return text + str(row["status"])
    text += f"{row['s_p50']:8.3f} s a step  {row['tokens_per_s']:8,.0f} tokens/s  {row['peak_gpu_gib']:6.1f} GiB"
    text += f" (host {row['peak_host_gib']:.1f}, pinned {row['peak_pinned_gib']:.1f})  loss {row['loss']:.2f}"
    return text if row["status"] == "ok" else f"{text}  {row['status']}"


# --------------------------------------------------------------------------------------------------------------------
# All of them


def longest_dense() -> int:
    """Where the targets are measured: 131,072 tokens took 83 GiB on an H200; half of that on a smaller card."""
    free = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0
    return 131072 if free > 100 else 65536


def preset(name: str) -> tuple[str, list[Run]]:
    """A model and its runs, what matters most first: a budget may end before the list does."""
    if name == "tiny":
        names = ["stock", "ours-n/4", "ours-128", "ours-dense", "floor", "floor-qk"]
        return "tiny", [Run(method, [256, 512]) for method in names]
    if name == "targets":
        at = [longest_dense()]
        return "8b", [
            Run("ours-2048", at),
            Run("floor", at),
            Run("stock+cudnn", at, 1, 0),
            Run("ours-n/4", at, 1),
            Run("stock", at, 1, 0),
            Run("floor-qk", at),
        ]
    if name == "lengths":
        at = [8192, 16384, 32768, 65536, 131072, 262144]
        return "8b", [
            Run("ours-2048", at),
            Run("ours-n/4", at, 1),
            Run("ours-dense", at[:5], 1, 0),
            Run("stock+cudnn", at[:5], 1, 0),
            Run("floor", at),
            Run("stock", at[:5], 1, 0),
        ]
    if name == "fused":
        names = ["floor+casts", "floor", "floor+compile", "floor+liger", "floor+compile+liger"]
        names += ["ours-2048+compile", "ours-2048", "ours-2048+liger"]
        return "8b", [Run(method, [32768]) for method in names]
    if name == "sinks":  # about 80 s on an H200
        return "8b", [Run(method, [longest_dense()], 1, 0) for method in ("ours-2048", "ours-2048+sinks=0")]
    assert name == "longest"
    return "8b", [
        Run("ours-2048+liger+tile", [131072, 262144], 1, 0),
        Run("ours-2048+liger+tile+offload", [262144, 524288, 1048576], 1, 0),
        Run("ours-2048+liger+tile+qlora", [262144], 1, 0),
        Run("ours-2048+liger+tile+offload+qlora", [524288, 1048576], 1, 0),
        Run("ours-2048+compile+tile+offload", [524288], 1, 0),
    ]


def spawn(run: Run, model: str, results: Path, timeout: float) -> None:
    """A method in a process of its own; if that dies without a word, a row says so."""
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder, "length")
        child = json.dumps([run._asdict(), model, str(results), str(progress)])
        command = [sys.executable, "-m", "benchmarks.train_step", "--child", child]
        process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"{run.method}: cut short, the time is up", flush=True)
            return
        if code == 0:
            return
        at = int(progress.read_text()) if progress.is_file() else 0
        failed = next((length for length in run.lengths if length > at), run.lengths[-1])
        status = f"killed by signal {-code}" if code < 0 else f"failed with code {code}"
        print(f"{run.method} at {failed:,} tokens: {status}", flush=True)
        if code == -signal.SIGKILL:  # the host's memory is the usual reason; an error of ours is no result
            empty = dict.fromkeys(("s_p20", "s_p50", "s_p80", "steps", "tokens_per_s", "loss"), "")
            empty |= dict.fromkeys(("peak_gpu_gib", "peak_reserved_gib", "peak_pinned_gib", "peak_host_gib"), "")
            row = {"method": run.method, "model": model, "length": failed, "status": status}
            append_row(results, row | empty | provenance())


def summarize(rows: Iterator[dict[str, str]]) -> None:
    """The ratios of the targets, for each model and length."""
    times = {(r["model"], int(r["length"]), r["method"]): float(r["s_p50"]) for r in rows if r["status"] == "ok"}
    for model, length in sorted({key[:2] for key in times}):
        here = {method: seconds for (m, n, method), seconds in times.items() if (m, n) == (model, length)}
        dense = min((s for name, s in here.items() if name.startswith("stock")), default=None)
        print(f"\n{model}, {length:,} tokens (s a step; stock / this; best dense / this; this / floor)")
        for name, seconds in sorted(here.items(), key=lambda item: -item[1]):
            ratios = [
                f"{here['stock'] / seconds:6.2f}x" if "stock" in here else "      -",
                f"{dense / seconds:6.2f}x" if dense else "      -",
                f"{seconds / here['floor']:7.3f}" if "floor" in here else "      -",
            ]
            print(f"  {name:28} {seconds:9.3f}  {'  '.join(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "targets", "lengths", "fused", "longest", "sinks"])
    parser.add_argument("--model", choices=list(SHAPES), help="default: the preset's, or tiny without a GPU, else 8b")
    parser.add_argument("--methods", nargs="*", help="instead of a preset, or those of a preset to run")
    parser.add_argument("--lengths", type=int, nargs="*", help="tokens, ascending; instead of the preset's")
    parser.add_argument("--steps", type=int, help="timed at each length")
    parser.add_argument("--warm", type=int, help="steps before those, at each length")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after which no more is started, and what runs is ended"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "train_step.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run, model, results, progress = json.loads(args.child)
        return run_method(Run(**run), model, Path(results), Path(progress))

    model, runs = preset(args.preset) if args.preset else ("8b" if torch.cuda.is_available() else "tiny", [])
    model = args.model or model
    if args.methods:
        known = {run.method: run for run in runs}
        runs = [known.get(name, Run(name, [8192, 32768])) for name in args.methods]
    if not runs:
        parser.error("give --preset or --methods")
    changes = {"lengths": sorted(args.lengths or []), "steps": args.steps, "warm": args.warm}
    runs = [run._replace(**{k: v for k, v in changes.items() if v not in (None, [])}) for run in runs]
    for run in runs:
        Method.parse(run.method)  # raises
    end = time.monotonic() + args.seconds
    results = args.results.absolute()
    from .provenance import read_rows

    before = len(read_rows(results))
    print(f"{psutil.virtual_memory().total / 2**30:.0f} GiB of host memory, {provenance()['gpu']}", flush=True)
    for run in runs:
        left = end - time.monotonic()
        if left <= 0:
            print(f"{run.method}: not started, the time is up", flush=True)
            continue
        print(f"{run.method} ({model}; {', '.join(f'{n:,}' for n in run.lengths)} tokens)", flush=True)
        spawn(run, model, results, left)
    summarize(iter(read_rows(results)[before:]))


if __name__ == "__main__":
    main()
