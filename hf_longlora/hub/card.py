"""The model card of an adapter: what was done to which base, what it scored, how to load it. Only what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..rope import RopeScaling, reach, rope_factor
from ..tuner import LongLoraConfig

Records = Sequence[Mapping[str, Any]]

CITATION = """```bibtex
@inproceedings{chen2024longlora,
  title     = {{LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models}},
  author    = {Yukang Chen and Shengju Qian and Haotian Tang and Xin Lai and Zhijian Liu and Song Han and Jiaya Jia},
  booktitle = {International Conference on Learning Representations},
  year      = 2024
}
```"""


def adapter_card(
    config: LongLoraConfig,
    *,
    name: str,
    base_model: str,
    perplexity: Mapping[str, Mapping[str, Records]] | None = None,
    training: Mapping[str, Any] | None = None,
    about: str = "",
    license: str | None = None,
) -> ModelCard:
    """The card of a trained LONGLORA adapter.

    Args:
        config: The adapter's, as saved: RoPE, what is trained, and the schedule that the trainer wrote.
        name: The adapter's name, as in `user/name`.
        base_model: The base's name on the Hub.
        perplexity: For each dataset, what `compare_attention` returned (`"dense"`, `"as trained"`, or further names).
        training: Facts to list as they are: data, tokens, hardware, time.
        about: A paragraph for the top.
        license: Of the adapter, a Hub identifier.

    Returns:
        A card whose metadata the Hub takes (`card.validate()`), `card.save(path)` writes it.

    Raises:
        ValueError: if the adapter has not been resolved, that is, never put on a model.
    """
    if not config.resolved:
        raise ValueError("The adapter's config is not resolved: put it on a model, or load it from a saved adapter.")
    perplexity = perplexity or {}
    data = ModelCardData(
        library_name="peft",
        base_model=base_model,
        pipeline_tag="text-generation",
        license=license,
        tags=["longlora", "hf_longlora", "long-context", "lora", "transformers"],
        model_name=name.rpartition("/")[2],
        eval_results=_eval_results(perplexity) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        about.strip(),
        _summary(config, base_model),
        _schedule(config.schedule),
        *(_perplexity(dataset, records) for dataset, records in perplexity.items()),
        _facts(training or {}),
        _loading(name, base_model, config),
        _limits(perplexity),
        f"## Citation\n\nThe method is LongLoRA ([arXiv 2309.12307](https://arxiv.org/abs/2309.12307)).\n\n{CITATION}",
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n")


def _eval_results(perplexity: Mapping[str, Mapping[str, Records]]) -> list[EvalResult]:
    """Dense perplexity at each length: what a user of the adapter gets."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="perplexity",
            metric_name=f"perplexity at {record['length']} tokens",
            metric_value=round(float(record["perplexity"]), 4),
        )
        for dataset, records in perplexity.items()
        for record in records.get("dense", ())
    ]


def _summary(config: LongLoraConfig, base_model: str) -> str:
    trained = [f"LoRA (r = {config.r}, alpha = {config.lora_alpha}) on the attention projections"]
    trained += [what for what, on in (("norms", config.train_norms), ("embeddings", config.train_embeddings)) if on]
    lines = [f"A [LongLoRA](https://arxiv.org/abs/2309.12307) adapter for `{base_model}`."]
    if config.rope is not None and config.base_rope is not None:
        scaling, base = RopeScaling.from_dict(config.rope), RopeScaling.from_dict(config.base_rope)
        lines.append(
            f"It extends the context from {reach(base)[1]:,} to {reach(scaling)[1]:,} tokens: RoPE type "
            f"`{scaling.rope_type}`, factor {rope_factor(scaling):g} over the length the base was first trained at. "
            "The scaling is part of the adapter and comes back when it is loaded."
        )
    lines.append(f"Trained: {', '.join(trained)}.")
    return " ".join(lines)


def _schedule(schedule: Mapping[str, Any] | None) -> str:
    if not schedule:
        return ""
    lines = ["## Schedule", "", "| stage | tokens | steps | attention | group | a dense step each |", "|---" * 6 + "|"]
    stages = zip(schedule["stages"], schedule["group_sizes"], strict=True)
    for number, (stage, group_size) in enumerate(stages, start=1):
        dense = stage["attention"] == "dense"
        every = schedule["dense_every"] if stage["dense_every"] is None else stage["dense_every"]
        cells = ("dense", "-", "-") if dense else ("shifted sparse", f"{group_size:,}", str(every or "never"))
        lines.append(f"| {number} | {stage['max_length']:,} | {stage['max_steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _perplexity(dataset: str, records: Mapping[str, Records]) -> str:
    lengths = sorted({record["length"] for rows in records.values() for record in rows})
    lines = [f"## Perplexity on {dataset}", ""]
    lines.append("| model | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |")
    lines.append("|---" * (len(lengths) + 1) + "|")
    for name, rows in records.items():
        found = {row["length"]: f"{row['perplexity']:.2f}" for row in rows}
        lines.append(f"| {name} | " + " | ".join(found.get(length, "") for length in lengths) + " |")
    return "\n".join(lines)


def _facts(training: Mapping[str, Any]) -> str:
    return (
        "\n".join(["## Training", "", *(f"- {what}: {value}" for what, value in training.items())]) if training else ""
    )


def _loading(name: str, base_model: str, config: LongLoraConfig) -> str:
    return f"""## Use

```python
import hf_longlora  # registers the adapter type; pip install hf-longlora
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(base, "{name}")
```

Attention is dense at inference. For programs without `hf_longlora`, such as vLLM, merge it once:

```python
model.merge_and_unload().save_pretrained("merged")  # config.json has the scaled RoPE
```

Without `hf_longlora`, PEFT refuses to load the adapter rather than run it with an unscaled RoPE."""


def _limits(perplexity: Mapping[str, Mapping[str, Records]]) -> str:
    if not perplexity:
        return (
            "## Limits\n\nThis adapter has not been evaluated: measure it on text like yours (`hf-longlora evaluate`)."
        )
    return (
        "## Limits\n\nPerplexity is measured on the texts named above, up to the lengths shown, with the last tokens "
        "of sliding windows scored. It says little about retrieval, reasoning over long texts, or other domains."
    )
