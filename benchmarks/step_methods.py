"""Methods of the bench of a training step (`train_step`): what their names say, and the model and trainer of each."""

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""What sets a model apart from Llama 3: 8 key/value heads, a vocabulary of 128,256, theta 500,000."""

QWEN3_8B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "max_position_embeddings": 40_960,
}
"""Qwen3-8B as its config says it, for `Qwen3Config`."""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
OPTIONS = ("cudnn", "flash", "fa3", "fa4", "liger", "casts", "compile", "tile", "selective", "offload", "qlora")
OURS = {"casts", "compile", "tile"}
"""Options of our trainer alone."""


@dataclass(frozen=True)
class Method:
    """What a name like `ours-2048+liger` says."""

    name: str
    base: str
    group: str
    options: frozenset[str]

    @classmethod
    def parse(cls, name: str) -> "Method":
        base, *options = name.split("+")
        found = re.fullmatch(r"stock|floor|floor-qk|ours-dense|ours-(n/\d+|\d+)", base)
        unknown = {name for name in options if name not in OPTIONS and not re.fullmatch(r"kernel=.+|sinks=\d+", name)}
        if found is None or unknown:
            raise SystemExit(
                f"There is no method {name!r}: stock, floor, floor-qk, ours-dense, ours-n/4 or ours-2048, and after "
                f"each + one of {', '.join(OPTIONS)}."
            )
        ours = {name for name in options if name in OURS or "=" in name}
        wrong = ours if base == "stock" else set(options) & {"fa3", "fa4"}
        if wrong:
            raise SystemExit(f"{name!r}: {base} has no {', '.join(sorted(wrong))}.")
        return cls(name, base, found[1] or "", frozenset(options))

    @property
    def stock(self) -> bool:
        return self.base == "stock"

    @property
    def implementation(self) -> str:
        """Stock TRL's `attn_implementation`."""
        return next((f"flash_attention_{name[2]}" for name in ("fa3", "fa4") if name in self.options), "sdpa")

    @property
    def kernel(self) -> str:
        """Ours that serves bf16 on this machine; empty where there is none of ours."""
        from hf_longlora.attention.kernels import preference

        if not self.base.startswith("ours"):
            return ""
        return next((o.removeprefix("kernel=") for o in self.options if o.startswith("kernel=")), preference()[0])

    def group_at(self, length: int) -> int:
        """Tokens in a group; 0 for dense attention, and for none."""
        if self.group.startswith("n/"):
            return math.ceil(length / int(self.group[2:]))
        return int(self.group or 0)

    @property
    def sink_tokens(self) -> int:
        """First tokens of the document that all groups see; 0 where there are no groups."""
        if not self.group:
            return 0
        return next((int(option[6:]) for option in self.options if option.startswith("sinks=")), 4)

    def backend(self) -> AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if "cudnn" in self.options:
            return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        if "flash" in self.options:
            return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        return nullcontext()


# --------------------------------------------------------------------------------------------------------------------
# What is trained, and by what


def model_config(name: str, longest: int) -> Any:
    from transformers import LlamaConfig

    fields = {
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": longest,  # nothing is stretched: it would cost a step nothing
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**fields | SHAPES[name])


def build_model(name: str, longest: int, implementation: str, qlora: bool) -> Any:
    """A random model, made where it is trained: 8B in bf16 take seconds on a GPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    config = model_config(name, longest)
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    if not qlora:
        return model
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    del model
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return LlamaForCausalLM.from_pretrained(  # quantizes what it loads, and only that
        None,
        config=config,
        state_dict=state,
        quantization_config=four_bits,
        dtype=dtype,
        attn_implementation=implementation,
        device_map={"": 0 if cuda else "cpu"},
    )


def tokenizer() -> Any:
    """TRL wants one, if only for the padding token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def arguments(method: Method, folder: str) -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": 2e-5,
        "bf16": torch.cuda.is_available(),
        "activation_offloading": "offload" in method.options,
        "use_liger_kernel": "liger" in method.options,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing_kwargs": {"selective": True} if "selective" in method.options else None,
    }


def build_trainer(method: Method, model: Any, plan: Sequence[int], clock: Any, folder: str) -> Any:
    """A trainer whose step `i` sees one document of `plan[i]` tokens."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (max(plan),), generator=generator).tolist()
    common = {"model": model, "processing_class": tokenizer(), "callbacks": [clock]}
    options = arguments(method, folder)
    if method.stock:
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        adapter = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=PROJECTIONS,
            modules_to_save=["embed_tokens", "norm"],
            ensure_weight_tying=model.config.tie_word_embeddings,
            task_type="CAUSAL_LM",
        )
        return SFTTrainer(
            **common,
            args=SFTConfig(**options, max_length=max(plan), max_steps=len(plan)),
            train_dataset=Dataset.from_list([{"input_ids": ids[:length]} for length in plan]),
            peft_config=adapter,
        )

    from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer
    from hf_longlora.attention.kernels import KERNELS, Kernel
    from hf_longlora.trainer import sft_trainer

    def stage(length: int, steps: int) -> ContextStage:
        group = method.group_at(length)
        if group == 0:
            return ContextStage(length, steps, rope_type=None, attention="dense")
        return ContextStage(length, steps, rope_type=None, group_size=group, sink_tokens=method.sink_tokens)

    kernel = next((name[7:] for name in method.options if name.startswith("kernel=")), "auto")
    if method.base.startswith("floor"):
        kernel = method.base
        KERNELS[kernel] = Kernel(function=identity_qk if kernel == "floor-qk" else identity)
    if "casts" in method.options:
        sft_trainer.inputs_as_they_are = lambda layers: nullcontext()
    return LongLoraSFTTrainer(
        **common,
        args=LongLoraSFTConfig(
            **options,
            attention_kernel=kernel,
            compile_layers="compile" in method.options,
            mlp_tile=min(8192, plan[0] // 4) if "tile" in method.options else None,
            stages=[stage(length, len(list(steps))) for length, steps in groupby(plan)],
            dense_every=0,
            report=False,
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids}]),
        peft_config=LongLoraConfig(r=8, lora_alpha=16),
    )


def identity(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """No attention: `[B, H_kv, S, D]` -> `[B, S, H, D]`, each value for all its query heads."""
    values = value.transpose(1, 2).unsqueeze(3)
    return values.expand(*values.shape[:3], query.shape[1] // value.shape[1], -1).flatten(2, 3)


def identity_qk(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """No attention, but a use for query and key."""
    return identity(query, key, key + value) + query.transpose(1, 2)
