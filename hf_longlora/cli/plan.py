"""`hf-longlora plan`."""

import argparse
import json
from dataclasses import asdict, fields
from typing import Any

from .options import given, refuse_idle

HEADERS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "logits": "logits",
    "total": "GiB",
    "host": "host GiB",
}
"""Columns of memory, in GiB; those that are 0 at every length and not in `ALWAYS` are left out."""
ALWAYS = ("weights", "activations", "total")
OF_AN_ADAPTER = ("--no-train-embeddings", "--base-length")
NEARLY_DENSE = 1.25
"""Dense training that takes so many times as long is advised: no mixture measured is better at the end of novels."""


def add(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory and time of a training step by length, before anything but the config is downloaded",
        description=(
            "Say what a training step takes on a GPU: memory by what it is for, seconds, and the longest sequence "
            "that fits. Only the model's config is read. Memory is what torch counts as allocated at its peak; a "
            "length fits if it leaves room for CUDA and fragmentation. Parts are as they stand at the peak, where "
            "gradients may not be there yet. Seconds are those of an optimizer step on one card. A run's file says "
            "(--config) what has no option here: LoRA's rank and targets, checkpointing, dtypes, sink tokens."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.add_argument("model", nargs="?", help="a model's name or path, or the folder of a config.json")
    plan.add_argument(
        "--config",
        metavar="FILE",
        help="a run's YAML file, as `train` takes it, in the place of a model and all options but --gpu, --gpus and "
        "--json: what each of its stages takes, and hours in all",
    )
    lengths = [8192, 16384, 32768, 65536, 131072]
    plan.add_argument("--lengths", nargs="+", type=int, default=lengths, metavar="N", help="tokens in a sequence")
    plan.add_argument(
        "--gpu", help="a card of the table in hf_longlora/planning/gpus.py; default: this machine's, or H100"
    )
    plan.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="cards of a run (--config), each with the whole model"
    )
    plan.add_argument("--batch-size", type=int, default=1, help="sequences in a forward, on one card")
    plan.add_argument(
        "--accumulation",
        dest="gradient_accumulation_steps",
        type=int,
        default=1,
        metavar="N",
        help="forwards in an optimizer step",
    )
    plan.add_argument("--no-train-embeddings", action="store_true", help="leave the embeddings as they are")
    plan.add_argument("--no-use-peft", action="store_true", help="train all weights, in float32")
    plan.add_argument(
        "--quantized", dest="quantization", choices=("4bit", "8bit"), help="a base quantized by bitsandbytes"
    )
    plan.add_argument("--activation-offloading", action="store_true", help="checkpoints wait in the host's memory")
    plan.add_argument("--fused", action="store_true", help="with use_liger_kernel or compile_layers")
    plan.add_argument("--mlp-tile", type=int, metavar="N", help="tokens that an MLP takes at a time; default: all")
    plan.add_argument("--sequence-parallel", type=int, default=1, metavar="N", help="cards that share a sequence")
    plan.add_argument(
        "--base-length",
        type=int,
        metavar="N",
        help="tokens that the base was trained at before any scaling; default: as its config says",
    )
    plan.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="tokens in a group; default: the base's native window, at most a quarter of the length",
    )
    plan.add_argument("--dense-every", type=int, default=2, metavar="K", help="each K-th step is dense; 0: none")
    plan.add_argument(
        "--sparse",
        choices=("auto", "s2", "windows", "pose"),
        default="auto",
        help="the other steps: shifted sparse attention, or windows of the base's native length (pose: of two "
        "chunks); auto: windows, as for plain text, unless something says how groups are to be",
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(run=run, parser=plan, after_interruption="Nothing has been changed.")


def run(options: argparse.Namespace) -> None:
    from ..attention import S2AttentionConfig
    from ..planning import RunSettings, local_gpu, plan_run
    from ..tuner import LongLoraConfig

    if (options.model is None) == (options.config is None):
        raise ValueError("plan takes a model, or a run's file by --config")
    if options.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {options.gpus}")
    if options.config is not None:
        idle = set(given(options)) - {"--config", "--gpu", "--gpus", "--json"}
        refuse_idle(options, idle, f"with --config it is {options.config} that says it")
        return _run_of(options)
    refuse_idle(options, ["--gpus"], "the cards of a run; give its file by --config")
    if options.no_use_peft:
        refuse_idle(options, OF_AN_ADAPTER, "of an adapter, and --no-use-peft has none")
    adapter = LongLoraConfig(
        train_embeddings=not options.no_train_embeddings,
        base_length=options.base_length,
    )
    named = {field.name: getattr(options, field.name) for field in fields(RunSettings) if field.name in options}
    named["attention"] = S2AttentionConfig(group_size=options.group_size)
    whole = {"adapter": None, "dtype": "float32"} if options.no_use_peft else {"adapter": adapter}
    settings = RunSettings(**named, **whole)
    plan = plan_run(options.model, options.lengths, gpu=options.gpu or local_gpu() or "H100", settings=settings)
    if options.json:
        print(json.dumps(asdict(plan), indent=2))
    else:
        _show(plan, options)


def _run_of(options: argparse.Namespace) -> None:
    """The plan of a run's file."""
    from ..planning import find_gpu, local_gpu
    from .train import cards, config_of, in_all, parse, plan_of

    # What the card of this machine can't do (bf16, TF32), the one that is planned for can.
    _, model, args = parse(["--config", options.config, "--use_cpu", "true", "--tf32", "false"])
    gpu = find_gpu(options.gpu or local_gpu() or "H100")
    plan, stages = plan_of(model, args, config_of(model, args), gpu, options.gpus)
    if options.json:
        rows = [{**asdict(stage), "hours": stage.hours} for stage in stages]
        print(json.dumps({**asdict(plan), "model": model.model_name_or_path, "stages": rows}, indent=2))
        return
    print(
        f"{model.model_name_or_path}: {plan.parameters / 1e9:,.2f} B parameters, {plan.trainable / 1e6:,.1f} M "
        f"trained, on {cards(gpu, options.gpus)}: {in_all(stages)}"
    )
    for number, stage in enumerate(stages, start=1):
        print(f"stage {number}, {stage}")
    for note in plan.notes:
        print(note)


def _show(plan: Any, options: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 100)  # numbers are not cut; a narrower terminal wraps the lines
    print(
        f"{plan.model}: {plan.parameters / 1e9:,.2f} B parameters, {plan.trainable / 1e6:,.1f} M trained, on one "
        f"{plan.gpu.name} ({plan.gpu.memory_gib:g} GiB)"
    )
    rows, mixed = plan.lengths, options.dense_every > 1
    columns: dict[str, list[str]] = {"tokens": [f"{row.length:,}" for row in rows]}
    for name, header in HEADERS.items():
        values = [getattr(row, name) for row in rows]
        if name in ALWAYS or any(values):
            columns[header] = [f"{value:.1f}" for value in values]
    if mixed:
        columns |= {"s sparse": [f"{row.seconds_sparse:.3g}" for row in rows]}
        columns |= {"s dense": [f"{row.seconds_dense:.3g}" for row in rows]}
    columns["s/step"] = [f"{row.seconds:.3g}" for row in rows]
    columns["tokens/s"] = [f"{row.tokens_per_second:,.0f}" for row in rows]
    columns["fits"] = ["yes" if row.fits else "no" for row in rows]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console.print(table)
    if plan.longest is None:
        print("A step holds one window at a time: any length fits.")
    elif plan.longest:
        print(f"The longest that fits: {plan.longest:,} tokens.")
    else:
        print("Not even 1,024 tokens fit: take a quantized base, a larger card, or train less.")
    near = [row.length for row in rows if mixed and row.seconds < row.seconds_dense <= NEARLY_DENSE * row.seconds]
    if near:
        print(
            f"Up to {max(near):,} tokens dense training takes at most {NEARLY_DENSE - 1:.0%} longer, and is the "
            "better choice: attention: dense in a stage."
        )
    for note in plan.notes:
        print(note)
