"""The command line: `hf-longlora COMMAND`, or `python -m hf_longlora COMMAND`.

One file a command. Each has `add(commands)`, which adds its parser and sets `run` (what takes the options) and
`after_interruption` (what is said when a person stops it).
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from .. import __version__, register
from . import check, demo, evaluate, export, import_, plan, push, train

DEBUG = "HF_LONGLORA_DEBUG"
"""Set to anything, this environment variable shows the traceback of an error in the place of its message."""

COMMANDS = (demo, check, plan, train, evaluate, export, push, import_)

# What the package and its libraries raise with a message that is made for a reader. Others name their type, too.
SPEAKING = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 after an error (one message), 130 after an interruption.

    Raises:
        SystemExit: with 2 on wrong usage, 0 after `--help` and `--version`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="hf-longlora",
        description="Extend a model's context cheaply: LongLoRA for Hugging Face.",
        epilog=f"hf-longlora COMMAND --help says more. {DEBUG}=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"hf-longlora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    if arguments[:1] == ["train"]:  # TRL's parser knows its options
        options = argparse.Namespace(run=train.run, arguments=arguments[1:], after_interruption=train.INTERRUPTED)
    else:
        options = parser.parse_args(arguments)
    # Between PEFT, TRL and transformers, and nothing to the user.
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
    # PEFT imports it, whose kernel for 4 bits on a CPU is one of the Hub, for inference.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        register()
        options.run(options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {options.after_interruption}", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        message = str(error).strip() or "no message"
        if not isinstance(error, SPEAKING):
            message = f"{type(error).__name__}: {message} ({DEBUG}=1 shows where)"
        print(f"hf-longlora: error: {message}", file=sys.stderr)
        return 1
    return 0
