"""What is had from the Hub by name, and why it can't be had, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import AutoConfig
from transformers.utils import has_file
from transformers.utils.peft_utils import find_adapter_config_file

ORIGINAL_NAME = "trainable_params.bin"
"""Where the original LongLoRA keeps embeddings and norms, beside a plain LoRA."""


def read_config(name: str, **options: Any) -> Any:
    """The config of a model, by name or path, and nothing else of it.

    Raises:
        OSError: if there is none.
        ValueError: if it is an adapter's name.
    """
    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if (adapter := adapter_values(name)) is not None:
            base = adapter.get("base_model_name_or_path") or "which it does not name"
            raise ValueError(f"{name} is an adapter and no model: give its base, {base}") from error
        if isinstance(error, ValueError):
            raise
        where = "" if Path(name).is_dir() else " is no folder here, and"
        raise OSError(f"the model {name}{where} can't be had: {reason(error)}") from error


def refuse_adapter(name: str) -> None:
    """Raise a `ValueError` if the name or path of a model to be trained is an adapter's."""
    if adapter_values(name) is not None:
        raise ValueError(
            f"{name} is an adapter, and training starts from a model. Merge it (hf-longlora merge), or go on with it "
            "in Python: LongLoraSFTTrainer takes PeftModel.from_pretrained(base, adapter, is_trainable=True)."
        )


def refuse_adapted_base(base: str, adapter: str) -> None:
    """Raise a `ValueError` if beside an adapter's base lies another adapter, which transformers would load with it."""
    if adapter_values(base) is not None:
        raise ValueError(
            f"{base}, the base of {adapter}, holds an adapter itself, which would be loaded with it: move its "
            "adapter_config.json and adapter_model.safetensors elsewhere, or name the base that is meant."
        )


def adapter_values(name: str) -> dict[str, Any] | None:
    """What the adapter_config.json of a name or path says; `None` if it has none, or can't be had.

    Raises:
        ValueError: if it is damaged, or of a checkpoint of the original LongLoRA.
    """
    try:
        file = find_adapter_config_file(name)
    except OSError:  # no such name: whoever reads its config says so
        return None
    if file is None:
        return None
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the adapter_config.json of {name} is not valid: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the adapter_config.json of {name} is not valid: it holds {values!r:.80}")
    if values.get("peft_type") == "LORA" and has_file(name, ORIGINAL_NAME):
        raise ValueError(
            f"{name} is a checkpoint of the original LongLoRA: its embeddings and norms are in {ORIGINAL_NAME}, which "
            "PEFT does not read, and its RoPE is in no file. Make it an adapter first: "
            f"hf-longlora import {name} OUT --target-length N, the length it was trained at."
        )
    return values


def reason(error: BaseException) -> str:
    """What the Hub answered, and what to do about it, if an error came of an answer; else the error's own words."""
    answer = http_error(error)
    status = 0 if answer is None else answer.response.status_code
    if isinstance(answer, GatedRepoError):
        why = ": access to this repository has to be asked for on its page, and your token has none"
    elif isinstance(answer, RepositoryNotFoundError) or status in (401, 403):
        why = ": there is no such repository, or "
        why += (
            "it is private and you are not logged in"
            if get_token() is None
            else "your token is not valid or may not read it"
        )
        why += " (`hf auth login`, or HF_TOKEN)"
    elif status >= 500:
        why = "; try again later"
    elif any(isinstance(cause, HFValidationError) for cause in causes(error)):
        return "there is no such folder, and no repository of the Hub is called so"
    else:  # a file that is not there, a revision
        return str(error).strip() or type(error).__name__
    return f"the Hub answers {status}{why}"


def http_error(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's answer behind an error, if there was one."""
    return next((cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)


def causes(error: BaseException) -> list[BaseException]:
    """The error and its causes: libraries wrap the Hub's errors."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain
