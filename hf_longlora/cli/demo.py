"""`hf-longlora demo`."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small model on Python's standard library and extend it 8x, offline",
        description=(
            "Train a small Llama on the sources of Python's standard library at a context of 256 tokens, extend it to "
            "2,048 by LongLoRA with some dense steps, and compare their perplexity on held-out files. Needs no "
            "download and no GPU. It measures this machine first and does what it can in the time given, and says how "
            "long it takes. --full adds LoRA with dense attention and LongLoRA alone, with more steps: the README's "
            "table. Run it again after an interruption: it goes on from the last checkpoint."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output-dir", default="longlora-demo", help="where models, adapters, table and plot go")
    demo.add_argument("--seed", type=int, default=0, help="of weights and data order")
    demo.add_argument("--minutes", type=float, default=4.0, help="what it may take; less than enough is said")
    demo.add_argument("--full", action="store_true", help="all steps of three ways to extend it, whatever they take")
    demo.set_defaults(run=run, after_interruption="What is done is kept: the same command goes on.")


def run(options: argparse.Namespace) -> None:
    from ..demo import run_demo

    run_demo(options.output_dir, seed=options.seed, minutes=options.minutes, full=options.full)
