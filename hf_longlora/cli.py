"""The command line: `hf-longlora COMMAND`, or `python -m hf_longlora COMMAND`."""

import argparse
import gzip
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 after an error (one message), 130 after an interruption."""
    parser = argparse.ArgumentParser(
        prog="hf-longlora", description="Extend a model's context cheaply: LongLoRA for Hugging Face."
    )
    parser.add_argument("--version", action="version", version=f"hf-longlora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_evaluate(commands)
    _add_check(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {options.after_interruption}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        print(f"hf-longlora: error: {error}", file=sys.stderr)
        return 1
    return 0


# --------------------------------------------------------------------------------------------------------------------
# demo


def _add_demo(commands: Any) -> None:
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
    demo.set_defaults(run=_demo, after_interruption="What is done is kept: the same command goes on.")


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(options.output_dir, seed=options.seed)


# --------------------------------------------------------------------------------------------------------------------
# evaluate


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="perplexity by context length, with dense attention and with the pattern of training",
        description=(
            "Measure a model, or an adapter on its base, on long documents: perplexity by context length with dense "
            "attention (what inference uses) beside the pattern of sparse training, with a warning where dense is "
            "worse; and, if asked for, passkey retrieval by length and depth. Writes evaluation.json and plots."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument("model", help="a model's or an adapter's name or path")
    evaluate.add_argument(
        "--documents",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text files, a document each, or .jsonl files (.gz too) with a document's `text` on each line",
    )
    evaluate.add_argument(
        "--lengths", nargs="+", type=int, required=True, metavar="N", help="context lengths in tokens"
    )
    evaluate.add_argument("--stride", type=int, help="tokens scored in each window; default 256, or half the shortest")
    evaluate.add_argument("--max-windows", type=int, help="at most this many windows at each length")
    evaluate.add_argument("--batch-size", type=int, default=1, help="windows in a forward")
    evaluate.add_argument(
        "--group-size",
        type=int,
        help="of the training's pattern; default: as the adapter says, or a quarter of the longest",
    )
    evaluate.add_argument(
        "--passkey", type=int, default=0, metavar="TRIALS", help="passkey texts at each length and depth"
    )
    evaluate.add_argument("--dtype", default="auto", help="of the weights: auto, float32, bfloat16 or float16")
    evaluate.add_argument("--device", help="cuda, cpu, ...; default: a GPU if there is one")
    evaluate.add_argument("--output-dir", default="longlora-evaluation", help="where evaluation.json and the plot go")
    evaluate.set_defaults(run=_evaluate, after_interruption="Nothing has been written.")


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from .attention import S2AttentionConfig
    from .evaluation import compare_attention, passkey_accuracy, plot_perplexity, plot_retrieval
    from .evaluation.plots import require_matplotlib

    require_matplotlib()
    documents = [document for file in options.documents for document in read_documents(Path(file))]
    model, tokenizer = _load(options.model, options.dtype, options.device)
    attention = None if options.group_size is None else S2AttentionConfig(group_size=options.group_size)
    records = compare_attention(
        model,
        documents,
        options.lengths,
        attention=attention,
        stride=options.stride,
        max_windows=options.max_windows,
        batch_size=options.batch_size,
        tokenizer=tokenizer,
    )
    results: dict[str, Any] = {"model": options.model, "perplexity": records}
    if options.passkey:
        results["passkey"] = passkey_accuracy(model, tokenizer, options.lengths, trials=options.passkey)
    out = Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(results, indent=2))
    plot_perplexity(records, out / "perplexity.png", title=f"{options.model}: perplexity by context length")

    console = Console()
    table = Table("Perplexity at", *(f"{length:,}" for length in options.lengths))
    for name, rows in records.items():
        table.add_row(name, *(f"{row['perplexity']:.2f}" for row in rows))
    console.print(table)
    if options.passkey:
        depths = sorted({row["depth"] for row in results["passkey"]})
        table = Table("Passkey found at depth", *(f"{depth:.0%}" for depth in depths))
        for length in options.lengths:
            found = [row["accuracy"] for row in results["passkey"] if row["length"] == length]
            table.add_row(f"{length:,} tokens", *(f"{share:.0%}" for share in found))
        console.print(table)
        plot_retrieval(results["passkey"], out / "passkey.png", title=f"{options.model}: passkey retrieval")
    console.print(f"In {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", highlight=False)


def read_documents(file: Path) -> list[str]:
    """The documents of a file: its text, or the `text` of each line of a `.jsonl` or `.jsonl.gz`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, or a line is not JSON with a `text`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is no file")
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if ".jsonl" not in file.suffixes:
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            documents.append(str(json.loads(line)["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: not a JSON object with a `text`") from error
    return documents


# --------------------------------------------------------------------------------------------------------------------
# check


def _add_check(commands: Any) -> None:
    from .rope import AUTO, ROPE_TYPES

    check = commands.add_parser(
        "check",
        help="say what would be done to a model, from its config alone",
        description=(
            "Say what LongLoRA would do to a model: which layers are sparse and which are left alone, how heads are "
            "split, what is trained, RoPE before and after, and what is refused and why. Reads the config only; no "
            "weights are downloaded. Exit code 1 if something is refused."
        ),
    )
    check.add_argument("model", help="a model's name or path")
    check.add_argument("--target-length", type=int, metavar="N", help="tokens to extend the context to")
    check.add_argument("--rope-type", default=AUTO, choices=(AUTO, *ROPE_TYPES), help="default: %(default)s")
    check.add_argument("--group-size", type=int, metavar="N", help="default: 1/16 of the length, as in the trainer")
    check.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    check.set_defaults(run=_check, after_interruption="Nothing has been written.")


def _check(options: argparse.Namespace) -> None:
    from .attention import S2AttentionConfig
    from .checking import check_model

    attention = None if options.group_size is None else S2AttentionConfig(group_size=options.group_size)
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers, and nothing to the user
    found = check_model(
        options.model,
        target_length=options.target_length,
        rope_type=options.rope_type,
        attention=attention,
        trust_remote_code=options.trust_remote_code,
    )
    print(found)
    if found.refused:
        raise ValueError(f"{options.model} can't be extended like this; the reasons are above")


def _load(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """A model, or an adapter on its base, on its device, and its tokenizer."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        adapter = PeftConfig.from_pretrained(name)
    except (ValueError, OSError):
        if (Path(name) / "adapter_config.json").is_file():  # an adapter, but a damaged one
            raise
        adapter = None  # a model, or a name that loading will refuse
    base = name if adapter is None else adapter.base_model_name_or_path
    if base is None:
        raise ValueError(f"the adapter {name} doesn't name its base model (base_model_name_or_path)")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    except OSError as error:
        raise OSError(f"the model {base} can't be loaded: {error}") from error
    if adapter is not None:
        model = PeftModel.from_pretrained(model, name)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer_of = name if adapter is not None and (Path(name) / "tokenizer_config.json").is_file() else base
    return model, AutoTokenizer.from_pretrained(tokenizer_of)


if __name__ == "__main__":
    sys.exit(main())
