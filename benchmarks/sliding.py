"""Attention of a layer with a sliding window, forward and backward: ours, by the whole mask, and what could do it.

    python -m benchmarks.sliding [--shapes gemma3-270m 8b] [--lengths 8192 32768 131072] [--results FILE]

One row per method, shape and length, appended as it is measured: some three minutes on one GPU. Methods:

    blocks          the attention function of `s2attn`, in blocks of half a window; `/1`: of a window, `/4`: a quarter
    whole mask      sdpa by the mask of transformers, a byte for each pair of tokens, up to --whole tokens
    varlen          torch's FlashAttention with a window, in half precision on a GPU: no part of the package

Masks are made beforehand, as the layers of a model share them, and count in the peak. Times are of one forward and
backward; memory is the peak while one runs, inputs and gradients included, over the bytes of q, k, v, the output and
their gradients. Each method is first compared with the whole mask in fp32.
"""

import argparse
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_sliding_window_causal_mask

from hf_longlora.attention import blocks
from hf_longlora.attention.interface import NAME, s2_attention_forward

from .provenance import RESULTS, append_row, provenance


class Shape(NamedTuple):
    """A layer: its query and key/value heads, their width, and its window in tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int


SHAPES = {
    "gemma3-270m": Shape(4, 1, 256, 512),
    "8b": Shape(32, 8, 128, 4096),
    "tiny": Shape(4, 2, 8, 64),
}
Call = Callable[..., torch.Tensor]
Maker = Callable[[Shape, int, torch.device], Call]
"""Of a shape, a length and a device what attends: `[B, H, S, D]`, keys and values -> `[B, S, H, D]`."""


# --------------------------------------------------------------------------------------------------------------------
# The methods


def by_mask(implementation: str, function: Callable[..., Any], per_window: int = blocks.PER_WINDOW) -> Maker:
    """Attention as a layer of transformers calls it, by the mask that its implementation has there."""

    def make(shape: Shape, length: int, device: torch.device) -> Call:
        config = LlamaConfig(sliding_window=shape.window, max_position_embeddings=length)
        config._attn_implementation = implementation
        module = torch.nn.Module()
        module.config, module.is_causal = config, True
        module.num_key_value_groups = shape.heads // shape.kv_heads
        with mock.patch.object(blocks, "PER_WINDOW", per_window):
            mask = create_sliding_window_causal_mask(config, torch.empty(1, length, 0, device=device), None, None)
            if implementation == NAME:
                assert mask.in_blocks() is not None

        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return function(module, query, key, value, mask, use_cache=False)[0]

        return call

    return make


def varlen(shape: Shape, length: int, device: torch.device) -> Call:
    """FlashAttention 2 as torch has it; a window of w tokens is w - 1 before one's own."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, length], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"window_size": (shape.window - 1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        rows = (x[0].transpose(0, 1) for x in tensors)
        return varlen_attn(*rows, ends, ends, length, length, **options)[None]

    return call


def methods(device: torch.device) -> Iterator[tuple[str, Maker]]:
    for number in (1, 2, 4):
        name = "blocks" if number == blocks.PER_WINDOW else f"blocks/{number}"
        yield name, by_mask(NAME, s2_attention_forward, number)
    yield "whole mask", by_mask("sdpa", sdpa_attention_forward)
    if device.type == "cuda":
        yield "varlen", varlen


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def inputs(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random q, k, v that require gradients, as a model hands them over, and the gradient of the output."""
    q, k, v, gradient = (
        torch.randn(1, length, heads, shape.head_dim, device=device, dtype=dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    return [*(x.transpose(1, 2).requires_grad_() for x in (q, k, v)), gradient]


def outcome(call: Call, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients."""
    out = call(*tensors[:3])
    return [out, *torch.autograd.grad(out, tensors[:3], tensors[3])]


def check(name: str, maker: Maker, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to time what is wrong: against the whole mask in fp32, at two and a half windows."""
    length = shape.window * 5 // 2
    tensors = inputs(shape, length, device, dtype)
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in tensors]
    expected = outcome(by_mask("sdpa", sdpa_attention_forward)(shape, length, device), exact)
    got = outcome(maker(shape, length, device), tensors)
    errors = [((g.float() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True)]
    print(f"{name}: relative errors {', '.join(f'{error:.1e}' for error in errors)}", flush=True)
    if not max(errors) < 2e-2:
        raise SystemExit(f"{name} is wrong.")


def measure(
    maker: Maker, shape: Shape, length: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Quantiles of time, and on a GPU peak memory."""
    gpu = device.type == "cuda"
    others = torch.cuda.memory_allocated() if gpu else 0  # libraries' workspaces
    tensors = inputs(shape, length, device, dtype)
    call = maker(shape, length, device)

    def step() -> float:
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        outcome(call, tensors)
        if gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    step()  # compiles, chooses, allocates
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - others if gpu else None
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds * 1e3 and len(times) < 100):
        times.append(step())
    least = 2 * sum(x.numel() * x.element_size() for x in tensors)
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "repeats": len(times),
        "peak_mib": "" if peak is None else peak / 2**20,
        "peak_over_least": "" if peak is None else peak / least,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["gemma3-270m", "8b"])
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--whole", type=int, default=32768, help="the longest text that has a whole mask")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed per method, five repeats at least")
    parser.add_argument("--only", nargs="*", help="methods whose names contain one of these words")
    parser.add_argument(
        "--device", default="cuda", help="the shapes that are measured are for a GPU; tiny is for a CPU"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "sliding.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    origin = provenance()
    for shape_name in args.shapes:
        shape = SHAPES[shape_name]
        for name, maker in methods(device):
            if args.only and not any(word in name for word in args.only):
                continue
            try:
                check(f"{shape_name}, {name}", maker, shape, device, dtype)
                for length in args.lengths:
                    if name == "whole mask" and length > args.whole:
                        continue
                    found = measure(maker, shape, length, device, dtype, args.seconds)
                    row = {
                        "method": name,
                        "shape": shape_name,
                        **shape._asdict(),
                        "length": length,
                        "dtype": f"{dtype}",
                    }
                    append_row(args.results, {**row, **found, **origin})
                    memory = f"{found['peak_over_least']:6.2f}" if found["peak_mib"] != "" else ""
                    print(
                        f"{shape_name} n {length:7} {name:12} {found['ms_p50']:9.2f} ms  memory {memory}", flush=True
                    )
            except Exception as error:  # a method that this machine lacks must not cost the others their rows
                print(f"{shape_name} {name}: {type(error).__name__}: {error}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
