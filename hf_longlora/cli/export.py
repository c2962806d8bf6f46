"""`hf-longlora merge` and `hf-longlora export`."""

import argparse
from pathlib import Path
from typing import Any

from .options import DTYPES, check_device, refuse_idle

UNTOUCHED = "Nothing has been written."


def add(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge an adapter into its base: a model that loads without this package",
        description=(
            "Merge a LONGLORA adapter into its base and save the model with the scaled RoPE in config.json, so that "
            "transformers and vLLM load it without this package, at its full length."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _arguments(merge)
    merge.set_defaults(run=run, parser=merge, form="merged", after_interruption=UNTOUCHED)
    export = commands.add_parser(
        "export",
        help="write an adapter in a form that needs no hf_longlora: merged, or a plain LoRA",
        description=(
            "Write a LONGLORA adapter in a form that needs no hf_longlora. 'merged': a whole model, as `merge` does. "
            "'lora': a plain LoRA with the base's config.json beside it, RoPE scaled in that; small, but it has to be "
            "loaded on that config (the README.md in the folder says how), and vLLM takes it only if norms and "
            "embeddings were not trained."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _arguments(export)
    export.add_argument("--form", choices=("merged", "lora"), default="merged", help="what is written")
    export.set_defaults(run=run, parser=export, after_interruption=UNTOUCHED)


def _arguments(parser: Any) -> None:
    parser.add_argument("adapter", help="an adapter's folder, or its name on the Hub")
    parser.add_argument("output_dir", help="a new or an empty folder")
    parser.add_argument("--base", help="the base model, if not the one that the adapter names")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the merged model; auto: the base's")
    parser.add_argument("--device", default="cpu", help="where merging is done")


def run(options: argparse.Namespace) -> None:
    from ..hub import export_adapter

    if options.form == "lora":
        refuse_idle(options, ["--dtype", "--device"], "for a merged model; a plain LoRA is written as it is")
    check_device(options.device)
    out = export_adapter(
        options.adapter,
        options.output_dir,
        form=options.form,
        base=options.base,
        dtype=options.dtype,
        device=options.device,
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {'a merged model' if options.form == 'merged' else 'a plain LoRA'}, {size / 2**20:,.1f} MiB")
    if options.form == "lora":
        print(f"It carries no RoPE: load it on the config in {out / 'base'}, as {Path(out, 'README.md')} says.")
