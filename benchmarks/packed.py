"""Attention over packed documents of random lengths, forward and backward: `sdpa`, `varlen`, and what "auto" takes.

    python -m benchmarks.packed [--tokens 32768] [--documents 100 500 2000 8000] [--results FILE]

A row of `results/packed.csv` for each kernel and mean length. Each repetition draws other lengths (exponentially), as
each step of a packed run has others, and calls twice: `first` is the call that meets them, as a step's first layer
does, plans of cuDNN that are made for a shape included; `again` is the one after it, as further layers. Milliseconds.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch

from hf_longlora import s2_attention

from .provenance import RESULTS, append_row, provenance

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def ends(tokens: int, mean: int, draw: random.Random, longer: int = 0) -> torch.Tensor:
    """Where documents of a random length, and of so many tokens more, begin and end: `[documents + 1]`."""
    found = [0]
    while found[-1] < tokens:
        found.append(min(tokens, found[-1] + 1 + longer + round(draw.expovariate(1 / mean))))
    return torch.tensor(found, dtype=torch.int32)


def milliseconds(tensors: list[torch.Tensor], cu_seqlens: torch.Tensor, group_size: int, kernel: str) -> float:
    """Of one forward and backward."""
    gpu = tensors[0].is_cuda
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = s2_attention(*tensors, group_size=group_size, cu_seqlens=cu_seqlens, kernel=kernel)
    torch.autograd.grad(out, tensors, out.detach())
    if gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(
    tokens: int, mean: int, group_size: int, kernel: str, repeats: int, device: str, longer: int
) -> dict[str, Any]:
    """Quantiles over draws of documents; one draw before them starts libraries.

    Args:
        longer: Tokens more in each document, another number for each kernel: it would find the plans of another one.
    """
    draw, dtype = random.Random(0), torch.bfloat16 if device == "cuda" else torch.float32
    tensors = [
        torch.randn(1, tokens, heads, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    first, again, documents = [], [], []
    for number in range(1 + repeats):
        cu_seqlens = ends(tokens, mean, draw, longer).to(device)
        taken = [milliseconds(tensors, cu_seqlens, group_size, kernel) for _ in range(2)]
        if number:
            first.append(taken[0])
            again.append(taken[1])
            documents.append(len(cu_seqlens) - 1)
    row: dict[str, Any] = {"documents": sum(documents) / repeats}
    for name, times in (("first", first), ("again", again)):
        quantiles = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row |= dict(zip((f"{name}_p20", f"{name}_p50", f"{name}_p80"), quantiles, strict=True))
    return row | {"repeats": repeats}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--documents", type=int, nargs="+", default=[100, 500, 2000, 8000], help="tokens, on average")
    parser.add_argument("--group-size", type=int, default=8192)
    parser.add_argument("--kernels", nargs="+", default=["varlen", "auto", "sdpa"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS / "packed.csv")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    for mean in args.documents:
        for longer, kernel in enumerate(args.kernels):
            known = {"kernel": kernel, "tokens": args.tokens, "mean": mean, "group": args.group_size}
            row = known | measure(args.tokens, mean, args.group_size, kernel, args.repeats, args.device, longer)
            append_row(args.results, row | provenance())
            print(
                f"{kernel:7} {args.tokens:,} tokens, documents of {mean:,}: first {row['first_p50']:.1f} ms, "
                f"again {row['again_p50']:.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
