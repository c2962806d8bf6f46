"""Attention over sequences that a group of processes holds in shards, sparse and dense."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from ..attention.functional import check_tensors
from ..attention.kernels import select_kernel
from ..attention.segments import Documents, Part, Shifted, Span
from ..values import check_whole
from .exchange import Halo, Routes, linked, to_heads, to_tokens
from .shards import Shards


class ShardedSequence:
    """The rows of a batch over the processes of a group: documents, shards, and attention among them.

    It is made once for each forward (`find`), and `attend` called once for each layer, by every process alike; and so
    is the backward.

    Args:
        group: The processes; rank r holds the r-th shard of each row.
        shards: Where rows are cut.
        documents: Those of the whole rows.
    """

    def __init__(self, group: dist.ProcessGroup, shards: Shards, documents: Documents) -> None:
        self.group = group
        self.shards = shards
        self.documents = documents
        self._routes: dict[tuple[Part, torch.device], Routes] = {}

    @classmethod
    @torch.compiler.disable
    def find(
        cls,
        group: dist.ProcessGroup,
        batch_size: int,
        length: int,
        *,
        device: torch.device,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> "ShardedSequence":
        """Gather what tells the documents from all processes; arguments as of `Documents.find`, of the own shard.

        Args:
            length: Tokens of the own shard; shards may differ.
            device: Where the group sends from.
            cu_seqlens: Ends of the documents in the whole row, the same on all processes.
            position_ids: Counted from the document's beginning and not from the shard's.

        Raises:
            ValueError: on shapes that don't fit, and if a process has no token.
        """
        told = {"attention_mask": attention_mask, "position_ids": position_ids}
        for name, tensor in told.items():
            if tensor is not None and tensor.shape[-1] != length:
                raise ValueError(f"`{name}` must be of the shard's {length} tokens, got {tuple(tensor.shape)}.")
        # First what each process has to say: all have to take part in what follows, and some may see no padding.
        own = torch.tensor([batch_size, length, attention_mask is not None, position_ids is not None], device=device)
        sizes, lengths, masks, positions = zip(*torch.stack(gathered(own, group)).tolist(), strict=True)
        if len(set(sizes)) > 1 or len(set(positions)) > 1:
            raise ValueError(
                f"Processes of a group hold the same rows, and all or none of them say positions: they have {sizes} "
                f"rows, and {sum(positions)} of {len(positions)} have position_ids."
            )
        shards = Shards.of(lengths, dist.get_rank(group))
        whole: dict[str, torch.Tensor | None] = dict.fromkeys(told)
        for name in [name for name, some in (("attention_mask", masks), ("position_ids", positions)) if any(some)]:
            tensor = told[name]
            tensor = torch.ones(1, length) if tensor is None else tensor
            padded = torch.nn.functional.pad(tensor.long().to(device), (0, max(lengths) - length))
            parts = gathered(padded.expand(batch_size, -1).contiguous(), group)
            whole[name] = torch.cat([part[:, :size] for part, size in zip(parts, lengths, strict=True)], dim=1)
        return cls(group, shards, Documents.find(batch_size, shards.edges[-1], cu_seqlens=cu_seqlens, **whole))

    @torch.compiler.disable
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        group_size: int | None,
        shift: Shifted = "half",
        sink_tokens: int = 0,
        *,
        kernel: Callable[..., torch.Tensor],
        **options: Any,
    ) -> torch.Tensor:
        """Attention of the shard's queries: `[B, H, S, D]`, `[B, H_kv, S, D]` -> `[B, S, H, D_v]`.

        `shift` and `sink_tokens` are as `Documents.parts` has them; `group_size` is `None` for dense.
        """
        heads, kv_heads = query.shape[1], key.shape[1]
        if group_size is None:
            return self._by_heads(query, key, value, kernel, options)
        parts = self.documents.parts(heads, kv_heads, group_size, shift, sink_tokens)
        return self._by_halo(query, key, value, parts, kernel, options)

    def _by_halo(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: Sequence[Part],
        kernel: Callable[..., torch.Tensor],
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """Each process attends with its own queries, and gets what these see of earlier shards.

        All exchanges set off at once, so that the later parts' tokens are on their way while the first is computed:
        heads that are not shifted come first, and need nothing but first tokens of documents where shards are of whole
        groups.
        """
        # `split` and not slices: its backward is one concatenation, that of a slice a zero-filled tensor of full size.
        queries = query.split([b - a for (a, b), _, _ in parts], dim=1)
        shared = len({part.kv_heads for part in parts}) < len(parts)  # a single key/value head
        sizes = [b - a for _, (a, b), _ in parts]
        keys, values = (([x] * len(parts) if shared else x.split(sizes, dim=1)) for x in (key, value))
        halos = [Halo(self._routes_of(part, query.device), self.group) for part in parts]
        started = [halo.start(k, v) for halo, k, v in zip(halos, keys, values, strict=True)]
        outs = []
        for part, halo, q, sent in zip(parts, halos, queries, started, strict=True):
            k, v = halo.finish(*sent)
            own = halo.routes.local.part._replace(heads=(0, q.shape[1]), kv_heads=(0, k.shape[1]))
            outs.append(linked(kernel(q, k, v, (own,), **_of_heads(options, *part.heads)), q, k, v))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _routes_of(self, part: Part, device: torch.device) -> Routes:
        if (part, device) not in self._routes:
            self._routes[part, device] = Routes.of(part, self.shards, device)
        return self._routes[part, device]

    def _by_heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel: Callable[..., torch.Tensor],
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """Dense: each process attends over whole rows with some of the heads (DeepSpeed Ulysses, arXiv 2309.14509).

        Where heads don't divide by processes some have one more, and key/value heads go to all whose queries need
        them. Gathering keys and values instead would leave most of the work to the last shard, whose queries see most.
        """
        heads, kv_heads, size = query.shape[1], key.shape[1], self.shards.size
        each = heads // kv_heads
        own = tuple((heads * rank // size, heads * (rank + 1) // size) for rank in range(size))
        own_kv = tuple((a // each, -(-b // each)) if a < b else (0, 0) for a, b in own)
        query = to_heads(query, own, self.shards, self.group)
        key, value = (to_heads(x, own_kv, self.shards, self.group) for x in (key, value))
        first, last = own[self.shards.rank]
        if first == last:  # more processes than heads
            out = query.new_zeros(query.shape[0], query.shape[2], 0, value.shape[-1])
        else:
            parts = tuple(_dense_parts(first, last, each, self.documents))
            out = kernel(query, key, value, parts, **_of_heads(options, first, last))
        out = linked(out, query, key, value)
        return to_tokens(out.transpose(1, 2), own, self.shards, self.group).transpose(1, 2)


def _of_heads(options: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    """A kernel's options for some of the query heads: each has a learned sink of its own."""
    return {name: x[first:last] if name == "learned_sinks" else x for name, x in options.items()}


def _dense_parts(first: int, last: int, each: int, documents: Documents) -> list[Part]:
    """Query heads `first` to `last`, of which `each` share a key/value head, as parts of a call with these alone."""
    found: list[Part] = []
    at = kv_at = 0
    owners = [len(list(same)) for _, same in groupby(head // each for head in range(first, last))]
    for count, alike in groupby(owners):
        kv_heads = len(list(alike))
        heads: Span = (at, at + count * kv_heads)
        found.append(Part(heads, (kv_at, kv_at + kv_heads), documents.segments(None)))
        at, kv_at = heads[1], kv_at + kv_heads
    return found


def gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensors of all processes of a group, which are of one shape."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, tensor, group=group)
    return found


def s2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    group_size: int | None,
    sink_tokens: int = 4,
    cu_seqlens: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """[`~hf_longlora.s2_attention`] of sequences that the processes of a group hold in shards.

    Outputs and gradients are those of one process with the whole rows. Every process has to call it, and to run the
    backward. For many layers make a `ShardedSequence` once and call its `attend`.

    Args:
        query, key, value: As there, of the r-th shard on rank r, contiguous; shards may differ in length.
        group: The processes.
        group_size, sink_tokens, scale, kernel: As there.
        cu_seqlens: `[documents + 1]`, ends of the documents packed into the one whole row (`B` is 1).
        attention_mask: `[B, S]`, the shard's, 0 where a token is padding.
        position_ids: `[B or 1, S]`, the shard's, counted from the document's beginning; a document starts where they
            don't go up by one.

    Returns:
        `[B, H, S, D_v]`, of the shard; 0 where the query is padding.

    Raises:
        ValueError: on shapes that don't fit, a group below 2, a kernel that can't serve, or a process without tokens.
    """
    check_whole(2, none=True, group_size=group_size)
    check_whole(0, sink_tokens=sink_tokens)
    # Before the tensors are looked at: a process that refused its own, having none, would leave the others waiting.
    sequence = ShardedSequence.find(
        group,
        query.shape[0],
        query.shape[2],
        device=query.device,
        cu_seqlens=cu_seqlens,
        attention_mask=attention_mask,
        position_ids=position_ids,
    )
    check_tensors(query, key, value)
    chosen = select_kernel(kernel, query, value)
    out = sequence.attend(query, key, value, group_size, sink_tokens=sink_tokens, kernel=chosen, scale=scale)
    return out.transpose(1, 2)
