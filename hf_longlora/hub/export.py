"""Portable forms of an adapter: what runs without this package, with the scaled RoPE and the right length.

| form     | what is written                                | transformers, PEFT | vLLM                           |
|----------|------------------------------------------------|--------------------|--------------------------------|
| `merged` | a whole model                                  | loads it           | serves it                      |
| `lora`   | a plain LoRA, and the base's config in `base/` | PEFT loads it      | serves it, unless norms or     |
|          |                                                |                    | embeddings were trained        |

A plain LoRA carries no RoPE: on the base as it is, it would run, and be wrong. The config in `base/` has the scaled
one, and the LoRA names that folder as its base, so that what loads a base by its name alone fails.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file, logging

from ..lookup import adapter_values, reason, refuse_adapted_base
from ..modules import meta_model
from ..rope import RopeScaling, current_rope, reach, vllm_overrides, write_length, write_rope
from ..tuner import LongLoraConfig
from ..tuner.base_rope import refuse_other_base
from ..tuner.config import check_finite
from ..tuner.stored import fit_vocabulary, trained_vocabulary
from ..values import check_one_of
from .card import on_hub

logger = logging.get_logger(__name__)

ExportForm = Literal["merged", "lora"]
BASE_FOLDER = "base"
PREFIX = "base_model.model."
"""Before each module's name in an adapter's weights."""
NOT_SERVED = ("modules_to_save", "trainable_token_indices", "use_dora")
"""Fields of a plain LoRA's config that vLLM refuses."""
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


def export_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    form: ExportForm = "merged",
    base: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> Path:
    """Write an adapter in a form that needs no `hf_longlora`: a merged model, or a plain LoRA and the base's config.

    Args:
        adapter: A LONGLORA adapter's folder, or its name on the Hub.
        output_dir: Where it goes: a new or an empty folder. Nothing is there until all is.
        form: "merged" or "lora"; what serves where is in the table above.
        base: The base model, where it is not the one that the adapter names.
        dtype: Of the merged model, or its name ("bfloat16"); "auto" is the base's.
        device: Where merging is done.

    Raises:
        ValueError: if it is no LONGLORA adapter, the base is not its base or is quantized, weights are not finite, or
            the output folder has files.
        OSError: if the adapter or the base can't be had.
    """
    check_one_of(ExportForm, form=form)
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise ValueError(f'dtype must be "auto", a torch.dtype or the name of one, such as "bfloat16", got {dtype!r}')
    source = adapter_folder(adapter)
    config = causal_adapter(str(source))
    if not isinstance(config, LongLoraConfig):
        kind = getattr(config and config.peft_type, "value", None)
        raise ValueError(f"{adapter} is an adapter of type {kind}, not LONGLORA: PEFT merges it, and it has no RoPE")
    base_name, revision, base_config = base_of(str(adapter), config, base)
    if config.base_rope is not None:
        refuse_other_base(config, current_rope(base_config))
    if form == "merged" and getattr(base_config, "quantization_config", None) is not None:
        raise ValueError(
            f"{base_name} is quantized, and merging would round what was trained to its few bits. Merge into the "
            "model that it was quantized from (base), or export a plain LoRA (form 'lora')."
        )
    tokenizer = own_tokenizer(source)
    tokens = 0 if tokenizer is None else len(tokenizer)
    with new_folder(Path(output_dir)) as out:
        if form == "merged":
            model: Any = AutoModelForCausalLM.from_pretrained(base_name, dtype=dtype, revision=revision)
            fit_vocabulary(model, config, tokens)
            model = PeftModel.from_pretrained(model.to(device), str(source))
            model.merge_and_unload(safe_merge=True).save_pretrained(out)
        else:
            _plain_lora(source, config, base_config, base_name, tokens, out, Path(output_dir), revision)
        if tokenizer is None:
            with suppress(OSError, ValueError):  # a base without one
                tokenizer = AutoTokenizer.from_pretrained(base_name, revision=revision)
        if tokenizer is not None:
            if config.scaling is not None:
                write_length(tokenizer, config.scaling)  # vLLM clips the length by it
            tokenizer.save_pretrained(out if form == "merged" else out / BASE_FOLDER)
    if overrides := _overrides(base_config, config.scaling):
        logger.warning(f"vLLM does not scale dynamic RoPE by itself, and needs{overrides}; transformers does.")
    return Path(output_dir)


def adapter_folder(adapter: str | Path, files: list[str] | None = None, model: str = "a model") -> Path:
    """The folder of an adapter; of one on the Hub `files` are downloaded, by default all but pickles and checkpoints.

    Raises:
        OSError: if there is no such adapter.
        ValueError: if the folder or repository is something else; `model` is what to call a model in its place.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            left_out = None if files else ["*.bin", "*.pt", "checkpoint-*"]
            folder = Path(snapshot_download(str(adapter), allow_patterns=files, ignore_patterns=left_out))
        except Exception as error:  # of many types: no such name, offline, no such repository
            raise OSError(f"{adapter} is no folder, and can't be had from the Hub: {reason(error)}") from error
    if not (folder / CONFIG_NAME).is_file():
        what = model if (folder / "config.json").is_file() else "something else"
        raise ValueError(f"{adapter} is no adapter but {what}: it has no {CONFIG_NAME}")
    return folder


def causal_adapter(name: str) -> PeftConfig | None:
    """The config of an adapter of any type, a LONGLORA one's with the shapes of its weights; `None` if it is none.

    Raises:
        ValueError: if it is for another task than to go on with a text, damaged, or the original LongLoRA's.
    """
    if adapter_values(name) is None:
        return None
    config = PeftConfig.from_pretrained(name)
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        auto = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task)
        other = "a model of its kind" if auto is None else f"peft.Auto{auto.__name__}.from_pretrained"
        raise ValueError(
            f"{name} is an adapter for the task {task}, and merge, export and evaluate are for causal language models "
            f"(CAUSAL_LM): load it by {other}, and merge it by merge_and_unload()"
        )
    return LongLoraConfig.from_pretrained(name) if isinstance(config, LongLoraConfig) else config


def base_of(adapter: str, config: PeftConfig, base: str | Path | None = None) -> tuple[str, str | None, Any]:
    """The name, the revision and the config of an adapter's base: the one that it names, unless another is given."""
    name, revision = str(base or config.base_model_name_or_path or ""), None if base else config.revision
    if not name:
        raise ValueError(
            f"the adapter {adapter} doesn't name its base model: write it into its adapter_config.json, as "
            "base_model_name_or_path, or pass base to merge and export"
        )
    refuse_adapted_base(name, adapter)
    try:
        return name, revision, AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"the base of {adapter}, {name}, can't be had: {reason(error)}") from error


@contextmanager
def new_folder(output_dir: Path) -> Iterator[Path]:
    """A folder beside `output_dir` that takes its place when all is written; after an error nothing is left."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is not empty; choose another folder")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=output_dir.parent, prefix=f".{output_dir.name}-"))
    try:
        partial.chmod(0o755)
        yield partial
        if output_dir.exists():
            output_dir.rmdir()
        partial.rename(output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def own_tokenizer(adapter: str | Path) -> Any:
    """The tokenizer that was saved with an adapter, a folder or a name on the Hub; `None` without one."""
    file = cached_file(str(adapter), TOKENIZER_CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
    return None if file is None else AutoTokenizer.from_pretrained(str(adapter))


def _plain_lora(
    source: Path,
    config: LongLoraConfig,
    base_config: Any,
    base_name: str,
    tokens: int,
    out: Path,
    output_dir: Path,
    revision: str | None,
) -> None:
    known = {field.name for field in fields(LoraConfig)}
    plain = {key: value for key, value in json.loads((source / CONFIG_NAME).read_text()).items() if key in known}
    plain |= {"peft_type": "LORA", "base_model_name_or_path": str((output_dir / BASE_FOLDER).resolve())}
    weights = load_file(source / SAFETENSORS_WEIGHTS_NAME)
    check_finite(weights, str(source / SAFETENSORS_WEIGHTS_NAME))
    if (head := _tied_head(weights, base_config)) is not None:
        # Told to tie a head, PEFT looks for its weight when it loads, and fails without: it is written twice, untied.
        name, weight = head
        weights[f"{PREFIX}{name}.weight"] = weight
        plain |= {"ensure_weight_tying": False, "modules_to_save": [*plain["modules_to_save"], name]}
    overrides = _overrides(base_config, config.scaling)
    generated = None
    if (rope := config.scaling) is not None:
        before, after = reach(base_config, config.base_length)[1], rope.length
        generated = _generated_length(base_name, before, after, revision)
        write_rope(base_config, rope)
    base_config.save_pretrained(out / BASE_FOLDER)
    (out / CONFIG_NAME).write_text(json.dumps(plain, indent=2))
    save_file(weights, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    trained = trained_vocabulary(meta_model(base_config), config, tokens)
    shown = {"name": output_dir.name, "overrides": overrides, "revision": revision, "generated": generated}
    _how_to_load(plain, config, weights, base_name, trained and trained[0], **shown).save(out / "README.md")


def _overrides(base_config: Any, rope: RopeScaling | None) -> str:
    """The option that vLLM needs beside the config, with a space before it; empty for most."""
    overrides = vllm_overrides(base_config, rope or current_rope(base_config))
    return f" --hf-overrides '{json.dumps(overrides)}'" if overrides else ""


def _generated_length(base_name: str, before: int, after: int, revision: str | None) -> int | None:
    """Where generation is to stop, if the base's own generation_config.json stops it at its own length."""
    try:
        own = GenerationConfig.from_pretrained(base_name, revision=revision or "main")
    except OSError:  # it has none
        return None
    return after if own.max_length == before else None


def _tied_head(weights: dict[str, torch.Tensor], base_config: Any) -> tuple[str, torch.Tensor] | None:
    """Name and weight of a head that is tied to embeddings trained whole, of which our adapter holds one copy."""
    model = meta_model(base_config)
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = weights.get(f"{PREFIX}{names[embedding]}.weight")
    if weight is None or head is None or head.weight is not embedding.weight:
        return None
    return names[head], weight.clone()


def _how_to_load(
    plain: dict[str, Any],
    config: LongLoraConfig,
    weights: dict[str, torch.Tensor],
    base_name: str,
    tokens: int | None,
    **rest: Any,
) -> ModelCard:
    """How to load a plain LoRA, with and without what vLLM refuses, or takes in some cases only."""
    refused = [key for key in NOT_SERVED if plain.get(key)]
    if tokens is not None:
        refused.append("tokens that its base has not")
    rank = max(config.r, *(plain.get("rank_pattern") or {"": 0}).values())
    if rank > SERVED_RANKS[-1]:
        refused.append(f"a rank above {SERVED_RANKS[-1]}")
    # embedding_rank's patterns leave the scaling as it is: an older vLLM is right without reading them
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if plain.get(key) and config.embedding_rank is None]
    return ModelCard.from_template(
        ModelCardData(library_name="peft", base_model=base_name if on_hub(base_name) else None),
        template_path=str(Path(__file__).with_name("plain_lora.md")),
        base=base_name,
        tokens=tokens,
        refused=refused,
        rank=min((step for step in SERVED_RANKS if step >= rank), default=rank),
        on_embeddings=any("lora_embedding_" in key for key in weights),
        patterns=patterns,
        **rest,
    )
