"""The configuration of a LongLoRA adapter: LoRA's, plus what is trained beside it and the RoPE it was trained with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType, TaskType
from safetensors import SafetensorError, safe_open

from ..rope import AUTO, ROPE_TYPES


@dataclass
class LongLoraConfig(LoraConfig):
    """LoRA on the attention projections, norms and embeddings trained whole, a scaled RoPE (arXiv 2309.12307, 3.3).

    Leave `target_modules` unset for the attention projections, found by module type. `rope`, `base_rope`,
    `schedule` and `resolved` are written for you; leave them alone.
    """

    task_type: str | TaskType | None = field(  # type: ignore[assignment]
        default="CAUSAL_LM", metadata={"help": "The type of task."}
    )
    r: int = field(default=8, metadata={"help": "LoRA's rank. The paper found no gain in higher ones (Table 2)."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout."})
    train_embeddings: bool = field(
        default=True,
        metadata={"help": "Train the embeddings fully. A head that is tied to them stays tied."},
    )
    train_norms: bool = field(default=True, metadata={"help": "Train every normalisation's weights fully."})
    target_length: int | None = field(
        default=None,
        metadata={"help": "Scale RoPE to reach this many tokens. None leaves RoPE as the base has it."},
    )
    rope_type: str = field(
        default=AUTO,
        metadata={
            "help": f"How RoPE is scaled: {', '.join(ROPE_TYPES)}; {AUTO}: as the base is scaled already, else yarn."
        },
    )
    rope_parameters: dict | None = field(
        default=None,
        metadata={
            "help": "Explicit RoPE parameters (with rope_type), as in the model's config, instead of rope_type."
        },
    )
    base_length: int | None = field(
        default=None,
        metadata={"help": "The length the base was trained at before any scaling, where its config doesn't say."},
    )
    rope: dict | None = field(
        default=None,
        metadata={"help": "Resolved: the RoPE this adapter runs with (hf_longlora.rope.RopeScaling as a dict)."},
    )
    base_rope: dict | None = field(
        default=None,
        metadata={"help": "Resolved: the RoPE of the base, which a base has to have for the adapter to be loaded."},
    )
    schedule: dict | None = field(
        default=None,
        metadata={"help": "The stages it was trained with, written by LongLoraSFTTrainer; for cards and evaluation."},
    )
    resolved: bool = field(
        default=False,
        metadata={"help": "Whether modules and RoPE have been resolved; they are taken as stored then."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["LONGLORA"]
        if self.target_length is not None and (not isinstance(self.target_length, int) or self.target_length < 2):
            raise ValueError(f"target_length must be a number of tokens, got {self.target_length!r}.")
        if self.base_length is not None and (not isinstance(self.base_length, int) or self.base_length < 2):
            raise ValueError(f"base_length must be a number of tokens, got {self.base_length!r}.")
        if self.rope_type not in (AUTO, *ROPE_TYPES):
            raise ValueError(f"unknown rope_type {self.rope_type!r}; supported: {AUTO}, {', '.join(ROPE_TYPES)}.")
        if self.rope_parameters is not None and not isinstance(self.rope_parameters, dict):
            raise ValueError(f"rope_parameters must be a dict, got {type(self.rope_parameters).__name__}.")
        targets = self.target_modules
        if isinstance(targets, str):
            hit = re.fullmatch(targets, "lm_head") is not None
        else:
            hit = any(name.rpartition(".")[2] == "lm_head" for name in targets or ())
        if hit:
            refuse_head("lm_head")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LongLoraConfig:
        """Load a config; if it belongs to a saved adapter, make sure first that the adapter's weights are whole.

        PEFT reads the weights only after it has changed the model. Checked here, a missing or truncated file leaves
        the model alone. A config that was saved by itself (`inference_mode` false) needs no weights.

        Raises:
            FileNotFoundError: the adapter has no weights.
            ValueError: the weights are truncated, not safetensors, or a pickle.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, LongLoraConfig) and config.inference_mode:
            download_kwargs, _, _ = cls._split_kwargs(kwargs)
            check_weights(str(pretrained_model_name_or_path), subfolder, download_kwargs)
        return config


def refuse_head(name: str) -> None:
    raise ValueError(
        f"LoRA on the output head ({name!r} in target_modules) is not supported: fused losses multiply by its weight "
        f"directly, so the adapter would never be trained. Remove it, or train the head fully with "
        f"modules_to_save=[{name!r}]."
    )


def check_weights(model_id: str, subfolder: str | None = None, download_kwargs: dict[str, Any] | None = None) -> None:
    """Raise one clear error unless `model_id` (a folder or a Hub id) has whole adapter weights in safetensors."""
    folder = os.path.join(model_id, subfolder) if subfolder else model_id
    if os.path.isdir(folder):
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if not os.path.isfile(path):
            if os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
                raise ValueError(
                    f"{os.path.join(folder, WEIGHTS_NAME)} is a pickle, which can run code when it is loaded. Save "
                    f"the adapter as {SAFETENSORS_WEIGHTS_NAME}."
                )
            raise FileNotFoundError(f"{path} is missing: the adapter's folder holds no weights.")
    else:
        try:
            path = hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **(download_kwargs or {}))
        except Exception as error:
            raise FileNotFoundError(f"{SAFETENSORS_WEIGHTS_NAME} can't be had from {model_id}: {error}") from error
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
