"""How shifted sparse attention is configured."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from ..values import check_share, check_whole
from .kernels import KERNELS

AttentionMode = Literal["auto", "s2", "dense", "windows"]
"""`"auto"`: sparse in training, dense otherwise. `"s2"` and `"dense"`: always the one named. `"windows"`: dense, and
in training the documents are those of `cu_seq_lens_q`, parts of texts whose positions begin anywhere and may skip."""

Sparse = Literal["s2", "windows", "pose"]
"""How training steps that aren't dense save attention: by its pattern; by windows of the base's native window, each a
run of neighbouring tokens; or by such windows of two chunks (PoSE, arXiv 2309.10400)."""

DEFAULT_RATIO = 0.25
"""A group's share of the length where nothing is given; the native window is a group only up to this share."""


@dataclass(frozen=True, kw_only=True)
class S2AttentionConfig:
    """Shifted sparse attention (LongLoRA, arXiv 2309.12307, section 3.2).

    Args:
        group_size: Tokens in a group, at least 2.
        group_size_ratio: Group size as a share of the longest document, in (0, 1]; not used where `group_size` is
            given. With neither, `resolve_group_size` goes by the model's native window.
        sink_tokens: First tokens of a document that every group sees beside its own; 0 is the paper's pattern.
            Pretrained models park attention there (arXiv 2309.17453, 2406.05678).
        kernel: Name of a kernel of `hf_longlora.attention.kernels.KERNELS`, or `"auto"`. A named kernel that can't
            serve a call raises.

    Raises:
        ValueError: on a value outside its range.
    """

    group_size: int | None = None
    group_size_ratio: float | None = None
    sink_tokens: int = 4
    kernel: str = "auto"

    def __post_init__(self) -> None:
        check_whole(2, none=True, group_size=self.group_size)
        check_share(group_size_ratio=self.group_size_ratio)
        check_whole(0, sink_tokens=self.sink_tokens)
        if self.kernel != "auto" and self.kernel not in KERNELS:
            raise ValueError(f"Unknown attention kernel {self.kernel!r}; choose 'auto' or one of {sorted(KERNELS)}.")

    @property
    def says_groups(self) -> bool:
        """Whether it says how groups are to be, beyond the defaults."""
        return replace(self, kernel="auto") != S2AttentionConfig()

    def resolve_group_size(self, longest: int, native_window: int | None = None) -> int:
        """Group size in tokens: what is given, else the model's native window, a quarter of the length at most.

        A model attends well within the length that it was trained at, and groups of that length take none of it away.

        Args:
            longest: Tokens in the longest document, or the `max_length` of a stage.
            native_window: Tokens that the model was trained at before any scaling (`hf_longlora.rope.native_window`);
                `None` where nothing says it.
        """
        if self.group_size is not None:
            return self.group_size
        ratio = DEFAULT_RATIO if self.group_size_ratio is None else self.group_size_ratio
        if self.group_size_ratio is None and native_window is not None and 2 <= native_window <= ratio * longest:
            return native_window
        return max(2, math.ceil(ratio * longest))

    def resolved(self, longest: int, native_window: int | None = None) -> "S2AttentionConfig":
        """Itself with its group size in tokens; the arguments are `resolve_group_size`'s."""
        return replace(self, group_size=self.resolve_group_size(longest, native_window))

    def dense_at(self, length: int) -> str | None:
        """What to say of groups that hold all `length` tokens of a sequence; `None` of smaller ones."""
        if self.group_size is None or self.group_size < length:
            return None
        return (
            f"A group of {self.group_size:,} tokens holds all of a sequence of {length:,}: attention is dense there, "
            "and costs what dense attention costs. Give a smaller group_size if that is not meant."
        )
