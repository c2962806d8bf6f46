"""One sequence over several processes: what the trainer needs for `sequence_parallel`.

The engine is DeepSpeed's, as accelerate and transformers run it (`sp_backend="deepspeed"`): it makes the processes'
groups, cuts batches into shards and adds up losses. The attention among the shards is ours (`hf_longlora.parallel`),
in the place of the one that it registers, which is dense.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import ParallelismConfig  # type: ignore[import-untyped]
from torch.utils.data import Sampler
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.interface import NAME
from ..parallel import check_rope, check_shardable, shard_sequences
from ..rope import RopeScaling
from ..schedule import Schedule
from .config import LongLoraSFTConfig

LAUNCH = "accelerate launch --config_file examples/accelerate_configs/zero2.yaml (or zero3.yaml) --num_processes GPUS"


def check_sequences(
    args: LongLoraSFTConfig,
    schedule: Schedule,
    ropes: Sequence[RopeScaling | None],
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    spread: bool,
) -> None:
    """Refuse `sequence_parallel` where it can't be, before anything is loaded.

    Args:
        args: The trainer's.
        schedule: The stages.
        ropes: The RoPE of each stage; `None` where it is the model's.
        config: The model's.
        model_class: The model's, if it is known.
        spread: Whether `device_map` spreads the model over the GPUs of one process.
    """
    size = args.sequence_parallel
    if size == 1:
        return
    if spread:
        raise ValueError("`device_map` has one process, `sequence_parallel` several: leave one of them out.")
    if args.world_size % size > 0 or args.world_size < size:
        raise ValueError(
            f"`sequence_parallel={size}` needs a multiple of {size} processes, and there "
            f"{'is one' if args.world_size == 1 else f'are {args.world_size}'}. Start them by {LAUNCH}."
        )
    if not started_with_deepspeed(args):
        raise ValueError(f"`sequence_parallel` goes with DeepSpeed, of any ZeRO stage: start the run by {LAUNCH}.")
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("`sequence_parallel` needs DeepSpeed: pip install 'deepspeed>=0.18.2'.")
    if any(schedule.has_windows(number) for number in range(len(schedule.stages))):
        raise ValueError('Steps in windows fit one process: set sparse="s2", or leave `sequence_parallel` out.')
    if args.compile_layers:
        raise ValueError("`compile_layers` is not for `sequence_parallel`: leave one of them out.")
    check_shardable(model_class or type(config), config)
    for rope in ropes:
        if rope is not None:
            check_rope(rope)
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % size > 0 or (kv_heads % size > 0 and size % kv_heads > 0):
        fit = [n for n in range(2, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ValueError(
            f"DeepSpeed wants {heads} heads and {kv_heads} key/value heads to divide by `sequence_parallel={size}`: "
            f"it can be one of {fit} here. (hf_longlora.parallel by itself takes any.)"
        )


def started_with_deepspeed(args: LongLoraSFTConfig) -> bool:
    """Whether a run is DeepSpeed's, by its arguments or by how it was launched."""
    return args.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def parallelism_config(size: int, processes: int) -> ParallelismConfig:
    """accelerate's configuration of sequences over `size` processes."""
    config = ParallelismConfig(sp_size=size, sp_backend="deepspeed", dp_shard_size=processes // size)
    # It lists the names it knows, where DeepSpeed takes any that is registered and that the model has.
    config.sp_handler.sp_attn_implementation = NAME  # type: ignore[union-attr]
    return config


def gradients_repeated(size: int, deepspeed: Mapping[str, Any]) -> int:
    """How many times too large gradients come out of DeepSpeed, by its configuration.

    Each process of a group has the loss of all of them, and so gradients that are added up over processes come from
    each loss: `size` times. ZeRO-3, if it scatters them, divides them by all processes, and all else by the groups.
    """
    zero = deepspeed.get("zero_optimization", {})
    return 1 if zero.get("stage") == 3 and zero.get("reduce_scatter", True) else size


class ShardedSequences(TrainerCallback):
    """Puts the attention among shards in the place of DeepSpeed's, once accelerate has had that registered."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from deepspeed.utils import groups  # type: ignore[import-not-found]

        del ALL_ATTENTION_FUNCTIONS[NAME]  # DeepSpeed's, which hides ours
        shard_sequences(kwargs["model"], groups._get_sequence_parallel_group())


class ShardableCollator:
    """Collates batches that can be cut into `size` shards: tensors `[B, S]` alone, `S` a multiple of `size`.

    Documents are told by `position_ids` and `attention_mask`; what else TRL says of packed ones is of the whole row,
    and DeepSpeed would cut it.

    Args:
        collator: The one to wrap.
        size: Shards of a sequence.
    """

    TOLD = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

    def __init__(self, collator: Callable[..., Mapping[str, Any]], size: int) -> None:
        self.collator = collator
        self.size = size

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = {key: x for key, x in self.collator(examples).items() if key not in self.TOLD}
        if "position_ids" not in batch:
            raise ValueError(
                "With `sequence_parallel` batches need `position_ids`, counted from each document's beginning: have "
                "the collator make them, as trl.trainer.sft_trainer.DataCollatorForLanguageModeling does."
            )
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        rest = -batch["input_ids"].shape[1] % self.size
        filled = {"labels": -100, "input_ids": getattr(self.collator, "pad_token_id", 0)}
        return {
            key: torch.nn.functional.pad(x, (0, rest), value=filled.get(key, 0)) if rest else x
            for key, x in batch.items()
        }


class InShards(Sampler[int]):
    """The order in which rows are read so that each step of a run sees its own.

    Each process reads batches of its own, as without shards; then those of a group go through the shards of each of
    them in turn. So the n-th row that is read is not of the n-th step where several groups share a step.

    Args:
        rows: How many there are: `batch` of each group in each micro-step, micro-step after micro-step.
        batch: Rows of a process.
        size: Processes of a group.
        groups: How many groups there are.
        done: Micro-steps that a resumed run has behind it: what it begins with is of the next.
    """

    def __init__(self, rows: int, batch: int, size: int, groups: int, done: int = 0) -> None:
        self.batch, self.size, self.groups = batch, size, groups
        self.steps = rows // (batch * groups)
        self.done = done

    def __len__(self) -> int:
        return -(-self.steps // self.size) * self.size * self.groups * self.batch

    def __iter__(self) -> Iterator[int]:
        for read in range(-(-self.steps // self.size)):
            for group in range(self.groups):
                for turn in range(self.size):
                    # past the last step nothing is trained any more, and what is read is as good as any
                    step = (self.done + read * self.size + turn) % self.steps
                    first = (step * self.groups + group) * self.batch
                    yield from range(first, first + self.batch)
