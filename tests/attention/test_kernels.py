"""Every kernel against the brute-force oracle, outputs and gradients, on fresh random inputs."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend

from hf_longlora import s2_attention
from hf_longlora.attention import Documents, kernels
from hf_longlora.attention.kernels import KERNELS, operators, ragged, sdpa, seen, select_kernel
from hf_longlora.attention.segments import Part

from .oracle import oracle

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ANYWHERE = [name for name, kernel in KERNELS.items() if kernel.devices is None]
# (kernel, device, dtype) of all that this machine can run; kernels of half precision alone are tested in that
RUNS = [
    (name, device, dtype)
    for device in DEVICES
    for name, kernel in KERNELS.items()
    if (kernel.devices is None or device in kernel.devices) and kernel.missing() is None
    for dtype in [torch.float32 if kernel.dtypes is None else torch.bfloat16]
]
every_kernel = pytest.mark.parametrize(("kernel", "device", "dtype"), RUNS, ids=lambda x: str(x))
HEADS = [(4, 4), (4, 2), (6, 3), (3, 3), (5, 1), (1, 1), (8, 2)]
# relative error of the norm, outputs and gradients
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def draw(heads, kv_heads, length, batch=1, dim=16, dim_v=None, dtype=torch.float32, device="cpu", layout="bshd"):
    """Random q, k, v `[B, H, S, D]`, as transformers hands them over (a transposed view) or contiguous."""
    tensors = []
    for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, dim_v or dim)):
        shape = (batch, length, n, d) if layout == "bshd" else (batch, n, length, d)
        x = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
        x = x.transpose(1, 2) if layout == "bshd" else x
        tensors.append(x.detach().requires_grad_())
    return tensors


def rows_of(batch, length, mask=None, cu_seqlens=None):
    if cu_seqlens is not None:
        edges = cu_seqlens.tolist()
        return [[(a, b) for a, b in itertools.pairwise(edges) if a < b]]
    if mask is None:
        return [[(0, length)]] * batch
    rows = []
    for row in mask:
        real = row.nonzero().flatten().tolist()
        rows.append([(real[0], real[-1] + 1)] if real else [])
    return rows


def check(tensors, group_size, kernel, mask=None, cu_seqlens=None, scale=None, sink_tokens=4):
    query = tensors[0]
    batch, _, length, _ = query.shape
    out = s2_attention(
        *tensors,
        group_size=group_size,
        sink_tokens=sink_tokens,
        kernel=kernel,
        attention_mask=mask,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )
    compare(out, tensors, rows_of(batch, length, mask, cu_seqlens), group_size, scale, sink_tokens)
    return out


def compare(out, tensors, rows, group_size, scale=None, sink_tokens=0):
    """Output `[B, H, S, D_v]` and gradients with the oracle's."""
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), tensors)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = oracle(*doubles, rows, group_size, scale, sink_tokens=sink_tokens)
    expected_gradients = torch.autograd.grad((expected * weight.double()).sum(), doubles)
    tolerance = TOLERANCE[out.dtype]
    for name, got, want in zip(
        ("out", "dq", "dk", "dv"), (out, *gradients), (expected, *expected_gradients), strict=True
    ):
        assert got.isfinite().all(), name
        error = (got.double() - want).norm() / want.norm().clamp(min=1.0)  # dq of a single token is exactly 0
        assert error < tolerance, (name, error.item())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("kernel", "device", "dtype"), [run for run in RUNS if run[1] == "cuda"], ids=str)
def test_a_device_other_than_the_current_one(kernel, device, dtype):
    """As the layers of a model that `device_map` spreads over GPUs: they run with the first one as the current."""
    assert torch.cuda.current_device() == 0
    for batch, mask in ((1, None), (2, torch.tensor([[1] * 200, [0] * 30 + [1] * 170], device="cuda:1"))):
        tensors = draw(8, 2, 200, batch, dim=64, dtype=dtype, device="cuda:1")
        assert check(tensors, 32, kernel, mask=mask).device.index == 1


@every_kernel
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 23, 33])
def test_against_oracle(kernel, heads, length, device, dtype):
    for batch, layout in ((1, "bhsd"), (2, "bshd"), (3, "bhsd")):
        check(draw(*heads, length, batch, dim=32, dtype=dtype, device=device, layout=layout), 8, kernel)


@every_kernel
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [2, 3, 8, 64, None])
def test_half_precision_and_group_sizes(kernel, dtype, half, group_size, device):
    check(draw(4, 2, 29, 2, dim=32, dtype=half, device=device), group_size, kernel)


@every_kernel
@pytest.mark.parametrize("dim", [8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 192, 256])
def test_each_width_is_right_or_refused(kernel, dim, dtype, device):
    tensors = draw(4, 2, 70, 2, dim=dim, dtype=dtype, device=device)
    if KERNELS[kernel].lacks(tensors[0], tensors[2]):
        assert dim % 32
        with pytest.raises(ValueError, match=f"heads of {dim}"):
            check(tensors, 32, kernel)
    else:
        check(tensors, 32, kernel)


@every_kernel
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_of_each_row_by_another_amount(kernel, side, device, dtype):
    length = 27
    mask = torch.ones(4, length, dtype=torch.long, device=device)
    for row, pads in enumerate((0, 5, 14, length)):
        if side in ("left", "both"):
            mask[row, :pads] = 0
        if side in ("right", "both") and pads:
            mask[row, -max(1, pads // 2 if side == "both" else pads) :] = 0
    for heads in ((4, 2), (5, 1)):
        tensors = draw(*heads, length, 4, dim=32, dtype=dtype, device=device)
        out = check(tensors, 6, kernel, mask=mask)
        assert (out.transpose(1, 2)[mask == 0] == 0).all()


@every_kernel
def test_slices_of_a_fused_projection(kernel, device, dtype):
    """As models with one projection for queries, keys and values hand them over: no slice is dense in memory."""
    for batch in (1, 2):
        fused = torch.randn(batch, 40, 8, 32, device=device).to(dtype)
        tensors = [x.transpose(1, 2).detach().requires_grad_() for x in fused.split([4, 2, 2], dim=2)]
        check(tensors, 8, kernel)


def shaped(shape, layout, device, dtype):
    """A random `[B, H, S, D]` of some layout in memory, and the tensor, of fewer elements or more, that it views."""

    def random(*sizes):
        return torch.randn(sizes, device=device).to(dtype).requires_grad_()

    batch, heads, length, width = shape
    match layout:
        case "expanded over heads":
            base = random(batch, 1, length, width)
            return base, base.expand(shape)
        case "expanded over rows":
            base = random(1, heads, length, width)
            return base, base.expand(shape)
        case "expanded over tokens":
            base = random(batch, heads, 1, width)
            return base, base.expand(shape)
        case "one number":
            # At most 1: equal keys have gradients of 0, and what rounding leaves of these grows with the product.
            base = random(1).detach().clamp(-1, 1).requires_grad_()
            return base, base.expand(shape)
        case "tokens before heads":
            base = random(batch, length, heads, width)
            return base, base.transpose(1, 2)
        case "tokens before rows":
            base = random(length, batch, heads, width)
            return base, base.permute(1, 2, 0, 3)
        case "width first":
            base = random(width, length, heads, batch)
            return base, base.permute(3, 2, 1, 0)
        case "channels last":
            base = random(*shape)
            return base, base.contiguous(memory_format=torch.channels_last)
        case "every second":
            base = random(2 * batch, 2 * heads, 2 * length, 2 * width)
            return base, base[::2, ::2, ::2, ::2]
        case "a window":
            base = random(batch + 1, heads + 2, length + 3, width + 5)
            return base, base[1:, 1:-1, 2:-1, 3:-2]
        case "overlapping":
            base = random(batch, heads, length + width - 1)
            return base, base.unfold(2, width, 1)
    return (base := random(*shape)), base


LAYOUTS = [
    *("contiguous", "expanded over heads", "expanded over rows", "expanded over tokens", "one number"),
    *("tokens before heads", "tokens before rows", "width first", "channels last", "every second", "a window"),
    "overlapping",
]


@pytest.mark.parametrize(("kernel", "device", "dtype"), [run for run in RUNS if run[0] != "flex"], ids=str)
@settings(max_examples=60)
@given(
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    heads=st.sampled_from([(4, 2), (4, 4), (5, 1)]),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    padded=st.booleans(),
)
# Whole groups in each row, so that launches would join the rows if they followed one another.
@example(layouts=("every second",) * 4, heads=(4, 2), batch=2, length=32, padded=False)
@example(
    layouts=("contiguous", "expanded over rows", "a window", "contiguous"),
    heads=(4, 4),
    batch=3,
    length=16,
    padded=False,
)
def test_any_layout_in_memory(kernel, device, dtype, layouts, heads, batch, length, padded):
    """Of queries, keys, values and the output's gradient; gradients are those of what the views were made from."""
    every_layout(kernel, device, dtype, layouts, heads, batch, length, padded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
@pytest.mark.parametrize("layout", ["contiguous", "expanded over heads", "channels last", "a window"])
def test_any_layout_in_memory_for_flex(layout):
    """Which compiles anew for each shape and layout."""
    every_layout("flex", "cuda", torch.float32, [layout] * 4, (4, 2), 2, 40, padded=True)


def every_layout(kernel, device, dtype, layouts, heads, batch, length, padded):
    sizes = [(batch, n, length, 32) for n in (heads[0], heads[1], heads[1], heads[0])]
    pairs = [shaped(size, layout, device, dtype) for size, layout in zip(sizes, layouts, strict=True)]
    bases, views = zip(*pairs, strict=True)
    mask = None
    if padded:
        mask = torch.ones(batch, length, device=device)
        mask[0, : length // 3], mask[-1, length - length // 4 :] = 0, 0
    (*leaves, _), (*tensors, weight) = bases, views
    out = s2_attention(*tensors, group_size=8, kernel=kernel, attention_mask=mask)
    gradients = torch.autograd.grad(out, leaves, weight.detach())
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = oracle(*doubles, rows_of(batch, length, mask), 8, sink_tokens=4)
    of_views = torch.autograd.grad((expected * weight.detach().double()).sum(), doubles)
    wanted = torch.autograd.grad(tensors, leaves, [x.to(dtype) for x in of_views])
    for name, got, want in zip(("out", "dq", "dk", "dv"), (out, *gradients), (expected, *wanted), strict=True):
        # A sum over what was expanded may come to little: its error is that of what is added up.
        size = want.double().norm().clamp(min=max(1.0, *(x.norm() for x in of_views)))
        assert (got.double() - want.double()).norm() / size < 4 * TOLERANCE[dtype], name


@every_kernel
def test_packed_documents(kernel, device, dtype):
    cu_seqlens = torch.tensor([0, 3, 3, 11, 12, 40, 56], device=device)
    check(draw(6, 3, 56, dim=32, dtype=dtype, device=device), 8, kernel, cu_seqlens=cu_seqlens)


@every_kernel
@pytest.mark.parametrize("heads", [(4, 2), (6, 3), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("sink_tokens", [0, 1, 4, 70])
def test_sink_tokens(kernel, heads, sink_tokens, device, dtype):
    """Fewer than, more than and across groups, more than there are, in documents just over a group and below."""
    lengths = torch.tensor([0, 3, 12, 21, 61, 63, 66])
    for group_size in (2, 3, 8):
        for batch, layout in ((1, "bhsd"), (2, "bshd")):
            tensors = draw(*heads, 23, batch, dim=32, dtype=dtype, device=device, layout=layout)
            check(tensors, group_size, kernel, sink_tokens=sink_tokens)
        tensors = draw(*heads, 66, dim=32, dtype=dtype, device=device)
        check(tensors, group_size, kernel, cu_seqlens=lengths.to(device), sink_tokens=sink_tokens)
    mask = torch.ones(3, 27, device=device)
    mask[1, :9], mask[2, -5:] = 0, 0
    check(draw(*heads, 27, 3, dim=32, dtype=dtype, device=device), 6, kernel, mask=mask, sink_tokens=sink_tokens)


@every_kernel
def test_sink_tokens_are_seen_from_afar(kernel, device, dtype):
    query, key, value = (x.detach() for x in draw(4, 2, 33, dim=32, dtype=dtype, device=device))
    outputs = [s2_attention(query, key, value, group_size=8, kernel=kernel, sink_tokens=n) for n in (2, 0)]
    value = value.clone()
    value[:, :, :3] += 1.0
    for sink_tokens, before in zip((2, 0), outputs, strict=True):
        after = s2_attention(query, key, value, group_size=8, kernel=kernel, sink_tokens=sink_tokens)
        moved = (after - before).abs().amax((0, 1, 3)) > 0
        assert moved.all() if sink_tokens else not moved[8:].any()


@every_kernel
def test_many_tokens_take_several_launches(kernel, device, dtype, monkeypatch):
    for module in (sdpa, ragged):
        monkeypatch.setattr(module, "LAUNCH_TOKENS", 20)
    for batch in (1, 3):
        check(draw(4, 2, 61, batch, dim=32, dtype=dtype, device=device), 8, kernel)
        check(draw(4, 2, 64, batch, dim=32, dtype=dtype, device=device), 8, kernel)


@pytest.mark.parametrize("kernel", ANYWHERE)
def test_value_dim_and_scale(kernel):
    check(draw(4, 2, 21, 2, dim=24, dim_v=16), 8, kernel, scale=0.3)


@settings(max_examples=100)
@given(
    heads=st.sampled_from(HEADS),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    group_size=st.integers(2, 50),
    # tokens of padding and of a document, by turns
    packed=st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 24)), max_size=5), min_size=3, max_size=3),
    alike=st.booleans(),
    layout=st.sampled_from(["bshd", "bhsd"]),
    limit=st.integers(1, 80),
    by_autograd=st.booleans(),
    sink_tokens=st.integers(0, 12),
)
def test_random_documents(heads, batch, length, group_size, packed, alike, layout, limit, by_autograd, sink_tokens):
    """Documents packed into rows with padding between them, told by mask and positions, in launches of any size."""
    mask, positions = torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length, dtype=torch.long)
    rows = []
    for row in range(batch):
        rows.append([])
        end = 0
        for gap, size in packed[0 if alike else row]:
            start, end = end + gap, min(end + gap + size, length)
            if start < end:
                rows[-1].append((start, end))
                mask[row, start:end], positions[row, start:end] = 1, torch.arange(end - start)
    assume(any(rows))
    documents = Documents.find(batch, length, attention_mask=mask, position_ids=positions)
    assert [list(row) for row in documents.rows] == rows
    tensors = draw(*heads, length, batch, dim=8, layout=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "LAUNCH_TOKENS", limit)
        if by_autograd:
            patch.setattr(operators, "serve", lambda *_: False)
        patch.setattr(seen, "CHUNK", 4 * limit)
        parts = documents.parts(*heads, group_size, sink_tokens=sink_tokens)
        out = sdpa.sdpa_kernel(*tensors, parts).transpose(1, 2)
        compare(out, tensors, rows, group_size, sink_tokens=sink_tokens)


@every_kernel
def test_no_earlier_output_moves_with_a_later_token(kernel, device, dtype):
    """The causality probe: what the published no-flash path and LLaMA-Factory's version would fail."""
    query, key, value = (x.detach() for x in draw(4, 2, 33, dim=32, dtype=dtype, device=device))
    before = s2_attention(query, key, value, group_size=8, kernel=kernel)
    for token in range(33):
        moved = [x.clone() for x in (query, key, value)]
        for x in moved:
            x[:, :, token] += 1.0
        after = s2_attention(*moved, group_size=8, kernel=kernel)
        changed = (after - before).abs().amax((0, 1, 3)) > 0
        assert not changed[:token].any(), token
        assert changed[token]


def test_documents_do_not_see_each_other():
    query, key, value = (x.detach() for x in draw(4, 2, 30))
    cu_seqlens = torch.tensor([0, 11, 30])
    before = s2_attention(query, key, value, group_size=4, cu_seqlens=cu_seqlens)
    value = value.clone()
    value[:, :, :11] += 1.0
    after = s2_attention(query, key, value, group_size=4, cu_seqlens=cu_seqlens)
    assert torch.equal(before[:, :, 11:], after[:, :, 11:])


@pytest.mark.parametrize("sink_tokens", [0, 3])
def test_gradients_are_those_of_finite_differences(sink_tokens):
    tensors = [x.detach().double().requires_grad_() for x in draw(2, 1, 9, dim=4)]
    for kernel in ANYWHERE:
        attend = partial(s2_attention, group_size=4, sink_tokens=sink_tokens, kernel=kernel)
        assert torch.autograd.gradcheck(attend, tensors, atol=1e-9, rtol=1e-6)


def test_second_derivatives_are_right_or_refused():
    """No kernel's backward has one of its own: autograd says so, and the reference is right."""
    tensors = draw(2, 1, 9, dim=4)
    directions = [torch.randn_like(x) for x in tensors]

    def hessian_times_directions(attend):
        gradients = torch.autograd.grad(attend(*tensors).double().square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)), tensors)

    options = dict(group_size=4, sink_tokens=1)
    expected = hessian_times_directions(lambda q, k, v: oracle(q, k, v, rows_of(1, 9), **options))
    found = hessian_times_directions(lambda q, k, v: s2_attention(q, k, v, kernel="reference", **options))
    for right, got in zip(expected, found, strict=True):
        assert right.abs().max() > 0.1 and (got - right).norm() <= 1e-4 * right.norm()
    with pytest.raises(RuntimeError, match=r"backward"):
        hessian_times_directions(lambda q, k, v: s2_attention(q, k, v, **options))


def like(query=(2, 4, 8, 16), key=(2, 2, 8, 16), value=(2, 2, 8, 16), **options):
    return [torch.randn(shape, **options) for shape in (query, key, value)]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (like(query=(1, 4, 8, 16)), "one batch"),  # would be broadcast, and rows dropped
        (like(key=(1, 2, 8, 16), value=(1, 2, 8, 16)), "one batch"),
        (like(value=(1, 2, 8, 16)), "one batch"),
        (like(key=(2, 2, 4, 16), value=(2, 2, 4, 16)), "one length"),
        (like(value=(2, 4, 8, 16)), "as many heads"),
        (like(key=(2, 3, 8, 16), value=(2, 3, 8, 16)), "multiple"),
        (like(key=(2, 2, 8, 8)), "one width"),
        (like(query=(4, 8, 16)), "must be \\[B, H, S, D\\]"),
        (like(query=(2, 4, 0, 16), key=(2, 2, 0, 16), value=(2, 2, 0, 16)), "empty"),
        (
            [x.to(t) for x, t in zip(like(), (torch.float32, torch.float16, torch.float32), strict=True)],
            "one floating",
        ),
        ([x.to(torch.int64) for x in like()], "one floating"),
        ([*like()[:2], torch.empty(2, 2, 8, 16, device="meta")], "one device"),
    ],
    ids=lambda given: given if isinstance(given, str) else "tensors",
)
def test_tensors_that_do_not_fit_are_refused(tensors, message):
    for kernel in ("auto", *ANYWHERE):
        with pytest.raises(ValueError, match=message):
            s2_attention(*tensors, group_size=4, kernel=kernel)


def test_groups_and_sink_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        s2_attention(*like(), group_size=1)
    with pytest.raises(ValueError, match="sink_tokens"):
        s2_attention(*like(), group_size=4, sink_tokens=-1)


@every_kernel
def test_autocast_is_that_of_torchs_own_attention(kernel, device, dtype):
    """Floats are computed in autocast's dtype, doubles stay what they are."""
    lacks = KERNELS[kernel].dtypes is not None
    for own in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        tensors = draw(4, 2, 40, dim=32, dtype=own, device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            if lacks and own == torch.float64:
                with pytest.raises(ValueError, match="float64"):
                    s2_attention(*tensors, group_size=8, kernel=kernel)
                continue
            out = s2_attention(*tensors, group_size=8, kernel=kernel)
            wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True).dtype
        assert out.dtype == wanted == (own if own == torch.float64 else torch.bfloat16)
        rounded = [x.detach().to(wanted).double() for x in tensors]
        expected = oracle(*rounded, [[(0, 40)]], 8, sink_tokens=4)
        error = (out.double() - expected).norm() / expected.norm()
        assert error < (1e-12 if own == torch.float64 else TOLERANCE[torch.bfloat16])
        gradients = torch.autograd.grad(out.sum(), tensors)
        assert all(g.dtype == own and g.isfinite().all() for g in gradients)


@every_kernel
def test_forward_mode_is_right_or_refused(kernel, device, dtype):
    """`torch.func.jvp` with one tangent and with all; a kernel without forward derivatives must not give 0."""
    tensors = [x.detach() for x in draw(4, 2, 20, dim=32, dtype=dtype, device=device)]
    tangents = [torch.randn_like(x) for x in tensors]
    for moved in ((0, 1, 2), (0,), (1,), (2,)):

        def attend(*some, moved=moved, **options):
            given = dict(zip(moved, some, strict=True))
            inputs = [given.get(index, x) for index, x in enumerate(tensors)]
            return s2_attention(*inputs, group_size=8, **options)

        of_moved = [tuple(x[i] for i in moved) for x in (tensors, tangents)]
        if kernel != "reference":
            with pytest.raises(Exception, match=r"(?i)forward|functorch|jvp"):
                torch.func.jvp(partial(attend, kernel=kernel), *of_moved)
            continue
        _, got = torch.func.jvp(partial(attend, kernel=kernel), *of_moved)
        step = 1e-3
        ends = [
            attend(*(x + sign * step * t for x, t in zip(*of_moved, strict=True)), kernel=kernel) for sign in (1, -1)
        ]
        assert torch.allclose(got, (ends[0] - ends[1]) / (2 * step), atol=1e-2)


def test_a_named_kernel_that_cannot_serve_raises():
    query, _, value = draw(4, 2, 8)
    with pytest.raises(ValueError, match=r"'sdpa' lacks softcap.*reference"):
        select_kernel("sdpa", query, value, ["softcap"])
    with pytest.raises(ValueError, match="lacks learned attention sinks"):
        select_kernel("auto", query, value, ["learned_sinks"])
    with pytest.raises(ValueError, match=r"'varlen' lacks device 'cpu'"):
        select_kernel("varlen", query, value)
    assert select_kernel("reference", query, value, ["learned_sinks"]) is KERNELS["reference"].function


@pytest.mark.parametrize("name", operators.ARGUMENTS)
def test_this_torch_has_the_operators_as_they_are_called(name):
    assert operators.missing(name) is None


@pytest.mark.parametrize(
    "schema",
    [
        None,
        "(Tensor key, Tensor query, Tensor value, float dropout_p=0., bool is_causal=False, *, float? scale=None)",
        "(Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal, Tensor new, *, float? scale=None)",
        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False)",
    ],
    ids=["gone", "another order", "an argument more", "no scale"],
)
def test_operators_of_another_torch_are_not_called(monkeypatch, schema):
    """Where a private operator has changed, attention is the public function's, and it is said."""
    name, told = "_scaled_dot_product_flash_attention_for_cpu", []
    other = schema and SimpleNamespace(
        default=SimpleNamespace(_schema=torch._C.parse_schema(f"aten::{name}{schema} -> Tensor"))
    )
    monkeypatch.setattr(torch.ops.aten, name, other)
    monkeypatch.setattr(operators.logger, "warning_once", told.append)
    operators.missing.cache_clear()
    try:
        check(draw(4, 2, 29), 8, "sdpa")
    finally:
        operators.missing.cache_clear()
    assert name in told[0] and "scaled_dot_product_attention" in told[0]


def test_short_launches_are_not_cudnns(monkeypatch):
    """Which makes a plan for each shape: lengths of documents are always others, those of groups are not."""

    def taken(segments, tokens):
        query = torch.empty(segments, 8, tokens, 64, device="meta")
        return operators._cudnn(query, query, query, True)

    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.CUDNN_ATTENTION.value)
    shapes = ((1, 100), (1, 8191), (2, 100), (1, 8193), (90, 100), (1, 2048), (2, 256))
    assert [taken(*shape) for shape in shapes] == [False] * 3 + [True] * 4
    with torch.nn.attention.sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # no FlashAttention
        assert taken(1, 100)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.FLASH_ATTENTION.value)
    assert not taken(1, 8192)


@pytest.mark.parametrize("heads", [4, 8])
def test_cudnn_gets_queries_that_lie_as_the_output(monkeypatch, heads):
    """torch keeps a plan by the strides of queries, and runs it on an output of others: a read out of bounds."""
    got = []
    name = "_scaled_dot_product_cudnn_attention_backward"
    monkeypatch.setattr(torch.ops.aten, name, lambda grad, query, *_, **__: got.append(query) or (query,) * 3)
    monkeypatch.setattr(operators, "_cudnn", lambda *_: True)
    of_all = torch.empty(2, 32, 8, 16, device="meta").transpose(1, 2)
    query, key = of_all[:, :heads], torch.empty(2, 2, 32, 16, device="meta")
    out = torch.empty(2, 32, heads, 16, device="meta").transpose(1, 2)
    operators.backward(out, query, key, key, out, torch.empty(2, heads, 32, device="meta"), True, 1.0)
    assert got[0].stride() == out.stride() and got[0].shape == query.shape
    assert (got[0] is query) == (heads == 8)  # copied only where it has to be
    if heads == 8:
        row, others = of_all[:1], (key[:1], key[:1], out[:1], torch.empty(1, heads, 32, device="meta"))
        row = row.as_strided(row.shape, (7, *row.stride()[1:]))
        operators.backward(out[:1], row, *others, True, 1.0)
        assert got[1] is row


@pytest.mark.gpu
def test_a_slice_of_heads_has_the_gradients_of_the_whole():
    """One after the other in a process, equal but for how the output lies."""
    tensors = draw(8, 4, 2048, dim=128, dtype=torch.bfloat16, device="cuda")
    whole = s2_attention(*tensors, group_size=256, kernel="sdpa")
    of_whole = torch.autograd.grad(whole, tensors, torch.ones_like(whole))
    (heads, kv_heads, rows), _ = Documents.find(1, 2048).parts(8, 4, 256, sink_tokens=4)
    own = [x[:, slice(*span)] for x, span in zip(tensors, (heads, kv_heads, kv_heads), strict=True)]
    part = KERNELS["sdpa"].function(*own, (Part(heads, kv_heads, rows),)).transpose(1, 2)
    of_part = torch.autograd.grad(part, tensors, torch.ones_like(part))
    for a, b, span in zip(of_whole, of_part, (heads, kv_heads, kv_heads), strict=True):
        torch.testing.assert_close(a[:, slice(*span)], b[:, slice(*span)])


@pytest.mark.parametrize(
    ("ends", "group_size", "taken"),
    [
        ([4096], 64, "sdpa"),  # groups of a document are one launch however short they are
        ([4096], None, "sdpa"),
        (range(100, 4100, 100), None, "sdpa"),  # equal ones, too
        ([*range(97, 4000, 97), 4000], 512, "sdpa"),
        (list(itertools.accumulate(range(60, 140))), None, "varlen"),
        (list(itertools.accumulate(range(60, 140))), 64, "varlen"),
        (list(itertools.accumulate(range(2000, 2010))), 1024, "varlen"),
        ([4100], 1024, "sdpa"),  # a document of a length that its groups don't divide
        ([3000, 4100], None, "sdpa"),  # few
        ([*range(8200, 49800, 8300), 49800], None, "sdpa"),  # long
    ],
    ids=str,
)
def test_auto_takes_varlen_for_many_short_documents(monkeypatch, ends, group_size, taken):
    names = []

    def noted(name):
        return replace(
            KERNELS[name],
            function=lambda query, *_, **__: names.append(name) or query.transpose(1, 2),
            missing=lambda: None,
            devices=None,
            dtypes=None,
        )

    monkeypatch.setattr(kernels, "preference", lambda: ("sdpa",))
    for name in ("sdpa", "varlen"):
        monkeypatch.setitem(KERNELS, name, noted(name))
    tensors = draw(4, 2, ends[-1])
    s2_attention(*tensors, group_size=group_size, cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32))
    s2_attention(*tensors, group_size=group_size, cu_seqlens=torch.tensor([0, *ends]), kernel="sdpa")
    assert names == [taken, "sdpa"]
