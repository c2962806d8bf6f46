"""Attention alone, forward and backward: ours, its ceiling, dense attention, and what the published code copies.

    python -m benchmarks.attention [--lengths 8192 32768 131072] [--results FILE]
    python -m benchmarks.attention --preset sinks   # what sink tokens cost at 131,072: about a minute

One row per method and shape, appended as it is measured. Every method gets queries, keys and values as a transformers
model hands them over: `[B, S, H, D]` in memory, seen as `[B, H, S, D]`. Times are of CUDA events around one forward
and backward; memory is the peak while one runs, inputs and gradients included, over the bytes of q, k, v, the output
and their gradients.
"""

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_longlora import s2_attention
from hf_longlora.attention import segments
from hf_longlora.attention.kernels import KERNELS, flash, ragged, sdpa

from .provenance import RESULTS, append_row, provenance

HEADS, KV_HEADS, DIM = 32, 8, 128
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Method(NamedTuple):
    """Something to time: `kind` groups methods for the ratios, `group` is 0 for dense attention."""

    name: str
    kind: str
    backend: str
    group: int
    call: Call
    sink_tokens: int = 0


# --------------------------------------------------------------------------------------------------------------------
# The methods


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def dense_flash4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """FlashAttention 4, from its own package."""
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def repeat_heads(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(HEADS // KV_HEADS, dim=1)


def published_roll(group: int) -> Call:
    """The layout of the reference repository's path without flash-attn, and of its descendants: heads repeated, half
    of them rolled, everything reshaped into groups and back. Its attention here is FlashAttention 2. It wraps around.
    """

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dim = query.shape

        def into_groups(x: torch.Tensor) -> torch.Tensor:
            still, moved = x.chunk(2, dim=1)
            x = torch.cat([still, moved.roll(-group // 2, dims=2)], dim=1)
            return x.transpose(1, 2).reshape(batch * length // group, group, heads, dim).transpose(1, 2)

        parts = [into_groups(x) for x in (query, repeat_heads(key), repeat_heads(value))]
        out = F.scaled_dot_product_attention(*parts, is_causal=True)
        out = out.transpose(1, 2).reshape(batch, length, heads, dim)
        still, moved = out.chunk(2, dim=2)
        return torch.cat([still, moved.roll(group // 2, dims=1)], dim=2).transpose(1, 2)

    return call


def published_flash(group: int) -> Call:
    """The layout of the reference repository's path with flash-attn: heads repeated, q, k and v stacked, the two
    halves of the heads put into the batch by a copy, one call of FlashAttention 2 with variable lengths, a copy back.
    """
    from torch.nn.attention.varlen import varlen_attn

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dim = query.shape
        stacked = torch.stack([query, repeat_heads(key), repeat_heads(value)], dim=2).transpose(1, 3)
        halves = stacked.reshape(batch, length, 3, 2, heads // 2, dim).permute(0, 3, 1, 2, 4, 5)
        halves = halves.reshape(batch * 2 * length, 3, heads // 2, dim)
        edges = [0]
        for half in range(batch * 2):
            cut = segments([(0, length)], group, group // 2 if half % 2 else 0)
            edges += [half * length + segment.end for segment in cut]
        ends = torch.tensor(edges, dtype=torch.int32, device=query.device)
        out = varlen_attn(*halves.unbind(1), ends, ends, group, group, **_causal(varlen_attn))
        out = out.reshape(batch, 2, length, heads // 2, dim).transpose(1, 2)
        return out.reshape(batch, length, heads, dim).transpose(1, 2)

    return call


def _causal(varlen_attn: Callable[..., Any]) -> dict[str, Any]:
    """How this version of torch asks `varlen_attn` for a causal mask."""
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        return {"is_causal": True}
    return {"window_size": (-1, 0)}


def methods(groups: list[int], launches: Sequence[int] = (), sinks: Sequence[int] = (0, 4)) -> Iterator[Method]:
    plain = {backend: dense for backend in BACKENDS} | ({"flash4": dense_flash4} if flash.missing() is None else {})
    for backend, call in plain.items():
        yield Method(f"dense {backend}", "dense", backend, 0, call)
    for group in groups:
        for backend, call in plain.items():
            yield Method(f"contiguous batch {backend}", "ceiling", backend, group, call)
        for sink_tokens in sinks:
            yield from _s2(group, launches, sink_tokens)
        yield Method("published flash layout", "published", "flash", group, published_flash(group))
        yield Method("published roll layout", "published", "flash", group, published_roll(group))


def _s2(group: int, launches: Sequence[int], sink_tokens: int) -> Iterator[Method]:
    """Our kernels, each backend of `sdpa` for itself."""

    def method(name: str, backend: str, kernel: str, launch: int | None = None) -> Method:
        return Method(f"s2 {name}", "s2", backend, group, _ours(group, kernel, sink_tokens, launch), sink_tokens)

    for backend in BACKENDS:
        yield method(f"sdpa {backend}", backend, "sdpa")
    for kernel in ("auto", *KERNELS):
        if kernel not in ("sdpa", "reference") and (kernel == "auto" or KERNELS[kernel].missing() is None):
            yield method(kernel, {"varlen": "flash", "flash": "flash4"}.get(kernel, ""), kernel)
    for tokens in launches:
        yield method(f"sdpa cudnn, launches {tokens}", "cudnn", "sdpa", tokens)
        if flash.missing() is None:
            yield method(f"flash, launches {tokens}", "flash4", "flash", tokens)


def _ours(group: int, kernel: str, sink_tokens: int, launch: int | None) -> Call:
    """Ours, in launches of so many tokens instead of the kernels' own number."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with (
            mock.patch.object(sdpa, "LAUNCH_TOKENS", launch or sdpa.LAUNCH_TOKENS),
            mock.patch.object(ragged, "LAUNCH_TOKENS", launch or ragged.LAUNCH_TOKENS),
        ):
            return s2_attention(query, key, value, group_size=group, sink_tokens=sink_tokens, kernel=kernel)

    return call


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def pairs(method: Method, length: int) -> int:
    """Query-key pairs that one head computes, the mean over the heads."""
    if method.group == 0:
        cuts = [segments([(0, length)], None)]
    elif method.kind == "ceiling":
        cuts = [segments([(0, length)], method.group)]
    else:
        cuts = [segments([(0, length)], method.group, shift, method.sink_tokens) for shift in (0, method.group // 2)]
    return sum(segment.pairs for cut in cuts for segment in cut) // len(cuts)


def inputs(length: int, group: int | None) -> list[torch.Tensor]:
    """Random q, k, v that require gradients, and the gradient of the output."""
    batch, rows = (1, length) if not group else (length // group, group)
    tensors = [
        torch.randn(batch, rows, heads, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]
    return [x.requires_grad_() for x in tensors[:3]] + tensors[3:]


def measure(method: Method, length: int, seconds: float) -> dict[str, float]:
    """Quantiles of time, and peak memory."""
    others = torch.cuda.memory_allocated()  # libraries' workspaces
    query, key, value, gradient = inputs(length, method.group if method.kind == "ceiling" else None)

    def step() -> None:
        out = method.call(query, key, value)
        torch.autograd.grad(out, (query, key, value), gradient)

    with _backend(method.backend):
        step()  # compiles, chooses, allocates
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - others
        times: list[float] = []
        for _ in range(2):
            step()
        while len(times) < 5 or (sum(times) < seconds * 1e3 and len(times) < 100):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    least = 2 * sum(x.numel() * x.element_size() for x in (query, key, value, gradient))
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    flops = 3.5 * 4 * pairs(method, length) * DIM * HEADS  # two products forward, five backward
    return {
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "repeats": len(times),
        "tflops": flops / p50 / 1e9,
        "peak_mib": peak / 2**20,
        "peak_over_least": peak / least,
    }


def _backend(name: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext()


def check(wanted: Callable[[str], bool], sinks: Sequence[int], length: int = 2048, group: int = 512) -> None:
    """Refuse to time what is wrong: each wanted method that computes the pattern against the reference kernel.

    The rolled layout is left out: its first half group sees the end of the sequence.
    """
    query, key, value, gradient = inputs(length, None)
    right = {}
    for sink_tokens in {0, *sinks}:
        expected = s2_attention(query, key, value, group_size=group, sink_tokens=sink_tokens, kernel="reference")
        right[sink_tokens] = [expected, *torch.autograd.grad(expected, (query, key, value), gradient)]
    for method in methods([group], (), sinks):
        if wanted(method.name) and (method.kind == "s2" or method.name == "published flash layout"):
            with _backend(method.backend):
                out = method.call(query, key, value)
                got = [out, *torch.autograd.grad(out, (query, key, value), gradient)]
            errors = [
                ((g.float() - w.float()).norm() / w.float().norm()).item()
                for g, w in zip(got, right[method.sink_tokens], strict=True)
            ]
            said = ", ".join(f"{error:.1e}" for error in errors)
            print(f"{method.name}, {method.sink_tokens} sink tokens: relative errors {said}", flush=True)
            if not max(errors) < 2e-2:
                raise SystemExit(f"{method.name} is wrong.")


def ratios(rows: list[dict[str, Any]]) -> None:
    """Print what the rows of one length say."""
    times = {(row["method"], row["group"], row["sink_tokens"]): row["ms_p50"] for row in rows}
    best_dense = min((t for (_, group, _), t in times.items() if group == 0), default=float("nan"))
    for row in rows:
        text = f"n {row['length']:7} G {row['group']:6} sinks {row['sink_tokens']:2} {row['method']:26}"
        text += f" {row['ms_p50']:9.2f} ms"
        text += f" {row['tflops']:5.0f} TFLOP/s  memory {row['peak_over_least']:.2f}"
        same = times.get((f"contiguous batch {row['backend']}", row["group"], 0))
        best = min(
            (t for (name, group, _), t in times.items() if "contiguous" in name and group == row["group"]), default=0
        )
        without = times.get((row["method"], row["group"], 0))
        if row["sink_tokens"] and without:
            text += f"  / without {row['ms_p50'] / without:.3f}"
        if row["kind"] == "s2" and same:
            text += f"  / ceiling {row['ms_p50'] / same:.3f}"
        if row["kind"] == "s2" and best:
            text += f"  / best ceiling {row['ms_p50'] / best:.3f}"
        if row["group"]:
            text += f"  best dense / this {best_dense / row['ms_p50']:.2f}"
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--seconds", type=float, default=0.5, help="timed per method, five repeats at least")
    parser.add_argument("--only", nargs="*", help="methods whose names contain one of these words")
    parser.add_argument(
        "--launches", type=int, nargs="*", default=[], help="our kernels in launches of so many tokens, too"
    )
    parser.add_argument("--sinks", type=int, nargs="*", default=[0, 4], help="our kernels with so many sink tokens")
    parser.add_argument("--groups", type=int, nargs="*", help="tokens in a group; default: 2,048 and a quarter")
    parser.add_argument("--preset", choices=["sinks"], help="ours alone, with sink tokens and without, at 131,072")
    parser.add_argument("--results", type=Path, default=RESULTS / "attention.csv")
    args = parser.parse_args()
    if args.preset:
        args.lengths, args.groups, args.seconds = [131072], [2048, 8192, 32768], 0.3
        args.only = args.only or ["s2 sdpa cudnn", "s2 auto"]
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")

    def wanted(name: str) -> bool:
        return not args.only or any(word in name for word in args.only)

    check(wanted, args.sinks)
    origin = provenance()
    for length in args.lengths:
        rows = []
        groups = sorted(set(args.groups or (length // 4, 2048)), reverse=True)
        for method in methods(groups, args.launches, args.sinks):
            if not wanted(method.name):
                continue
            try:
                measured = measure(method, length, args.seconds)
            except Exception as error:  # a method that this machine lacks must not cost the others their rows
                print(f"n {length} G {method.group} {method.name}: {type(error).__name__}: {error}", flush=True)
                continue
            shape = {"length": length, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": "bfloat16"}
            row = {"method": method.name, "kind": method.kind, "backend": method.backend, "group": method.group}
            row |= {"sink_tokens": method.sink_tokens}
            rows.append({**row, **shape, **measured})
            append_row(args.results, {**rows[-1], **origin})
            torch.cuda.empty_cache()
        ratios(rows)


if __name__ == "__main__":
    main()
