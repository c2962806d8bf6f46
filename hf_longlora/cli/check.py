"""`hf-longlora check`: what would be done to a model."""

import argparse
from collections.abc import Iterator
from typing import Any

from .options import refuse_idle


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
        default="auto",
        metavar="TYPE",
        help="linear, dynamic, yarn, llama3, longrope or abf (default: as the base is scaled, else abf)",
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
    check.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    check.set_defaults(run=run, parser=check, after_interruption="Nothing has been written.")


def run(options: argparse.Namespace) -> None:
    from ..attention import S2AttentionConfig
    from ..planning import check_model

    if options.target_length is None:
        refuse_idle(options, ["--rope-type"], "of a longer RoPE; give its --target-length")
    found = check_model(
        options.model,
        target_length=options.target_length,
        rope_type=options.rope_type,
        base_length=options.base_length,
        attention=None if options.group_size is None else S2AttentionConfig(group_size=options.group_size),
        trust_remote_code=options.trust_remote_code,
    )
    print(in_words(found))
    if found.refused:
        raise ValueError(f"{options.model} can't be extended like this; the reasons are above")


def in_words(found: Any) -> str:
    """A `ModelCheck`, a line for each thing."""
    return "\n".join(_lines(found))


def _lines(found: Any) -> Iterator[str]:
    tested = f"tested: {found.family.name}" if found.family is not None else "not among the tested families"
    yield f"{found.name}: {found.model_class}, model type {found.model_type} ({tested})"
    if found.layers:
        yield f"attention   {len(found.sparse)} of {_count(len(found.layers) + found.other_layers, 'layer')} sparse"
        for reason in sorted({layer.left_alone for layer in found.layers if layer.left_alone}):
            names = [layer.name for layer in found.layers if layer.left_alone == reason]
            yield f"            {_count(len(names), 'layer')} left alone: {reason} ({_short(names)})"
        if found.other_layers:
            yield f"            {_count(found.other_layers, 'layer')} left alone: no softmax attention"
        for kind in sorted({f"{_shifted(layer)}{layer.heads} query heads" for layer in found.sparse}):
            yield f"shifted     {kind}"
    if (groups := found.attention) is not None:
        sinks = f" and the first {groups.sink_tokens:,} of a document" if groups.sink_tokens else ""
        yield f"groups      {groups.group_size:,} tokens{sinks}, at {found.length:,}"
    if found.window is not None:
        yield f"windows     {found.window:,} tokens (sparse='windows' or 'pose')"
    if found.shared:
        yield "shared      a sequence by several processes (sequence_parallel)"
    if found.targets:
        yield f"LoRA on     {', '.join(found.targets)}"
    if found.norms or found.embeddings:
        yield f"trained     {_count(len(found.norms), 'norm')} ({_short(found.norms)})"
        yield f"            {_count(len(found.embeddings), 'embedding')} ({_short(found.embeddings)})"
    if found.parameters[1]:
        share = found.parameters[0] / found.parameters[1]
        yield f"            {found.parameters[0]:,} of {found.parameters[1]:,} parameters ({share:.2%})"
    if found.rope is not None:
        before, after = found.rope
        of_before, of_after = found.reaches
        yield f"RoPE        {_rope(before, before, of_before)}"
        yield f"            -> {_rope(after, before, of_after)}" if before != after else "            unchanged"
    elif found.layers:
        yield "RoPE        none that can be scaled"
    if found.family is not None and found.family.note:
        yield f"family      {found.family.note}"
    for note in found.notes:
        yield f"note        {note}"
    for reason in found.refused:
        yield f"REFUSED     {reason}"


def _shifted(layer: Any) -> str:
    """Which heads of it are shifted."""
    if layer.kv_heads > 1:
        half = layer.kv_heads // 2
        return f"the last {half} of {layer.kv_heads} key/value heads, with {half * layer.heads // layer.kv_heads} of "
    return f"{layer.heads // 2} of "


def _rope(scaling: Any, base: Any, reaches: list[tuple[int, int]]) -> str:
    from ..rope import type_over

    shown = {k: v for k, v in scaling.parameters.items() if k != "rope_type" and not isinstance(v, list)}
    values = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
    lengths = " or ".join(f"{longest:,} tokens of originally {original:,}" for original, longest in reaches)
    return f"{type_over(scaling, base)}, {lengths} ({values})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _short(names: list[str], most: int = 3) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f", ... {names[-1]}" if len(names) > most else "")
