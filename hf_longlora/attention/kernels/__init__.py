"""The kernels, one a file, all of one signature, and the table of what each supports.

A kernel takes `query` `[B, H, S, D]`, `key` and `value` `[B, H_kv, S, D]` (`H` a multiple of `H_kv`; value's `D` may
differ), the segments of each row and `scale`, `dropout_p`, `softcap`, `sinks`; it returns `[B, S, H, D_v]`, 0 where a
query lies in no segment. To add one: write its file, add its row to `KERNELS`, and the tests run over it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..reference import reference_kernel
from .sdpa import sdpa_kernel


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A row of the support table."""

    function: Callable[..., torch.Tensor]
    devices: tuple[str, ...] | None = None  # None: any
    dropout: bool = True
    softcap: bool = False
    sinks: bool = False
    linear_memory: bool = True

    def lacks(self, device: torch.device, *, dropout: bool, softcap: bool, sinks: bool) -> str | None:
        """What a call needs and this kernel has not, in words; `None` if it can serve."""
        if self.devices is not None and device.type not in self.devices:
            return f"device {device.type!r}"
        wanted = {"attention dropout": (dropout, self.dropout), "softcap": (softcap, self.softcap)}
        wanted["attention sinks"] = (sinks, self.sinks)
        return next((name for name, (asked, able) in wanted.items() if asked and not able), None)


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(function=sdpa_kernel),
    "reference": Kernel(function=reference_kernel, softcap=True, sinks=True, linear_memory=False),
}
PREFERENCE = ("sdpa",)
"""What `"auto"` tries, in order. The reference is never chosen unasked: its memory grows with the square of length."""


def select_kernel(
    name: str, device: torch.device, *, dropout: bool = False, softcap: bool = False, sinks: bool = False
) -> Callable[..., torch.Tensor]:
    """The kernel called `name`, or for `"auto"` the first of `PREFERENCE` that can serve.

    Raises:
        ValueError: if the named kernel, or for `"auto"` every kernel, lacks what the call needs.
    """
    candidates = PREFERENCE if name == "auto" else (name,)
    reasons = {}
    for candidate in candidates:
        lack = KERNELS[candidate].lacks(device, dropout=dropout, softcap=softcap, sinks=sinks)
        if lack is None:
            return KERNELS[candidate].function
        reasons[candidate] = lack
    able = [
        other
        for other, kernel in KERNELS.items()
        if kernel.lacks(device, dropout=dropout, softcap=softcap, sinks=sinks) is None
    ]
    raise ValueError(
        "No attention kernel for this model: "
        + ", ".join(f"{kernel!r} lacks {lack}" for kernel, lack in reasons.items())
        + (f". S2AttentionConfig(kernel=...) can be one of {able} (memory grows with n^2)." if able else ".")
    )
