"""The mask function of `"s2attn"`, which puts off the mask.

It knows neither the layer nor whether it trains, so it returns an `S2Mask`: all that is needed to find the documents
(training, O(n)) or to build the mask of `attn_implementation="sdpa"` (everything else), and neither until it is asked.
It is made once for each forward and shared by the layers, so both are also computed once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
    padding_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from .blocks import MaskFunction, by_position, documents_of, seen_in_blocks, within_span
from .segments import Documents

READS_MASK = (
    "This family works on the attention mask itself, and s2attn makes none (memory n^2): it is not supported. Use the "
    "model with another attention implementation"
)


class S2Mask:
    """What a forward knows about its mask, before anyone asks for one.

    No dataclass: FSDP2 rebuilds those in each layer's arguments, to cast their tensors.

    Args:
        arguments: What transformers passed to build a mask with.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._found: Any = None  # `Documents`, or what has them
        self._packed = False
        self._dense: tuple[torch.Tensor | None] | None = None
        self._in_blocks: tuple[torch.Tensor | None] | None = None
        self._by_position: torch.Tensor | None = None

    @property
    def padding(self) -> torch.Tensor | None:
        """`[B, S]`, False where a token is padding."""
        return self.arguments["attention_mask"]

    @property
    def window(self) -> int | None:
        """Tokens in the window or chunk, for the mask of sliding-window or chunked layers."""
        return self.arguments.get("local_size")

    @property
    def causal(self) -> bool:
        """Whether nothing but causality, padding and packing shapes it."""
        if self.arguments["mask_function"] is causal_mask_function:
            return True
        # Compiled, transformers can't look whether a row is packed, and makes the mask as if each were. A row that
        # says its documents may be taken for packed because positions skip inside of one.
        packed = torch.compiler.is_compiling() or self._packed
        within = self.window is not None and self.arguments["q_length"] <= self.window
        return (within or packed) and not self.arguments["use_vmap"]  # what else shapes a mask comes to be vmapped

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{READS_MASK} (`{name}`)")

    def _refuse(self, *others: Any) -> Any:
        raise ValueError(READS_MASK)

    __getitem__ = __invert__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = _refuse

    def check_keys(self, module: nn.Module, key: torch.Tensor) -> None:
        """Raise a `ValueError` if a layer has made other keys (compressed, added ones) than the mask is for."""
        # A single query is a decoding step, where sdpa's mask broadcasts over whatever the cache holds.
        if key.shape[2] != self.arguments["kv_length"] and self.arguments["q_length"] > 1:
            raise ValueError(
                f"{type(module).__name__} attends to {key.shape[2]} keys where the mask is for "
                f"{self.arguments['kv_length']}: s2attn does not support it."
            )

    def dense(self) -> torch.Tensor | None:
        """The mask of `attn_implementation="sdpa"`: `[B, 1, S, S]`, or `None` where causality says it all."""
        if self._dense is None:
            self._dense = (sdpa_mask(**self.arguments),)
        return self._dense[0]

    @property
    def within_span(self) -> bool:
        """Whether a token sees but the `window` tokens up to its own, or fewer.

        Compiled, nothing can be said of it: mask functions don't show there what they are made of.
        """
        known = self.window is not None and not torch.compiler.is_compiling()
        return known and within_span(self.arguments["mask_function"])

    def in_blocks(
        self, cu_seqlens: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """What each block of a layer with a window or chunks sees, as `seen_in_blocks` says it.

        `None` where the whole mask is no larger, or not known to leave out what is farther.

        Args:
            cu_seqlens: As `Documents.find` takes it, if documents are to be kept apart that the mask knows nothing of:
                gpt-oss makes its masks without positions.
            position_ids: The same.
        """
        if self._in_blocks is None:
            self._in_blocks = (self._find_blocks(cu_seqlens, position_ids) if self.within_span else None,)
        return self._in_blocks[0]

    def _find_blocks(self, cu_seqlens: torch.Tensor | None, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        function, length = self.arguments["mask_function"], self.arguments["q_length"]
        padding = prepare_padding_mask(self.padding, length, 0)
        documents = None
        if cu_seqlens is not None:
            documents = documents_of(cu_seqlens, length)[None]
        elif position_ids is not None and position_ids.ndim == 2:
            documents = find_packed_sequence_indices(position_ids.expand(self.arguments["batch_size"], -1))
        if documents is None and length <= self.window:
            return None
        if documents is not None:
            function = and_masks(function, packed_sequence_mask_function(documents))
        if padding is not None:
            function = and_masks(function, padding_mask_function(padding))
        return self._blocks_of(function)

    def by_position(self, cu_seqlens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What each block of a layer with a sliding window sees where positions skip (`blocks.by_position`).

        Raises:
            ValueError: if the layer has no window.
        """
        if self.window is None:
            raise ValueError("Positions that skip need layers with as many keys as queries.")
        if self._by_position is None:
            self._by_position = self._blocks_of(by_position(self.window, cu_seqlens, position_ids))
        return self._by_position

    def _blocks_of(self, function: MaskFunction) -> torch.Tensor:
        of = self.arguments
        return seen_in_blocks(function, of["batch_size"], of["q_length"], of["local_size"], of["device"])

    def find(
        self, find: Callable[..., Any], cu_seqlens: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> Any:
        """What `find` makes of the batch (`Documents.find`, or `ShardedSequence.find` of `hf_longlora.parallel`).

        Computed once for each forward.
        """
        if self._found is None:
            self._found = find(
                self.arguments["batch_size"],
                self.arguments["q_length"],
                cu_seqlens=cu_seqlens,
                attention_mask=self.padding,
                position_ids=position_ids,
            )
            documents = self._found if isinstance(self._found, Documents) else self._found.documents
            self._packed = documents.packed or cu_seqlens is not None
        return self._found


def s2_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> S2Mask | torch.Tensor | None:
    """The mask function of `"s2attn"`: an `S2Mask` where the queries are the keys, else what `"sdpa"` makes."""
    arguments = dict(
        kwargs,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
    )
    # A decoding step, a prefill into a static cache, a chunk after a prefix: dense whatever the layer's mode.
    if q_length != kv_length or isinstance(q_offset, torch.Tensor) or q_offset != 0 or kv_offset != 0:
        return sdpa_mask(**arguments)
    return S2Mask(arguments)
