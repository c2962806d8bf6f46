"""Sequence parallelism in a transformers model with `attn_implementation="s2attn"`."""

from functools import partial

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from ..attention.interface import STATE
from ..attention.switch import get_s2_attention, transformers_model
from ..modules import attention_modules, sliding_windows
from ..rope import WITH_HISTORY, RopeScaling, find_rope
from .attention import ShardedSequence


def check_shardable(model_class: type, config: PreTrainedConfig) -> None:
    """Raise a `ValueError` if a model can't be given shards of its sequences, saying why.

    Its layers have to attend to the whole length, or not look at other tokens at all.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    reach = getattr(text, "max_position_embeddings", None)
    windows = set() if getattr(text, "layer_types", None) else set(sliding_windows(text)) - {None}
    kinds |= {f"a window of {window:,} tokens" for window in windows if reach is None or window < reach}
    if getattr(model_class, "_is_stateful", False):
        kinds.add("a state from token to token")
    rope = find_rope(config)
    if rope is not None:
        check_rope(rope)
    if kinds:
        raise ValueError(
            f"{model_class.__name__} has layers with {', '.join(sorted(kinds))}, which see no further than a shard of "
            "the sequence. Train it without sequence parallelism; FSDP2 and ZeRO-3 spread a large model's weights."
        )


def check_rope(rope: RopeScaling) -> None:
    """Raise a `ValueError` if a RoPE goes by the positions in a batch, which each process would find others of."""
    for parameters in (rope.rope_parameters, *rope.rope_parameters.values()):
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind in WITH_HISTORY:
            raise ValueError(
                f"RoPE of type {kind!r} has other frequencies for short sequences than for long ones, and the first "
                "shard of a long one looks short: for sequence parallelism use another rope_type (yarn, linear, abf)."
            )


def shard_sequences(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Tell the layers of a model that each process of `group` gets a shard of every row, or by `None` whole rows.

    A shard is of neighbouring tokens, in the order of ranks; all have the batch's rows, and may differ in length.
    `position_ids` are those in the document: without them transformers counts from each shard's beginning, and takes
    it for a document. Labels are to be shifted before rows are cut, and losses to be added up over the group.

    Outputs and gradients are those of one process with the whole rows. Sparse in training, dense otherwise, as
    `set_s2_attention` and `s2_attention_mode` say; every process has to run the same passes.

    Raises:
        ValueError: if the model does not use `"s2attn"`, or has layers that see no further than a shard.
    """
    get_s2_attention(model)
    inner = transformers_model(model)
    if group is not None:
        check_shardable(type(inner), inner.config)
    for _, module in attention_modules(inner):
        getattr(module, STATE).find_sequence = None if group is None else partial(ShardedSequence.find, group)


def sequence_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that `shard_sequences` has told the layers of a model of."""
    find_sequence = get_s2_attention(model).find_sequence
    return None if find_sequence is None else find_sequence.args[0]  # type: ignore[attr-defined]
