"""Cards: their data sheets, and the share of the FLOPs there that attention reaches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

Backend = Literal["cudnn", "flash"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A card's data sheet, and the share of its FLOPs that attention reaches."""

    name: str
    memory_gib: float
    """As torch reports it."""
    tflops: float
    """bf16, dense, fp32 accumulation."""
    bandwidth: float
    """Memory bandwidth, GB/s."""
    link: float
    """To the host, GB/s: what pinned copies reach of PCIe's 32 or 64."""
    attention: dict[Backend, float]
    """Share of `tflops` that attention reaches over long segments, forward and backward."""
    measured: bool = False
    """Whether a step on it stands in `benchmarks/results/`."""


HOPPER: dict[Backend, float] = {"cudnn": 0.56, "flash": 0.33}  # benchmarks/results/attention.csv: 554 and 326 of 989
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="H200", memory_gib=139.8, tflops=989, bandwidth=4800, link=50, attention=HOPPER, measured=True),
        Gpu(name="H100", memory_gib=79.2, tflops=989, bandwidth=3350, link=50, attention=HOPPER),
        Gpu(name="H100-PCIe", memory_gib=79.2, tflops=756, bandwidth=2000, link=50, attention=HOPPER),
        Gpu(name="A100-80GB", memory_gib=79.2, tflops=312, bandwidth=2039, link=24, attention={"flash": 0.6}),
        Gpu(name="A100-40GB", memory_gib=39.4, tflops=312, bandwidth=1555, link=24, attention={"flash": 0.6}),
        Gpu(name="L40S", memory_gib=44.4, tflops=362, bandwidth=864, link=24, attention={"flash": 0.5}),
        Gpu(name="A10G", memory_gib=22.1, tflops=70, bandwidth=600, link=24, attention={"flash": 0.6}),
        Gpu(name="RTX-4090", memory_gib=23.5, tflops=165, bandwidth=1008, link=24, attention={"flash": 0.7}),
        Gpu(name="RTX-3090", memory_gib=23.6, tflops=71, bandwidth=936, link=24, attention={"flash": 0.7}),
    )
}


def find_gpu(gpu: str | Gpu) -> Gpu:
    """A card by its name in `GPUS`, in any case; a `Gpu` is itself."""
    if isinstance(gpu, Gpu):
        return gpu
    found = [card for name, card in GPUS.items() if name.lower() == gpu.lower()]
    if not found:
        raise ValueError(f"unknown GPU {gpu!r}; known are {', '.join(GPUS)}")
    return found[0]


def gpu_called(name: str) -> Gpu | None:
    """The card that torch calls `name` ("NVIDIA A100-SXM4-80GB"), if it is in the table."""

    def words(text: str) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", text.lower()))

    fitting = [gpu for gpu in GPUS.values() if words(gpu.name) <= words(name)]
    return max(fitting, key=lambda gpu: len(gpu.name), default=None)


def local_gpu() -> Gpu | None:
    """The card of this machine, if there is one and it is in the table."""
    return gpu_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
