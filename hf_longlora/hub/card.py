"""The model card of an adapter: what was done to which base, what it scored, how to load it. Only what is known."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils.sha import sha_fileobj
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import cached_file, logging

from ..evaluation.tables import RETRIEVAL, Records, Section, perplexity_of, sections
from ..rope import ABF, reach, rope_factor, type_over
from ..tuner import LongLoraConfig
from .run import STAGES, read_facts, stage_cells

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("card.md")
TAGS = ("longlora", "hf_longlora", "long-context", "lora", "transformers")
MARK = "<!-- Written by hf_longlora, and written anew when more is known. Without this line it stays as it is. -->"
EVALUATION_NAME = "evaluation.json"
PLOT_NAME = "perplexity.png"


def adapter_card(
    config: LongLoraConfig,
    *,
    name: str,
    base_model: str | None = None,
    perplexity: Mapping[str, Mapping[str, Records]] | None = None,
    retrieval: Mapping[str, Records] | None = None,
    ruler: Records = (),
    long_ppl: Records = (),
    training: Mapping[str, Any] | None = None,
    about: str = "",
    plot: str | None = None,
    dataset: str | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
) -> ModelCard:
    """The card of a trained LONGLORA adapter.

    Args:
        config: The adapter's, as saved.
        name: The adapter's name, as in `user/name`.
        base_model: The base's name on the Hub; a folder's name if it isn't there.
        perplexity: For each text, what `compare_attention` returned (`"dense"`, `"as trained"`, or further names).
        retrieval: What `passkey_accuracy` returned as `"passkey"`, `multi_needle_accuracy` as `"needles"`.
        ruler: What `ruler_accuracy` returned.
        long_ppl: What `long_perplexity` returned, with the `evaluator`'s name if it is not the model itself.
        training: Facts to list as they are: data, tokens, hardware, time.
        about: A paragraph for the top.
        plot: The picture of the perplexities, a file beside the card.
        dataset: The training data's name on the Hub.
        tags: Beside our own.
        license: Of the adapter, a Hub identifier.

    Raises:
        ValueError: if the adapter has not been resolved, that is, never put on a model.
    """
    if not config.resolved:
        raise ValueError("The adapter's config is not resolved: put it on a model, or load it from a saved adapter.")
    perplexity, training = perplexity or {}, training or {}
    others: dict[str, Records] = {**(retrieval or {}), "ruler": ruler, "long_ppl": long_ppl}
    measured = [_section(section) for section in sections(perplexity, others)]
    run: Any = config.trained
    numbers = range(len(run.stages) if run else 0)
    stages, kinds = [stage_cells(run, number) for number in numbers], {run.pattern(number).kind for number in numbers}
    if plot:
        measured.insert(len(perplexity), f"![Perplexity by context length]({plot})")
    title = name.rpartition("/")[2]
    data = ModelCardData(
        library_name="peft",
        base_model=base_model if on_hub(base_model) else None,
        datasets=[dataset] if dataset else None,
        pipeline_tag="text-generation",
        license=license,
        tags=[*TAGS, *(tag for tag in tags if tag not in TAGS)],
        model_name=name,
        eval_results=_results(perplexity, others) or None,
    )
    text = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=MARK,
        name=name,
        title=title,
        about=about.strip(),
        summary=_summary(config, base_model),
        schedule=_section(Section("Schedule", (list(STAGES), stages), "")) if stages else "",
        kinds=kinds & {"windows", "pose"},
        measured=measured,
        perplexity=perplexity,
        retrieval=retrieval,
        ruler=ruler,
        training=training,
        base_model=base_model or "the base",
        revision=f', revision="{config.revision}"' if config.revision and base_model else "",
        max_length=None if config.scaling is None else config.scaling.length,
        dynamic=config.scaling is not None and config.scaling.rope_type == "dynamic",
    )
    return ModelCard(str(text).rstrip() + "\n")


def folder_card(
    folder: str | Path, *, name: str | None = None, base_model: str | None = None, **options: Any
) -> ModelCard:
    """The card of a saved adapter, with what `hf-longlora evaluate --output-dir` has left beside it.

    An evaluation of another model, or of the adapter before it was trained on, is left out with a warning.

    Args:
        folder: Holds `adapter_config.json`, and `run.json`, `evaluation.json` and `perplexity.png` if there are such.
        name, base_model, options: As for `adapter_card`; by default the folder's name, and what the config says.
    """
    folder = Path(folder)
    values = json.loads((folder / CONFIG_NAME).read_text())
    config: Any = LongLoraConfig.from_peft_type(**values)
    evaluation = read_evaluation(folder)
    records = evaluation.get("perplexity")
    return adapter_card(
        config,
        name=name or folder.absolute().name,
        base_model=base_model or base_name(config.base_model_name_or_path),
        perplexity=perplexity_of(evaluation),
        retrieval={kind: evaluation[kind] for kind in RETRIEVAL if evaluation.get(kind)},
        ruler=evaluation.get("ruler", ()),
        long_ppl=evaluation.get("long_ppl", ()),
        training=read_facts(folder),
        plot=PLOT_NAME if records and (folder / PLOT_NAME).is_file() else None,
        **options,
    )


def refresh_card(folder: str | Path, name: str | None = None) -> bool:
    """Write the card of a saved LONGLORA adapter with what is known by now, and with its name (that on the card).

    Returns whether it was: not if someone has made the card his own (it lacks our mark), or the adapter is of another
    type.
    """
    file = Path(folder, "README.md")
    data = ModelCardData()
    if file.is_file():
        card = ModelCard.load(file)
        if MARK not in card.text:
            return False
        data, name = card.data, name or card.data.model_name
    if json.loads(Path(folder, CONFIG_NAME).read_text())["peft_type"] != "LONGLORA":
        return False
    dataset = data.datasets[0] if data.datasets else None
    folder_card(folder, name=name, tags=data.tags or (), dataset=dataset, license=data.license).save(file)
    return True


def has_own_card(api: HfApi, repo_id: str, revision: str | None = None) -> bool:
    """Whether a repository has a card that someone has made his own: it has a text, and lacks our mark."""
    with tempfile.TemporaryDirectory() as folder:  # not of the cache, which answers in a server's place
        try:
            file = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
        except EntryNotFoundError:
            return False
        text = ModelCard.load(file).text
    return bool(text.strip()) and MARK not in text


def read_evaluation(folder: str | Path) -> dict[str, Any]:
    """What `hf-longlora evaluate` has left in a folder; nothing, and a warning, if it measured other weights."""
    file = Path(folder, EVALUATION_NAME)
    if not file.is_file():
        return {}
    results = json.loads(file.read_text())
    if results.get("adapter_sha256") == weights_sha256(folder):
        return results
    logger.warning(
        f"{file} is of other weights ({results.get('model')}) than lie beside it, and left out. To have theirs: "
        f"hf-longlora evaluate {folder} --output-dir {folder} ..."
    )
    return {}


def weights_sha256(adapter: str | Path) -> str | None:
    """SHA-256 of an adapter's weights, by which the Hub lists the file, too; `None` of a folder without such.

    Unlike a path or a name, it stays with an adapter that is moved or published, and not with one trained on.
    """
    file = cached_file(str(adapter), SAFETENSORS_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    with open(file, "rb") as weights:
        return sha_fileobj(weights).hex()


def base_name(name_or_path: str | None) -> str | None:
    """A base's name as others may read it: a folder of this machine by its own name alone."""
    if not name_or_path:
        return None
    return Path(name_or_path).absolute().name if Path(name_or_path).is_dir() else name_or_path


def on_hub(name: str | None) -> bool:
    """Whether a name can be one on the Hub, `user/name`."""
    return name is not None and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _results(perplexity: Mapping[str, Mapping[str, Records]], others: Mapping[str, Records]) -> list[EvalResult]:
    """For the metadata: dense perplexity, the share of passkeys found over all depths, tasks' accuracy; by length."""

    def result(kind: str, dataset: str, metric: str, what: str, length: int, value: float) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=f"{what} at {length} tokens",
            metric_value=round(value, 4),
        )

    found = [
        result(text, text, "perplexity", "perplexity", record["length"], float(record["perplexity"]))
        for text, records in perplexity.items()
        for record in records.get("dense", ())
    ]
    for kind, title in RETRIEVAL.items():
        shares: dict[int, list[float]] = {}
        for record in others.get(kind, ()):
            shares.setdefault(record["length"], []).append(float(record["accuracy"]))
        name = title.lower()
        found += [result(kind, name, "accuracy", name, length, sum(s) / len(s)) for length, s in shares.items()]
    for record in others.get("ruler", ()):
        task, length, accuracy = record["task"], record["length"], float(record["accuracy"])
        found.append(result("ruler", f"RULER ({task})", "accuracy", task, length, accuracy))
    return found


def _summary(config: LongLoraConfig, base_model: str | None) -> str:
    of = f" for `{base_model}`" if base_model else ""
    lines = [f"A [LongLoRA](https://arxiv.org/abs/2309.12307) adapter{of}."]
    scaling, base = config.scaling, config.base_scaling
    if scaling is not None and base is not None:
        kind, factor = type_over(scaling, base), rope_factor(scaling, base, config.base_length)
        theta = f" (`rope_theta` {scaling.parameters['rope_theta']:.6g})" if kind == ABF else ""
        lines.append(
            f"It extends the context from {reach(base, config.base_length)[1]:,} to {scaling.length:,} tokens: "
            f"RoPE type `{kind}`{theta}, factor {factor:g} over the length the base was first trained at. "
            "The scaling is part of the adapter and comes back when it is loaded."
        )
    lines.append(f"Trained: {', '.join(_trained(config))}.")
    return " ".join(lines)


def _trained(config: LongLoraConfig) -> list[str]:
    targets, ranks = config.target_modules or (), config.rank_pattern or {}
    if isinstance(targets, str):
        names = {targets}
    else:
        names = {_last(name) for name in targets if config.embedding_rank is None or name not in ranks}
    names |= {_last(name.removesuffix(".weight")) for name in config.target_parameters or ()}
    kind = "DoRA" if config.use_dora else "LoRA"
    on = ", ".join(f"`{name}`" for name in sorted(names))
    trained = [f"{kind} (r = {config.r}, alpha = {config.lora_alpha}) on {on}"]
    if config.train_norms:
        trained.append("norms")
    if config.trainable_token_indices is not None:
        trained.append("embeddings of some tokens")
    elif config.train_embeddings:
        rank = config.embedding_rank
        trained.append("embeddings" if rank is None else f"embeddings by LoRA (r = {rank})")
    return trained


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _section(section: Section) -> str:
    head, rows = section.table
    lines = [f"## {section.title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    note = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", section.note)
    return "\n".join([*lines, *(["", note] if note else [])])
