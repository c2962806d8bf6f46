"""`hf-longlora evaluate`."""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .options import DTYPES, check_device, check_writable, refuse_idle


def add(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="perplexity by length, loss by position, retrieval, and RULER, of a model or an adapter",
        description=(
            "Measure a model, or an adapter on its base, on long documents: perplexity by context length with dense "
            "attention (what inference uses) beside the pattern of sparse training, with a warning where dense is "
            "worse; loss by position in the longest context, and whether its far half helps; and, if asked for, the "
            "retrieval of one passkey, or of one among several, by length and depth, and tasks of RULER by length. "
            "Writes evaluation.json and plots."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument("model", help="a model's or an adapter's name or path")
    evaluate.add_argument(
        "--documents",
        nargs="+",
        metavar="FILE",
        help="for perplexity and loss, files and folders as `train` reads them: .txt and .md, a document each; "
        ".jsonl, .json, .parquet, .csv, .tsv, a document in each row, whatever its columns",
    )
    evaluate.add_argument(
        "--lengths", nargs="+", type=int, required=True, metavar="N", help="context lengths in tokens"
    )
    evaluate.add_argument("--stride", type=int, help="tokens scored in each window; default 256, or half the shortest")
    evaluate.add_argument("--max-windows", type=int, help="at most this many windows at each length")
    evaluate.add_argument("--batch-size", type=int, default=1, help="windows in a forward, or tasks' texts")
    evaluate.add_argument(
        "--group-size",
        type=int,
        help="of the training's pattern; default: as the adapter says; a model that says nothing is evaluated densely",
    )
    evaluate.add_argument("--dense-only", action="store_true", help="for models that can't have training's pattern")
    evaluate.add_argument(
        "--passkey", type=int, default=0, metavar="TRIALS", help="passkey texts at each length and depth"
    )
    evaluate.add_argument(
        "--needles",
        type=int,
        default=0,
        metavar="TRIALS",
        help="texts at each length and depth with a named passkey at every depth, of which one is asked for",
    )
    evaluate.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="D",
        help="where passkeys stand, 0 for the beginning of the text and 1 for its end",
    )
    evaluate.add_argument(
        "--retrieval-lengths", nargs="+", type=int, metavar="N", help="lengths for passkeys; default: --lengths"
    )
    evaluate.add_argument(
        "--long-ppl",
        nargs="?",
        type=int,
        const=4096,
        metavar="K",
        help="LongPPL of the documents: perplexity of the tokens that K tokens of context don't tell (4096 if not "
        "given) and those of --lengths do",
    )
    evaluate.add_argument(
        "--evaluator",
        metavar="MODEL",
        help="model or adapter that says which tokens those are: the same one for all models that are to be compared; "
        "default: the model itself",
    )
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of RULER at each of --lengths, by lm-eval (pip install 'hf-longlora[eval]'): niah_single_1, "
        "niah_multikey_2, niah_multikey_3, vt, cwe, fwe, or ruler for them all",
    )
    evaluate.add_argument(
        "--trials", type=int, default=100, help="texts of each of --tasks at each length; RULER's own number is 500"
    )
    evaluate.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="give tasks' texts as a user's message; default: if the tokenizer has a template",
    )
    evaluate.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights")
    evaluate.add_argument("--device", help="cuda, cpu, ...; default: a GPU if there is one")
    evaluate.add_argument("--output-dir", default="longlora-evaluation", help="where evaluation.json and plots go")
    evaluate.set_defaults(run=run, parser=evaluate, after_interruption="What had been measured whole is written.")


def run(options: argparse.Namespace) -> None:
    from peft import PeftModel

    from ..evaluation.plots import no_plots
    from ..evaluation.ruler import check_tasks, require_lm_eval
    from ..evaluation.scoring import vocabulary_size
    from ..evaluation.windows import as_token_ids
    from ..hub.card import base_name, weights_sha256
    from .data import load_documents, texts_of

    tasks = check_tasks(options.tasks) if options.tasks else []
    _check_asked(options)
    if tasks:
        require_lm_eval(tasks)
    out = Path(options.output_dir)
    check_writable(out)
    missing = no_plots()
    if missing is not None:
        print(f"Tables alone: {missing}", file=sys.stderr)
    splits = load_documents(options.documents) if options.documents else None
    model, tokenizer = load(options.model, options.dtype, options.device)
    _say_reach(model, options)
    documents = None
    if splits is not None:
        documents = as_token_ids(texts_of(splits, tokenizer), tokenizer, vocabulary_size(model))
    measured = weights_sha256(options.model) if isinstance(model, PeftModel) else None
    results: dict[str, Any] = {"model": base_name(options.model), "adapter_sha256": measured}
    # Of this machine's files the names alone: a card is published.
    names = [Path(name).name if Path(name).exists() else name for name in options.documents or ()]
    asked = _on_made_texts(model, tokenizer, tasks, options)
    earlier = _earlier(out, options, results, {*asked, *_of_documents(options)}, names)
    for measure, lengths, trials in asked.values():
        # A text too short for what it is to hide is refused now, not after an hour of windows.
        measure(lengths=min(lengths), trials=min(trials, 1), progress=False)
    try:
        if documents is not None:
            results |= {"documents": names} | _on_documents(model, documents, options)
            if options.long_ppl is not None:
                results["long_ppl"] = _long_ppl(model, documents, options)
        for name, (measure, lengths, trials) in asked.items():
            results[name] = measure(lengths=lengths, trials=trials)
    finally:  # what comes later may not fit the memory, or not be waited for
        if len(results) > 2:
            _report(results, earlier, out, _extension(model), plots=missing is None)


def _check_asked(options: argparse.Namespace) -> None:
    if not (options.documents or options.tasks or options.passkey or options.needles):
        raise ValueError("nothing to measure: give --documents, --passkey, --needles or --tasks")
    if options.long_ppl is not None and not (options.documents and max(options.lengths) > options.long_ppl):
        raise ValueError(f"--long-ppl needs --documents, and a length above its {options.long_ppl:,} tokens")
    if options.evaluator is not None and options.long_ppl is None:
        raise ValueError("--evaluator is for --long-ppl, which isn't asked for")
    if not options.documents:
        refuse_idle(options, ["--stride", "--max-windows", "--group-size"], "for --documents, which aren't given")
    if not (options.documents or options.tasks):
        refuse_idle(options, ["--batch-size"], "for --documents or --tasks, which aren't given")
    if not (options.passkey or options.needles):
        refuse_idle(options, ["--depths", "--retrieval-lengths"], "for --passkey or --needles, which aren't asked for")
    if not options.tasks:
        refuse_idle(options, ["--trials", "--chat-template"], "for --tasks, which aren't given")
    if options.dense_only:
        refuse_idle(options, ["--group-size"], "the pattern of training, which --dense-only leaves out")
    if options.device is not None:
        check_device(options.device)


def _earlier(
    out: Path, options: argparse.Namespace, results: dict[str, Any], asked: Collection[str], documents: list[str]
) -> dict[str, Any]:
    """What has been measured of the same weights before, and stays in the folder beside what is `asked` for now.

    Args:
        out: The folder.
        options: The command's.
        results: The model's name, and the SHA-256 of its adapter's weights.
        asked: What is measured now.
        documents: The names of those that it is measured on.

    Raises:
        ValueError: for a folder of another model or its run, or one whose results would be lost.
    """
    from ..hub.card import EVALUATION_NAME, weights_sha256

    model, measured, file = options.model, results["adapter_sha256"], out / EVALUATION_NAME
    taken = any((out / name).is_file() for name in ("adapter_config.json", "config.json", "trainer_state.json"))
    own = out.is_dir() and Path(model).is_dir() and out.samefile(model)
    if taken and not own and (measured is None or weights_sha256(out) != measured):
        raise ValueError(
            f"{out} holds a model or a run, whose card and report take the results that lie beside them, and "
            f"{model} is another model: give another --output-dir"
        )
    try:
        found = (json.loads(file.read_text()) if file.is_file() else None) or {}
        weights = {name: found.get(name) for name in results} if found else results
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, or give another --output-dir") from error
    if measured is not None and weights["adapter_sha256"] == measured:
        others = documents and found.get("documents") != documents  # the names would be those of its LongPPL as well
        return {name: value for name, value in found.items() if not (others and name == "long_ppl")}
    if own and measured is not None:  # of the adapter before it was trained on
        return {}
    if weights != results:
        raise ValueError(f"{file} is of other weights ({weights['model']}): give another --output-dir")
    # Whether the weights of a whole model are those of its name then is not known.
    if lost := [name for name in found if name not in asked and name not in results]:
        raise ValueError(
            f"{file} has {', '.join(lost)} of {model}, which would be lost: ask for all in one, or give another "
            "--output-dir"
        )
    return {}


def _of_documents(options: argparse.Namespace) -> list[str]:
    """What is measured on documents, as evaluation.json calls it."""
    always = ["documents", "perplexity", "positions", "far_context"] if options.documents else []
    return always if options.long_ppl is None else [*always, "long_ppl"]


def _say_reach(model: Any, options: argparse.Namespace) -> None:
    """Print which lengths the model, with its adapter, does not reach; nothing where its config does not say."""
    from ..modules import base_model
    from ..rope import find_rope, readings

    config = base_model(model).config
    if find_rope(config) is None:
        return
    reached = max(longest for _, longest in readings(config))
    beyond = sorted({length for length in (*options.lengths, *(options.retrieval_lengths or ())) if length > reached})
    if beyond:
        lengths = ", ".join(f"{length:,}" for length in beyond)
        print(f"{options.model} reaches {reached:,} tokens: at {lengths} it is measured beyond that")


def _on_documents(model: Any, documents: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity by length, dense and as trained, and loss by position, dense."""
    from ..attention import S2AttentionConfig, set_s2_attention
    from ..evaluation import compare_attention, far_context, loss_by_position, perplexity_by_length
    from ..evaluation.compare import trained_attention, trained_window

    windows = {"max_windows": options.max_windows, "batch_size": options.batch_size}
    dense_only = options.dense_only
    if not dense_only and options.group_size is None:
        window = trained_window(model)
        dense_only = window is not None or trained_attention(model) is None
        if window is not None:
            print(f"{options.model} was trained in windows of {window:,} tokens: dense is as it was trained")
        elif dense_only:
            print(f"{options.model} doesn't say how it was trained: dense alone (--group-size has groups beside it)")
    if dense_only:
        records = {"dense": perplexity_by_length(model, documents, options.lengths, options.stride, **windows)}
    else:
        try:
            set_s2_attention(model)
        except ValueError as error:
            raise ValueError(f"{error} With --dense-only it can be evaluated all the same.") from error
        attention = trained_attention(model) or S2AttentionConfig()
        if options.group_size is not None:
            attention = replace(attention, group_size=options.group_size)
        how = {"attention": attention, "name": _pattern(attention, model), "stride": options.stride}
        records = compare_attention(model, documents, options.lengths, **how, **windows)
    longest = max(options.lengths)
    # Buckets of positions, each twice as long as the one before, down to a 64th of the length.
    edges = [0, *sorted({longest // 2**i for i in range(7) if longest // 2**i > 1})]
    positions = loss_by_position(model, documents, longest, buckets=edges, **windows)
    return {"perplexity": records, "positions": positions, "far_context": far_context(positions)}


def _long_ppl(model: Any, documents: Sequence[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """LongPPL at the lengths above the short context, with the name of who found the key tokens."""
    from ..evaluation import long_perplexity
    from ..hub.card import base_name

    evaluator = load(options.evaluator, options.dtype, options.device)[0] if options.evaluator else None
    lengths = [length for length in options.lengths if length > options.long_ppl]
    how = {"short": options.long_ppl, "max_windows": options.max_windows, "batch_size": options.batch_size}
    records = long_perplexity(model, documents, lengths, evaluator=evaluator, **how)
    return [record | {"evaluator": base_name(options.evaluator)} for record in records]


def _on_made_texts(
    model: Any, tokenizer: Any, tasks: list[str], options: argparse.Namespace
) -> dict[str, tuple[Any, list[int], int]]:
    """What is measured on texts that are made for it: how, at which lengths, and on how many texts."""
    from ..evaluation import multi_needle_accuracy, passkey_accuracy, ruler_accuracy

    asked: dict[str, tuple[Any, list[int], int]] = {}
    for name, accuracy in (("passkey", passkey_accuracy), ("needles", multi_needle_accuracy)):
        if trials := getattr(options, name):
            measure = partial(accuracy, model, tokenizer, depths=options.depths)
            asked[name] = measure, options.retrieval_lengths or options.lengths, trials
    if tasks:
        how = {"batch_size": options.batch_size, "chat_template": options.chat_template}
        asked["ruler"] = partial(ruler_accuracy, model, tokenizer, tasks=tasks, **how), options.lengths, options.trials
    return asked


def _pattern(asked: Any, model: Any) -> str:
    """What to call a pattern that was asked for: "as trained" if it is that."""
    from ..evaluation.compare import AS_TRAINED, trained_attention, trained_window

    if asked == trained_attention(model) and trained_window(model) is None:
        return AS_TRAINED
    return f"groups of {asked.group_size:,}, {asked.sink_tokens} sink tokens"


def _extension(model: Any) -> dict[str, int]:
    """From what length to what length a LONGLORA adapter extends its base, as `plot_perplexity` takes it."""
    from ..rope import reach
    from ..tuner import LongLoraConfig

    config = getattr(model, "active_peft_config", None)
    if not isinstance(config, LongLoraConfig) or config.scaling is None or config.base_scaling is None:
        return {}
    return {"base_length": reach(config.base_scaling, config.base_length)[1], "train_length": config.scaling.length}


def _report(
    results: dict[str, Any], earlier: dict[str, Any], out: Path, extension: dict[str, int], plots: bool
) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation import plot_perplexity, plot_positions, plot_retrieval
    from ..evaluation.tables import RETRIEVAL, perplexity_of, sections
    from ..hub import refresh_card
    from ..hub.card import EVALUATION_NAME
    from ..trainer import update_report

    name, file = results["model"], out / EVALUATION_NAME
    console = Console()
    for section in sections(perplexity_of(results), results):
        head, rows = section.table
        shown = Table(*head)
        for row in rows:
            shown.add_row(*row)
        print(f"{section.title}:")
        console.print(shown)
        if section.note:
            print(section.note)
    if "far_context" in results:
        print(results["far_context"])
    out.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".json.tmp")  # on a full disk the results of before are whole
    partial.write_text(json.dumps(earlier | results, indent=2))  # what else was measured of the same weights stays
    written = [partial.replace(file)]
    if plots and "perplexity" in results:
        records, title = results["perplexity"], f"{name}: perplexity by context length"
        written.append(plot_perplexity(records, out / "perplexity.png", title=title, **extension))
        records, title = {"dense": results["positions"]}, f"{name}: loss by position"
        written.append(plot_positions(records, out / "positions.png", title=title))
    for kind in (kind for kind in RETRIEVAL if plots and kind in results):
        title = f"{name}: {RETRIEVAL[kind].lower()}"
        written.append(plot_retrieval(results[kind], out / f"{kind}.png", title=title))
    if (out / "trainer_state.json").is_file():
        written.append(update_report(out))  # of the run that has ended there
    if (out / "adapter_config.json").is_file() and refresh_card(out):
        written.append(out / "README.md")
    print(f"Written to {out}: {', '.join(path.name for path in written)}")


def load(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """A model, or an adapter on its base, on its device, and its tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..hub.export import base_of, causal_adapter, own_tokenizer
    from ..lookup import read_config
    from ..tuner.stored import fit_vocabulary

    adapter = causal_adapter(name)  # none of a model, or a name that loading will refuse
    # A config that can't be had says why.
    base, revision, _ = (name, None, read_config(name)) if adapter is None else base_of(name, adapter)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, revision=revision)
    own = None if adapter is None else own_tokenizer(name)
    tokenizer = AutoTokenizer.from_pretrained(base, revision=revision) if own is None else own
    if adapter is not None:
        fit_vocabulary(model, adapter, 0 if own is None else len(own))
        model = PeftModel.from_pretrained(model, name)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, tokenizer
