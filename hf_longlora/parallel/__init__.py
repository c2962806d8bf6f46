"""Sequence parallelism: one sequence over several processes, against a `torch.distributed` group.

Sparse steps send what a shard's queries see of earlier shards (halo), dense steps exchange tokens for heads. Knows
attention, and nothing of a trainer, an engine or a launcher.
"""

from .attention import ShardedSequence, s2_attention
from .model import check_rope, check_shardable, sequence_group, shard_sequences
from .shards import Shards

__all__ = [
    "ShardedSequence",
    "Shards",
    "check_rope",
    "check_shardable",
    "s2_attention",
    "sequence_group",
    "shard_sequences",
]
