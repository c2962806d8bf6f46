"""What is merged into the groups' output for sink tokens: the fused kernels against plain torch, piece by piece.

That both are right is tested against the oracle, in `test_kernels.py`. Without a GPU, where Triton is installed, its
interpreter runs them: `TRITON_INTERPRET=1 pytest tests/attention/test_seen.py`.
"""

import os

import pytest
import torch

from hf_longlora import s2_attention
from hf_longlora.attention import Documents
from hf_longlora.attention.kernels import KERNELS, operators, seen
from hf_longlora.attention.kernels.seen import Call
from hf_longlora.parallel.shards import localize

from .test_kernels import TOLERANCE, check, draw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = pytest.mark.gpu

CASES = {
    "one document": ((4, 2), ((0, 300),), 300, 64, 4),
    "nine heads on three, packed": ((9, 3), ((3, 160), (160, 170), (170, 318)), 320, 32, 4),
    "one key head for two parts": ((5, 1), ((0, 150),), 150, 48, 20),
    "groups of 3 with 40": ((4, 2), ((0, 50), (52, 90)), 90, 3, 40),
    "more than the document has": ((2, 1), ((0, 90),), 90, 8, 100),
    "a window at the row's end": ((4, 4), ((0, 40), (40, 45)), 45, 2, 1),
}


@(lambda test: test if INTERPRETED else on_gpu(test))
@pytest.mark.parametrize("width", [24, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fused_is_plain(case, dtype, width, monkeypatch):
    triton = pytest.importorskip("hf_longlora.attention.kernels.seen_triton")
    if INTERPRETED and (dtype == torch.bfloat16 or width != 24):
        pytest.skip("the interpreter is slow, and knows no bfloat16")
    if dtype == torch.float32 and width > 128:
        pytest.skip("no engine writes fp32 in place on a GPU, and at this width it wants more than a GPU has")
    for keys in (16,) if INTERPRETED else (16, 32):  # more of them take several launches
        compare_with_plain(triton, monkeypatch, case, dtype, width, keys)


def compare_with_plain(triton, monkeypatch, case, dtype, width, keys):
    (heads, kv_heads), documents, length, group_size, sink_tokens = CASES[case]
    monkeypatch.setattr(triton, "KEYS", keys)
    triton._launches.cache_clear()
    parts = Documents((documents, documents[:1]), length).parts(heads, kv_heads, group_size, sink_tokens=sink_tokens)
    numbers = seen.encoded(parts)
    query, key, value, out, grad, dq, dk, dv = (
        torch.randn(2, length, n, width, device=DEVICE).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads, heads, heads, kv_heads, kv_heads)
    )
    lse = torch.randn(heads, 2, length, device=DEVICE).transpose(0, 1)
    monkeypatch.setattr(seen, "_has_triton", lambda: False)
    results = []
    for module in (seen, triton, triton):
        merged, total, *gradients = (x.clone() for x in (out, lse, dq, dk, dv))
        module.merge(numbers, Call(query, key, value, merged, total), width**-0.5)
        given = results[0][:2] if results else (merged, total)
        module.add_gradients(numbers, grad, Call(query, key, value, *given), tuple(gradients), width**-0.5)
        results.append((merged, total, *gradients))
    for name, plain, fused, again in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert torch.equal(fused, again), name  # sums are made in one order always
        error = (plain.double() - fused.double()).norm() / plain.double().norm()
        assert error < TOLERANCE[dtype], (name, error.item())


@(lambda test: test if INTERPRETED else on_gpu(test))
def test_keys_before_the_queries(monkeypatch):
    """First tokens that another process has, or a part of which it has, as a shard sees them."""
    triton = pytest.importorskip("hf_longlora.attention.kernels.seen_triton")
    monkeypatch.setattr(seen, "_has_triton", lambda: False)
    documents = Documents((((0, 90), (90, 300)), ((3, 260), (260, 300))), 300)
    for group_size, sink_tokens, first in ((16, 4, 92), (3, 40, 110), (64, 20, 200)):
        parts = documents.parts(4, 2, group_size, sink_tokens=sink_tokens)
        locals_ = [localize(part, (first, 300)) for part in parts]
        before, length = max(local.keys for local in locals_), 300 - first
        assert before > 0
        for local in locals_:
            numbers, _ = seen._by_adjoining(tuple(seen.encoded((local.part,))))
            query, key, value, out, grad, dq, dk, dv = (
                torch.randn(2, size, n, 24, device=DEVICE).transpose(1, 2)
                for n, size in zip((4, 2, 2, 4, 4, 4, 2, 2), (0, 1, 1, 0, 0, 0, 1, 1), strict=True)
                for size in (size * before + length,)
            )
            lse = torch.randn(4, 2, length, device=DEVICE).transpose(0, 1)
            found = []
            for module in (seen, triton):
                merged, total, *gradients = (x.clone() for x in (out, lse, dq, dk, dv))
                shown = (lambda x: x) if module is seen else (lambda x: seen.own_keys(query, x))  # noqa: B023
                module.merge(numbers, Call(query, shown(key), shown(value), merged, total), 0.2)
                given = found[0][:2] if found else (merged, total)
                of_keys = [shown(x) for x in gradients[1:]]
                call = Call(query, shown(key), shown(value), *given)
                module.add_gradients(numbers, grad, call, (gradients[0], *of_keys), 0.2)
                found.append((merged, total, *gradients))
            for plain, fused in zip(*found, strict=True):
                assert torch.allclose(plain, fused, atol=1e-4)


@pytest.mark.parametrize("first", [92, 110, 200])
def test_no_query_is_worked_on_twice_at_once(first):
    """A GPU merges the pieces of a launch at the same time: of two with a query in common one would be lost."""
    documents = Documents((((0, 90), (90, 300)), ((3, 260), (260, 300))), 300)
    together = 0
    for part in documents.parts(4, 2, 16, sink_tokens=40):
        pieces = list(seen.pieces(seen.encoded((localize(part, (first, 300)).part,))))
        at_once = seen.rounds(pieces)
        assert sorted(piece for own in at_once for piece in own) == sorted(pieces)
        for own in at_once:
            queries = [(piece.row, token) for piece in own for token in range(piece.start, piece.end)]
            assert len(queries) == len(set(queries))
        together += len(at_once) > 1
    assert together


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_what_adjoins_is_launched(monkeypatch, device):
    """Of a group that began in an earlier shard: torch's operators give what plain torch does, and are taken."""
    monkeypatch.setattr(seen, "_has_triton", lambda: False)
    monkeypatch.setattr(seen, "CHUNK", 1000)  # several pieces are merged one after the other
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    launched = []
    for name in ("forward", "backward"):
        function = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *a, f=function: launched.append(f.__name__) or f(*a))
    serve = operators.serve
    documents = Documents((((0, 90), (90, 300)), ((3, 260), (260, 300))), 300)
    for group_size, first in ((64, 200), (100, 120), (3, 110)):
        for part in documents.parts(4, 2, group_size):
            local = localize(part, (first, 300))
            numbers = seen.encoded((local.part,))
            if not numbers:
                continue
            assert seen._by_adjoining(tuple(numbers)) == ([], numbers)
            query, key, value, out, grad, dq, dk, dv = (
                torch.randn(2, size, n, 16, device=device, dtype=dtype).transpose(1, 2)
                for n, more in zip((4, 2, 2, 4, 4, 4, 2, 2), (0, 1, 1, 0, 0, 0, 1, 1), strict=True)
                for size in (more * local.keys + 300 - first,)
            )
            lse = torch.randn(4, 2, 300 - first, device=device, dtype=seen.wide(query)).transpose(0, 1)
            found = []
            for serves in (lambda *_: False, serve):
                monkeypatch.setattr(operators, "serve", serves)
                before = len(launched)
                merged, total, *gradients = (x.clone() for x in (out, lse, dq, dk, dv))
                seen.merge(numbers, Call(query, key, value, merged, total), 0.2)
                given = found[0][:2] if found else (merged, total)
                seen.add_gradients(numbers, grad, Call(query, key, value, *given), tuple(gradients), 0.2)
                count = len(numbers) // 9 if serves is serve else 0
                assert launched[before:] == ["forward"] * count + ["backward"] * count
                found.append((merged, total, *gradients))
            for plain, fused in zip(*found, strict=True):
                assert (plain - fused).norm() / plain.norm() < (1e-12 if device == "cpu" else TOLERANCE[dtype])
    assert launched


@on_gpu
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(9, 3), (8, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name not in ("flex", "reference")])
def test_on_a_gpu(kernel, heads, dtype, width):
    """Output and gradients, in one document, packed, and with ragged padding on both sides."""
    tensors = draw(*heads, 700, dim=width, dtype=dtype, device="cuda")
    lack = KERNELS[kernel].lacks(tensors[0], tensors[2])
    if lack:
        pytest.skip(f"it lacks {lack}")
    for sink_tokens in (0, 4, 40):
        check(tensors, 128, kernel, sink_tokens=sink_tokens)
    edges = torch.tensor([0, 90, 220, 221, 600, 700], device="cuda")
    check(tensors, 64, kernel, cu_seqlens=edges)
    mask = torch.ones(3, 400, device="cuda")
    mask[1, :77], mask[2, :5], mask[2, -130:] = 0, 0, 0
    check(draw(*heads, 400, 3, dim=width, dtype=dtype, device="cuda"), 64, kernel, mask=mask)


@on_gpu
def test_no_copies():
    """Memory is what it is without sink tokens, to a tenth of that of the queries."""
    query, key, value = draw(32, 8, 16_384, dim=128, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(query)
    peaks = []
    for sink_tokens in (4, 0, 4, 0):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = s2_attention(query, key, value, group_size=2048, sink_tokens=sink_tokens)
        torch.autograd.grad(out, (query, key, value), grad)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del out
    assert peaks[2] - peaks[3] < 0.1 * query.numel() * query.element_size()
