"""The kernels flash and varlen without a GPU: stand-ins for what they call, of the same signatures.

What the package itself computes is tested where it is installed (`test_kernels.py`). Here: that every launch gets the
right heads, tokens and edges, and that what it writes ends in the right place.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_longlora.attention import kernels
from hf_longlora.attention.kernels import KERNELS, flash, ragged

from .test_compile import fresh_dynamo, one_graph  # noqa: F401
from .test_kernels import HEADS, LAYOUTS, check, draw, every_layout


def attend(q, k, v, edges, scale):
    """`[T, H, D]`, causal within the edges."""
    outs = []
    for a, b in itertools.pairwise(edges.tolist()):
        part = (x[a:b].transpose(0, 1) for x in (q, k, v))
        outs.append(
            F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True).transpose(0, 1)
        )
    return torch.cat(outs)


def lse_of(q, k, edges, scale):
    """Logarithms of what the softmax within the edges divides by: `[H, T]`."""
    outs = []
    for a, b in itertools.pairwise(edges.tolist()):
        query, keys = q[a:b].transpose(0, 1), k[a:b].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
        hidden = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        outs.append((query @ keys.mT * scale).masked_fill(hidden, float("-inf")).logsumexp(-1))
    return torch.cat(outs, dim=1)


def flash_attn_fwd(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse, out, lse
):
    assert causal and return_lse and cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[-1] == len(q) == len(k)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    assert out.shape == (*q.shape[:2], v.shape[-1]) and lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    out.copy_(attend(q, k, v, cu_seqlens_q, softmax_scale))
    lse.copy_(lse_of(q, k, cu_seqlens_q, softmax_scale))


def flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    *,
    softmax_scale,
    causal,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dq,
    dk,
    dv,
):
    assert causal and lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and dout.stride() == out.stride()
    group = q.shape[1] // k.shape[1]
    for a, b in itertools.pairwise(cu_seqlens_q.tolist()):
        query, grad, done, *shared = (x[a:b].transpose(0, 1) for x in (q, dout, out, k, v))
        keys, values = (x.repeat_interleave(group, dim=0) for x in shared)
        hidden = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        # as the packages do: by the output and what the softmax divided by, and not by another softmax
        weights = ((query @ keys.mT * softmax_scale).masked_fill(hidden, float("-inf")) - lse[:, a:b, None]).exp()
        scores = weights * (grad @ values.mT - (grad * done).sum(-1, keepdim=True)) * softmax_scale
        dq[a:b] = (scores @ keys).transpose(0, 1)
        for into, each in ((dk, scores.mT @ query), (dv, weights.mT @ grad)):
            into[a:b] = each.unflatten(0, (-1, group)).sum(1).transpose(0, 1)


def torchs_forward(q, k, v, edges, k_edges, longest, k_longest, dropout, causal, debug, *, scale=None, **none):
    assert (edges == k_edges).all() and longest == k_longest == edges.diff().max() and causal and not dropout
    assert all(value is None for value in none.values())
    lse = lse_of(q, k, edges, scale)
    empty = torch.empty(0)
    return attend(q, k, v, edges, scale), lse, empty, empty, empty


def torchs_backward(
    grad, q, k, v, out, lse, edges, k_edges, longest, k_longest, dropout, causal, rng, unused, *, scale=None, **none
):
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    ends = {"cu_seqlens_q": edges, "cu_seqlens_k": k_edges, "max_seqlen_q": longest, "max_seqlen_k": k_longest}
    into = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    flash_attn_bwd(q, k, v, out, grad, lse, softmax_scale=scale, causal=causal, **ends, **into)
    return tuple(gradients)


@pytest.fixture(params=["package", "torch"])
def stand_in(request, monkeypatch):
    """The kernel "flash" as if its package were installed, or varlen as if torch's operators knew the CPU."""
    if request.param == "torch":
        monkeypatch.setitem(kernels.KERNELS, "flash", kernels.Kernel(function=kernels.varlen.varlen_kernel))
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("_flash_attention_forward", torchs_forward, "CPU")
            library.impl("_flash_attention_backward", torchs_backward, "CPU")
            yield
        return
    package = ModuleType("flash_attn.cute")
    package.interface = SimpleNamespace(_flash_attn_fwd=flash_attn_fwd, _flash_attn_bwd=flash_attn_bwd)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    monkeypatch.setitem(kernels.KERNELS, "flash", kernels.Kernel(function=flash.flash_kernel))
    yield


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("length", [1, 8, 23, 33])
def test_against_oracle(stand_in, heads, length):
    for batch, layout in ((1, "bhsd"), (2, "bshd"), (3, "bhsd")):
        check(draw(*heads, length, batch, layout=layout), 8, "flash")


@pytest.mark.parametrize("heads", [(4, 2), (5, 1)], ids=str)
def test_padding(stand_in, heads):
    mask = torch.ones(4, 27)
    mask[1, :5], mask[2, -14:], mask[3] = 0, 0, 0
    out = check(draw(*heads, 27, 4), 6, "flash", mask=mask)
    assert (out.transpose(1, 2)[mask == 0] == 0).all()


def test_packing(stand_in):
    check(draw(6, 3, 56), 8, "flash", cu_seqlens=torch.tensor([0, 3, 3, 11, 12, 40, 56]))


@pytest.mark.parametrize("heads", [(4, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("sink_tokens", [0, 1, 9, 70])
def test_sink_tokens(stand_in, heads, sink_tokens):
    for group_size in (2, 8):
        check(draw(*heads, 23, 2), group_size, "flash", sink_tokens=sink_tokens)
        edges = torch.tensor([0, 3, 12, 21, 61])
        check(draw(*heads, 61), group_size, "flash", cu_seqlens=edges, sink_tokens=sink_tokens)
    mask = torch.ones(2, 27)
    mask[0, :9], mask[1, -5:] = 0, 0
    check(draw(*heads, 27, 2), 6, "flash", mask=mask, sink_tokens=sink_tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(stand_in, layout):
    for at in range(4):  # of queries, keys, values and the output's gradient
        layouts = ["contiguous"] * at + [layout] + ["tokens before heads"] * (3 - at)
        every_layout("flash", "cpu", torch.float32, layouts, (4, 2), 3, 19, padded=at % 2 == 0)
    every_layout("flash", "cpu", torch.float32, [layout] * 4, (5, 1), 2, 19, padded=True)


def test_launches_are_cut_between_segments(stand_in, monkeypatch):
    monkeypatch.setattr(ragged, "LAUNCH_TOKENS", 20)
    check(draw(4, 2, 61, 3), 8, "flash")


@pytest.mark.parametrize("stand_in", ["package"], indirect=True)
def test_it_is_one_graph(stand_in, fresh_dynamo):  # noqa: F811
    one_graph("flash", "cpu", torch.float32)


@pytest.mark.parametrize("stand_in", ["package"], indirect=True)
def test_auto_takes_it_where_it_is_the_fastest(stand_in, monkeypatch):
    query, _, value = draw(4, 2, 8)
    monkeypatch.setattr(flash, "is_fastest", lambda: False)
    assert kernels.select_kernel("auto", query, value) is KERNELS["sdpa"].function
    monkeypatch.setattr(flash, "is_fastest", lambda: True)
    assert kernels.select_kernel("auto", query, value) is flash.flash_kernel
    assert kernels.select_kernel("auto", query, value, ["dropout_p"]) is KERNELS["sdpa"].function


@pytest.mark.parametrize(
    ("capability", "package", "lack", "fastest"),
    [
        ((8, 0), True, "'varlen' has", False),
        ((9, 0), True, None, True),
        ((9, 0), False, r"pip install 'hf-longlora[flash]'", False),
        ((10, 0), True, None, False),
    ],
)
def test_where_it_can_run_and_where_it_was_measured_to_be_the_fastest(monkeypatch, capability, package, lack, fastest):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(flash, "_has_package", lambda: package)
    assert flash.missing() is None if lack is None else lack in flash.missing()
    assert flash.is_fastest() is fastest


def test_without_the_package_it_is_refused():
    query, _, value = draw(4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'flash' lacks (device 'cpu'|the package flash-attn-4)"):
        kernels.select_kernel("flash", query, value)
    assert KERNELS["flash"].missing is flash.missing


def test_widths_that_the_packages_lack():
    for name, others in (("flash", {32: None, 80: "heads of 80"}), ("varlen", {8: None, 80: None})):
        kernel = dataclasses.replace(KERNELS[name], devices=None, dtypes=None, missing=lambda: None)
        for width, lack in ({256: None, 20: "heads of 20", 288: "heads of 288"} | others).items():
            query, _, value = draw(4, 2, 8, dim=width)
            assert kernel.lacks(query, value) == lack


COMPILE = """
import itertools
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from hf_longlora.attention.kernels import flash, ragged
from hf_longlora.attention.kernels.seen import Call
from hf_longlora.attention.kernels.in_place import ENGINES
from hf_longlora.attention.segments import Segment

assert flash.missing() is None
engine, heads, kv_heads, length, width = ENGINES["flash"], 8, 4, 96, 64
edges = (0, 16, 48, 80, 96)
parts = (
    ((0, 4), (0, 2), (tuple(Segment(at, at + 32) for at in (0, 32, 64)),)),
    ((4, 8), (2, 4), (tuple(Segment(*span) for span in itertools.pairwise(edges)),)),
)
with FakeTensorMode():
    def rows(n):
        return torch.empty(1, length, n, width, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    q, k, v, dq, dk, dv = map(rows, (heads, kv_heads, kv_heads) * 2)
    out, grad = rows(heads), rows(heads)
    lse = torch.empty(heads, 1, length, device="cuda").transpose(0, 1)
    for launch, call in engine.calls(ragged.decoded(ragged.encoded(parts, length, True, 64)), Call(q, k, v, out, lse)):
        engine.forward(launch, call, 0.125)
        own = [(dq, launch.heads), (dk, launch.kv_heads), (dv, launch.kv_heads)]
        gradients = [engine.view(launch, x, h) for x, h in own]
        engine.backward(launch, engine.view(launch, grad, launch.heads), call, gradients, 0.125)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a CUDA build of torch, though no GPU")
def test_version_4_takes_our_launches():
    """The package itself, which compiles for a GPU that is not there: shapes, strides and alignment are its own."""
    pytest.importorskip("flash_attn.cute", exc_type=ImportError)
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=os.environ | target, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("compiled\n"), done.stderr[-3000:]
