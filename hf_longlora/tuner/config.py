"""The configuration of a LongLoRA adapter: LoRA's, plus what is trained beside it and the RoPE it was trained with."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType, TaskType
from safetensors import SafetensorError, safe_open

from ..attention.config import S2AttentionConfig
from ..rope import AUTO, ROPE_TYPES, RopeScaling, check_rope_type
from ..schedule import Schedule
from ..values import check_whole

StoredShapes = dict[str, tuple[int, ...]]
"""Name in an adapter's file -> shape."""


@dataclass
class LongLoraConfig(LoraConfig):
    """LoRA on the attention projections, norms and embeddings trained whole, a scaled RoPE (arXiv 2309.12307, 3.3).

    Leave `target_modules` unset for the attention projections, found by module type. `rope`, `base_rope`,
    `schedule` and `resolved` are written for you; leave them alone.
    """

    task_type: str | TaskType | None = field(  # type: ignore[assignment]
        default="CAUSAL_LM", metadata={"help": "The type of task."}
    )
    # SmolLM2-135M, 8,192 -> 32,768 tokens, perplexity of books against r = 64: 8 +2.4%, 256 -1.6% (alpha twice the
    # rank). Without norms and embeddings +3.9%, without embeddings +3.0% (benchmarks/results/pretrained.csv).
    r: int = field(
        default=8,
        metadata={
            "help": "LoRA's rank. The paper found no gain in higher ones at 7B (Table 2); a model of 135M gains by 64."
        },
    )
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout."})
    train_embeddings: bool = field(
        default=True,
        metadata={"help": "Train the embeddings fully. A head that is tied to them stays tied."},
    )
    embedding_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train the embeddings by LoRA of this rank instead of fully: rank * (V + d) numbers for V tokens "
            "of width d instead of V * d. A head that is tied to them stays as the base has it."
        },
    )
    train_norms: bool = field(default=True, metadata={"help": "Train every normalisation's weights fully."})
    target_length: int | None = field(
        default=None,
        metadata={"help": "Scale RoPE to reach this many tokens. None leaves RoPE as the base has it."},
    )
    rope_type: str = field(
        default=AUTO,
        metadata={
            "help": f"How RoPE is scaled: {', '.join(ROPE_TYPES)}; {AUTO}: as the base is scaled already, else abf "
            "(Phi-3: longrope)."
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

    @property
    def stored_shapes(self) -> StoredShapes | None:
        """Names and shapes in the file beside it, until it is put on a model; `None` where there is none."""
        return vars(self).get("_stored_shapes")

    @property
    def scaling(self) -> RopeScaling | None:
        """`rope`, parsed; `None` where it is the base's own."""
        return None if self.rope is None else RopeScaling.from_dict(self.rope)

    @property
    def base_scaling(self) -> RopeScaling | None:
        """`base_rope`, parsed."""
        return None if self.base_rope is None else RopeScaling.from_dict(self.base_rope)

    @property
    def trained(self) -> Schedule | None:
        """The stages that it was trained with; `None` if it doesn't say."""
        return Schedule.from_dict(self.schedule) if self.schedule else None

    @property
    def trained_attention(self) -> S2AttentionConfig | None:
        """The pattern that its training ended with, by whatever kernel; `None` if it doesn't say."""
        return None if self.trained is None else replace(self.trained.attention_config(-1), kernel="auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["LONGLORA"]
        check_whole(2, none=True, target_length=self.target_length, base_length=self.base_length)
        check_whole(1, none=True, embedding_rank=self.embedding_rank)
        check_whole(1, r=self.r)
        if self.embedding_rank is not None and (not self.train_embeddings or self.trainable_token_indices is not None):
            raise ValueError(
                "embedding_rank, trainable_token_indices and train_embeddings=False are three ways to save the memory "
                "of trained embeddings; choose one."
            )
        check_rope_type(self.rope_type)
        if self.rope_parameters is not None and not isinstance(self.rope_parameters, dict):
            raise ValueError(f"rope_parameters must be a dict, got {type(self.rope_parameters).__name__}.")
        for name in ("rope", "base_rope"):
            _check_stored_rope(name, getattr(self, name))
        # PEFT takes any: of a name it trains whatever ends with one of its letters, whole MLPs among them,
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}.")
        # and with these the forward fails or is NaN.
        alpha: Any = self.lora_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"lora_alpha must be a finite number, got {alpha!r}.")
        tokens: Any = self.alora_invocation_tokens
        if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int for t in tokens)):
            raise ValueError(f"alora_invocation_tokens must be a list of token ids, got {tokens!r}.")
        if self.megatron_config is not None:  # PEFT imports whatever megatron_core names
            raise ValueError("megatron_config is not supported: LongLoRA works on transformers' models.")
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
        """Load a config; of a saved adapter with names and shapes of its weights, by the head of their file.

        PEFT reads the weights after it has changed the model. A missing, truncated or foreign file is refused before.
        A config that was saved by itself (`inference_mode` false) needs no weights.

        Raises:
            FileNotFoundError: the adapter has no weights.
            ValueError: the config is not one, or of a later version; the weights are truncated, not safetensors, or a
                pickle.
        """
        name = str(pretrained_model_name_or_path)
        try:
            config = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        except (AttributeError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"the adapter_config.json of {name} is not valid: {error}") from error
        if isinstance(config, LongLoraConfig):
            # Beside the fields, and never saved: the first weights that come are those of this config;
            vars(config)["_weights_due"] = True
            if config.inference_mode:  # their shapes are compared with the model when the adapter is put on it
                download_kwargs, _, _ = cls._split_kwargs(kwargs)
                vars(config)["_stored_shapes"] = read_shapes(name, subfolder, **download_kwargs)
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse settings of a later version. PEFT warns and drops them, and the adapter would be another one."""
        unknown = {k: v for k, v in kwargs.items() if k not in cls.__dataclass_fields__ and v}
        if kwargs.get("peft_type") == "LONGLORA" and unknown:
            raise ValueError(
                f"adapter_config.json has settings that this version does not know: {unknown}. Upgrade hf-longlora "
                "and PEFT to load the adapter."
            )
        return super().check_kwargs(**kwargs)


def _check_stored_rope(name: str, values: Any) -> None:
    """Raise a `ValueError` unless a stored RoPE can be one: the fields of `RopeScaling`, with finite numbers."""
    if values is None:
        return
    try:
        scaling = RopeScaling.from_dict(values)
        json.dumps(scaling.rope_parameters, allow_nan=False)  # raises on what is not finite
        lengths = scaling.max_position_embeddings, scaling.original_max_position_embeddings
        factors = map(scaling.parameters.get, ("rope_theta", "factor"))
        good = type(lengths[0]) is int and isinstance(scaling.rope_type, str)
        good = good and all(n is None or (type(n) is int and n > 0) for n in lengths)
        good = good and all(n is None or (type(n) is not bool and n > 0) for n in factors)
    except (AttributeError, KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{name} is no stored RoPE: {values!r}. It is written for you; leave it alone.")


def refuse_head(name: str) -> None:
    raise ValueError(
        f"LoRA on the output head ({name!r} in target_modules) is not supported: fused losses multiply by its weight "
        f"directly, so the adapter would never be trained. Remove it, or train the head fully with "
        f"modules_to_save=[{name!r}]."
    )


def read_shapes(model_id: str, subfolder: str | None = None, **download_kwargs: Any) -> StoredShapes:
    """The shapes of an adapter's weights in `model_id`, a folder or a Hub id. No weight is read.

    Raises:
        FileNotFoundError: it has none.
        ValueError: they are truncated, not safetensors, or a pickle.
    """
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
            path = hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download_kwargs)
        except Exception as error:
            raise FileNotFoundError(f"{SAFETENSORS_WEIGHTS_NAME} can't be had from {model_id}: {error}") from error
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def check_finite(weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Raise a `ValueError` if a weight of `path` is not finite."""
    for key, tensor in weights.items():
        # The sum is not finite if an element is not, at a fraction of isfinite's memory; an overflow is looked at.
        if not tensor.float().sum().isfinite() and not tensor.float().isfinite().all():
            raise ValueError(
                f"{path} is damaged or from a run that diverged: {key} has values that are not finite. Load an "
                "earlier checkpoint."
            )
