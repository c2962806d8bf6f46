"""`hf-longlora import`."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "import",
        help="make an adapter of a checkpoint of the original LongLoRA",
        description=(
            "Write a checkpoint of the original LongLoRA (a LoRA beside trainable_params.bin, with its RoPE in no "
            "file) as one LONGLORA adapter: LoRA, embeddings, norms, and the linear RoPE that its scripts make of the "
            "length it was trained at. It is then evaluated, merged, exported and pushed as any other. Only the "
            "base's config is read, and pickles by torch's loader that runs no code. The LoRA of another trainer, "
            "its modules_to_save too, is taken where the RoPE was scaled linearly (LLaMA-Factory's rope_scaling)."
        ),
    )
    parser.add_argument("folder", help="the checkpoint's folder, or its name on the Hub")
    parser.add_argument("output_dir", help="a new or an empty folder")
    parser.add_argument(
        "--target-length",
        type=int,
        required=True,
        metavar="N",
        help="tokens it was trained at: model_max_length (context_size) of the original scripts",
    )
    parser.add_argument("--base", help="the base model, if not the one that the checkpoint names")
    parser.set_defaults(run=run, after_interruption="Nothing has been written.")


def run(options: argparse.Namespace) -> None:
    from ..hub import import_original

    out = import_original(options.folder, options.output_dir, target_length=options.target_length, base=options.base)
    print(f"{out} is an adapter. What it does to its base: hf-longlora check {out}")
