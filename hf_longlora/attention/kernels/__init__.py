"""The kernels, one a file, all of one signature, and the table of what each supports.

A kernel takes `query` `[B, H, S, D]`, `key` and `value` `[B, H_kv, E + S, D]` (value's `D` may differ), the `parts` of
`Documents.parts` (which heads are cut where, and which key/value heads are theirs), `scale` and, of `OPTIONS`, those
that its row names; it returns `[B, S, H, D_v]`, 0 where a query lies in no segment. The first `E` keys, mostly none,
are of tokens whose queries are elsewhere (`hf_longlora.parallel`): segments see them by negative numbers. To add a
kernel: write its file, add its row to `KERNELS`, and the tests run over it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..autocast import computed_in
from ..reference import reference_kernel
from ..segments import Part
from . import flash, flex, sdpa, varlen

logger = logging.get_logger(__name__)
HALF = (torch.bfloat16, torch.float16)
OPTIONS = {"dropout_p": "attention dropout", "softcap": "softcap", "learned_sinks": "learned attention sinks"}
"""What some layers ask of attention and some kernels take, in words: weights are dropped, scores are bounded by
`softcap * tanh(scores / softcap)`, a score of each head takes weight and gives nothing (gpt-oss's `s_aux`, `[H]`)."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A row of the support table.

    Args:
        function: The kernel.
        missing: What this machine lacks for it, in words; `None` if nothing.
        devices: Device types; `None`: any.
        dtypes: Of queries; `None`: any.
        head_dim: The largest; `None`: any.
        head_step: What it has to be a multiple of.
        value_dim: Whether values may have another width than keys.
        options: Of `OPTIONS`, what it takes. Sink tokens all kernels have.
    """

    function: Callable[..., torch.Tensor]
    missing: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dim: int | None = None
    head_step: int = 1
    value_dim: bool = True
    options: tuple[str, ...] = ()

    def lacks_here(self, device: str) -> str | None:
        """What a type of device or this machine lacks for this kernel, in words; `None` if it can run."""
        if self.devices is not None and device not in self.devices:
            return f"device {device!r}"
        return self.missing()

    def lacks(self, query: torch.Tensor, value: torch.Tensor, options: Collection[str] = ()) -> str | None:
        """What a call needs and this kernel lacks, in words; `None` if it can serve."""
        device, dtype, width = query.device.type, computed_in(query), query.shape[-1]
        wanted = {
            f"{dtype}": self.dtypes is not None and dtype not in self.dtypes,
            f"heads of {width}": width % self.head_step > 0 or (self.head_dim is not None and width > self.head_dim),
            "values of another width than keys": not self.value_dim and width != value.shape[-1],
        } | {OPTIONS[name]: name not in self.options for name in options}
        return self.lacks_here(device) or next((name for name, lacking in wanted.items() if lacking), None)


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(function=sdpa.sdpa_kernel, options=("dropout_p",)),
    "varlen": Kernel(
        function=varlen.varlen_kernel,
        missing=varlen.missing,
        devices=("cuda",),
        dtypes=HALF,
        head_dim=256,
        head_step=8,
        value_dim=False,
    ),
    "flash": Kernel(
        function=flash.flash_kernel,
        missing=flash.missing,
        devices=("cuda",),
        dtypes=HALF,
        head_dim=256,
        # Version 4 pads widths to 16 or 32, by where: its gradients are wrong at 8, 16, 40, 48, 72, 80, 104 and 112
        # (4.0.0b36 on Hopper; Dao-AILab/flash-attention#2896).
        head_step=32,
        value_dim=False,
    ),
    "flex": Kernel(function=flex.flex_kernel, devices=("cuda",), options=("softcap", "learned_sinks")),
    "reference": Kernel(function=reference_kernel, options=tuple(OPTIONS)),
}


@torch.compiler.assume_constant_result
def preference() -> tuple[str, ...]:
    """What `"auto"` tries, in order. Never the reference: its memory grows with the square of the length."""
    return ("flash", "sdpa", "flex") if flash.is_fastest() else ("sdpa", "flex")


def check_kernel(name: str, device: str) -> None:
    """Raise a `ValueError` if the kernel called `name` can't run on a type of device, or on this machine."""
    lack = None if name == "auto" else KERNELS[name].lacks_here(device)
    if lack is not None:
        able = [other for other, kernel in KERNELS.items() if kernel.lacks_here(device) is None]
        raise ValueError(f"The attention kernel {name!r} lacks {lack}. Here it can be 'auto' or one of {able}.")


def select_kernel(
    name: str, query: torch.Tensor, value: torch.Tensor, options: Collection[str] = ()
) -> Callable[..., torch.Tensor]:
    """The kernel called `name`, or for `"auto"` the first of `preference()` that can serve a call with `options`.

    Raises:
        ValueError: if the named kernel, or for `"auto"` every kernel, lacks what the call needs.
    """
    candidates = preference() if name == "auto" else (name,)
    reasons = {}
    for candidate in candidates:
        lack = KERNELS[candidate].lacks(query, value, options)
        if lack is None:
            if name == "auto" and not torch.compiler.is_compiling():
                logger.info_once(f"s2attn uses the kernel {candidate!r}.")
            if (name, candidate) == ("auto", "sdpa") and KERNELS["varlen"].lacks(query, value, options) is None:
                return _sdpa_or_varlen
            return KERNELS[candidate].function
        reasons[candidate] = lack
    able = [other for other, kernel in KERNELS.items() if kernel.lacks(query, value, options) is None]
    raise ValueError(
        "No attention kernel for this model: "
        + ", ".join(f"{kernel!r} lacks {lack}" for kernel, lack in reasons.items())
        + (
            f". S2AttentionConfig(kernel=...) can be one of {able} (the reference's memory grows with n^2)."
            if able
            else "."
        )
    )


SHORT, FEW = 8192, 5
"""Tokens in a launch of `sdpa`, on average, below which "auto" takes `varlen`: one launch for all segments. And
launches that stay those of `sdpa`, as many as one document may take: where shapes come again, cuDNN is 1.6 times as
fast as FlashAttention 2 (`benchmarks/results/attention.csv`). Lengths of documents are always others, and cuDNN makes
a plan for each, which takes longer than many layers gain by it (`packed.csv`)."""


def _sdpa_or_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Sequence[Part], **options: Any
) -> torch.Tensor:
    """`sdpa`, or `varlen` where that would be many launches of few tokens: short documents, packed."""
    tokens = [launch.tokens for launch in sdpa.launches(query, key, value, parts)]
    short = len(tokens) > FEW and sum(tokens) < SHORT * len(tokens)
    return KERNELS["varlen" if short else "sdpa"].function(query, key, value, parts, **options)
