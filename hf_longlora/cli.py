"""The command line: `hf-longlora COMMAND`, or `python -m hf_longlora COMMAND`."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 after an error (one message), 130 after an interruption."""
    parser = argparse.ArgumentParser(
        prog="hf-longlora", description="Extend a model's context cheaply: LongLoRA for Hugging Face."
    )
    parser.add_argument("--version", action="version", version=f"hf-longlora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small model on Python's standard library and extend it 8x, offline",
        description=(
            "Train a small Llama on the sources of Python's standard library at a context of 256 tokens, extend it to "
            "2,048 with LoRA and dense attention, LongLoRA, and LongLoRA with some dense steps, and compare their "
            "perplexity on held-out files. Needs no download; about 5 minutes on two CPU cores. Run it again after an "
            "interruption: it goes on from the last checkpoint."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output-dir", default="longlora-demo", help="where models, adapters, table and plot go")
    demo.add_argument("--seed", type=int, default=0, help="of weights and data order")
    options = parser.parse_args(arguments)

    from .demo import run_demo

    try:
        run_demo(options.output_dir, seed=options.seed)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. What is done is in {options.output_dir}; run the same command to go on.", file=sys.stderr
        )
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        print(f"hf-longlora: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
