"""`hf-longlora check`: what would be done to a model."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="say what would be done to a model, from its config alone",
        description=(
            "Say what LongLoRA would do to a model: which layers are sparse and which are left alone, how heads are "
            "split, what is trained, RoPE before and after, and what is refused and why. Reads the config only; no "
            "weights are downloaded. Exit code 1 if something is refused."
        ),
    )
    check.add_argument("model", help="a model's name or path, or an adapter's: its base with that adapter")
    check.add_argument("--target-length", type=int, metavar="N", help="tokens to extend the context to")
    check.add_argument(
        "--rope-type",
        metavar="TYPE",
        help="linear, dynamic, yarn, llama3 or longrope; default: the base's own type where it is scaled, else yarn",
    )
    check.add_argument(
        "--base-length",
        type=int,
        metavar="N",
        help="tokens that the base was trained at before any scaling, where its config doesn't say",
    )
    check.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="default: the adapter's, or as in the trainer: the base's native window, at most a quarter of the length",
    )
    check.add_argument(
        "--sink-tokens",
        type=int,
        metavar="N",
        help="first tokens of a document that every group sees; default: the adapter's, or 4 as in the trainer",
    )
    check.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    check.set_defaults(run=run, after_interruption="Nothing has been written.")


def run(options: argparse.Namespace) -> None:
    from ..attention import S2AttentionConfig
    from ..checking import check_model

    given = {name: getattr(options, name) for name in ("group_size", "sink_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    rope_type = {} if options.rope_type is None else {"rope_type": options.rope_type}
    found = check_model(
        options.model,
        target_length=options.target_length,
        base_length=options.base_length,
        attention=S2AttentionConfig(**given) if given else None,
        trust_remote_code=options.trust_remote_code,
        **rope_type,
    )
    print(found)
    if found.refused:
        raise ValueError(f"{options.model} can't be extended like this; the reasons are above")
