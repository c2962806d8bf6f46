"""Layers with a sliding window or chunks, block by block, against the whole mask."""

import copy
from functools import partial
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_chunked_causal_mask, create_sliding_window_causal_mask

from hf_longlora import S2AttentionConfig, s2_attention_mode, set_s2_attention
from hf_longlora.attention import interface, mask, set_attention_mode
from hf_longlora.attention.blocks import attend_in_blocks, by_position, seen_in_blocks
from hf_longlora.attention.mask import S2Mask
from hf_longlora.evaluation import compare_attention

from ..test_families import CHUNKED, OWN_ATTENTION, WINDOWED, build, logits
from .oracle import Largest


def made(kind, window, batch, length, implementation="s2attn", padding=None, **options):
    """The mask of a layer with a window or chunks, as transformers makes it for an attention implementation."""
    config = LlamaConfig(sliding_window=window, attention_chunk_size=window)
    config._attn_implementation = implementation
    create = {"sliding": create_sliding_window_causal_mask, "chunked": create_chunked_causal_mask}[kind]
    return create(config, torch.zeros(batch, length, 8), padding, None, **options)


def padded(batch, length, side):
    """Rows that are padded by 0, 5, 10, ... tokens."""
    real = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        missing = min(5 * row, length - 1)
        real[row, length - missing if side == "right" else 0 : length if side == "right" else missing] = 0
    return real


def packed(batch, length):
    """Positions of rows that are cut, each elsewhere, into documents of unlike length."""
    rows = [[(at - cut) if at >= cut else at for at in range(length)] for cut in (length // 3, length - 2)]
    return torch.tensor((rows * batch)[:batch]).clamp(min=0)


CASES = {
    "plain": lambda batch, length: {},
    "left": lambda batch, length: {"padding": padded(batch, length, "left")},
    "right": lambda batch, length: {"padding": padded(batch, length, "right")},
    "packed": lambda batch, length: {"position_ids": packed(batch, length)},
}


def sdpa(groups, **options):
    """Dense attention as transformers calls it; `[B, S, H, D_v]`."""
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    return lambda *tensors: sdpa_attention_forward(module, *tensors, **options)[0]


def tensors(batch, length, heads=4, kv_heads=2, dim=8, value_dim=8, dtype=torch.float64):
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim)]
    made = [torch.randn(batch, length, number, width, dtype=dtype).transpose(1, 2) for number, width in shapes]
    return [x.requires_grad_() for x in made]


def agree(attend, inputs, blocks, dense, atol, weight=None):
    """Outputs and gradients by blocks and by the whole mask."""
    out, expected = attend_in_blocks(attend, *inputs, blocks), attend(*inputs, dense)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    weight = torch.randn_like(expected) if weight is None else weight
    got, right = (torch.autograd.grad((o * weight).sum(), inputs) for o in (out, expected))
    for ours, theirs in zip((out, *got), (expected, *right), strict=True):
        assert torch.allclose(ours, theirs, atol=atol, rtol=atol), (ours - theirs).abs().max()


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("window", "length"), [(1, 20), (5, 40), (16, 17), (16, 48), (33, 100), (64, 131)])
def test_it_is_the_whole_mask_s_attention(kind, case, window, length):
    """Rows that see nothing among them."""
    options = CASES[case](3, length)
    ours, dense = made(kind, window, 3, length, **options), made(kind, window, 3, length, "sdpa", **options)
    assert isinstance(ours, S2Mask)
    blocks = ours.in_blocks()
    assert blocks is not None and ours.in_blocks() is blocks
    agree(sdpa(2, scaling=0.3), tensors(3, length, value_dim=6), blocks, dense, 1e-10)


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
@pytest.mark.parametrize("length", [1, 15, 16])
def test_where_no_token_is_beyond_the_window_the_whole_mask_is_small(kind, length):
    assert made(kind, 16, 1, length).in_blocks() is None
    assert made(kind, 16, 1, 17).in_blocks() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 256])
def test_dtypes_and_widths(dtype, dim):
    """No farther from fp64 than the whole mask, twice over."""
    inputs = tensors(2, 70, 4, 1, dim, dim, torch.float64)
    lower = [x.detach().to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in lower]
    options = CASES["left"](2, 70)
    blocks, dense = made("sliding", 20, 2, 70, **options).in_blocks(), made("sliding", 20, 2, 70, "sdpa", **options)
    attend, results = sdpa(4), []
    outs = (attend(*exact, dense), attend_in_blocks(attend, *lower, blocks), attend(*lower, dense))
    weight = torch.randn_like(outs[0])
    for out, leaves in zip(outs, (exact, lower, lower), strict=True):
        results.append([out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)])
    for right, ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert (ours - right).norm() <= 2 * (theirs - right).norm() + 1e-12


def test_a_token_moves_those_that_see_it_and_no_others():
    window, length = 21, 90
    query, key, value = tensors(1, length)
    blocks = made("sliding", window, 1, length).in_blocks()
    before = attend_in_blocks(sdpa(2), query, key, value, blocks)
    for at in (0, 7, 31, 32, 88, 89):
        moved = value.detach().clone()
        moved[:, :, at] += 1
        changed = (attend_in_blocks(sdpa(2), query, key, moved, blocks) != before).any(-1).any(-1)[0]
        assert changed.nonzero().flatten().tolist() == list(range(at, min(at + window, length)))


@pytest.mark.parametrize(("window", "length"), [(4, 12), (4, 40), (20, 12), (20, 70)])
def test_where_positions_skip(window, length):
    """By the definition, written out."""
    position = [7 * (at // 5) + at for at in range(length - 7)] + [3, 4, 5, 9, 10, 11, 30]
    owner = [0] * (length - 7) + [1] * 7
    function = by_position(window, torch.tensor([0, length - 7, length], dtype=torch.int32), torch.tensor([position]))
    seen = [
        [owner[i] == owner[j] and 0 <= position[i] - position[j] < window for j in range(length)]
        for i in range(length)
    ]
    blocks = seen_in_blocks(function, 1, length, window, "cpu")
    agree(sdpa(2), tensors(1, length), blocks, torch.tensor(seen)[None, None], 1e-10)


def test_what_is_no_longer_than_the_window_is_one_block():
    everywhere = torch.tensor([0, 40], dtype=torch.int32), torch.arange(40)[None]
    for window, shape in ((4096, (40, 40)), (40, (40, 40)), (39, (32, 80)), (4, (16, 32))):
        blocks = seen_in_blocks(by_position(window, *everywhere), 1, 40, window, "cpu")
        assert blocks.shape == (1, -(-40 // shape[0]), 1, *shape)


def test_dropout_drops_and_leaves_the_mean():
    query, key, _ = tensors(1, 4096, dtype=torch.float32)
    blocks = made("sliding", 32, 1, 4096).in_blocks()
    ones = torch.ones_like(key)
    out = attend_in_blocks(sdpa(2, dropout=0.5), query, key, ones, blocks)
    assert out.std() > 0.1 and abs(out.mean() - 1) < 0.02
    assert torch.allclose(attend_in_blocks(sdpa(2), query, key, ones, blocks), torch.ones(()))


# -- what is known to be no farther than a window ------------------------------------------------------------------


def even_keys(batch, head, query, key):
    return key % 2 == 0


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
@pytest.mark.parametrize(
    "options",
    [
        {"and_mask_function": even_keys},
        {"and_mask_function": partial(even_keys)},
        {"or_mask_function": even_keys},
        {"block_sequence_ids": torch.tensor([[-1] * 4 + [0] * 30 + [-1] * 6])},
        {"block_sequence_ids": torch.tensor([[-1] * 4 + [0] * 30 + [-1] * 6]), "position_ids": packed(1, 40)},
    ],
    ids=["and", "no function", "or", "blocks", "blocks, packed"],
)
def test_a_mask_that_is_shaped_otherwise_stays_whole(kind, options):
    if kind == "chunked" and "block_sequence_ids" not in signature(create_chunked_causal_mask).parameters:
        options = {"or_mask_function": even_keys}  # older transformers
    ours, dense = made(kind, 8, 1, 40, **options), made(kind, 8, 1, 40, "sdpa", **options)
    assert ours.in_blocks() is None and torch.equal(ours.dense(), dense)
    assert made(kind, 8, 1, 40).in_blocks() is not None


def test_masks_that_are_not_causal_or_have_no_window_stay_whole():
    config = LlamaConfig(sliding_window=8, is_causal=False)
    config._attn_implementation = "s2attn"
    both_ways = create_sliding_window_causal_mask(config, torch.zeros(1, 40, 8), torch.ones(1, 40).long(), None)
    assert isinstance(both_ways, S2Mask) and both_ways.window == 8 and both_ways.in_blocks() is None
    # Functions that show more, whatever is said beside them.
    for function in (masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(8)):
        assert mask.s2_mask(1, 40, 40, local_size=8, mask_function=function).in_blocks() is None


# -- in models -----------------------------------------------------------------------------------------------------


def whole(family):
    """The family by whole masks, and by blocks: in fp64, but for softmax in fp32 whatever the model."""
    stock = build(family).to(torch.float32 if family in OWN_ATTENTION else torch.float64)
    s2 = copy.deepcopy(stock)
    stock.set_attn_implementation("eager" if family in OWN_ATTENTION else "sdpa")
    set_s2_attention(s2, S2AttentionConfig(group_size=8, kernel="reference"))
    return stock, s2


@pytest.mark.parametrize("family", [*WINDOWED, *CHUNKED])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_families_are_as_by_whole_masks(family, case, training, monkeypatch):
    """Logits and gradients. The window is of 16 tokens."""
    calls, attend = [], interface.attend_in_blocks
    monkeypatch.setattr(interface, "attend_in_blocks", lambda *a: calls.append(1) or attend(*a))
    stock, s2 = (model.train(training) for model in whole(family))
    x = torch.randint(3, 128, (1 if case == "packed" else 2, 57))
    options, real = CASES[case](len(x), 57), torch.ones_like(x).bool()
    if case == "packed":
        options["cu_seq_lens_q"] = torch.tensor([0, 19, 57], dtype=torch.int32)  # some families tell of nothing else
    if "padding" in options:
        options = {"attention_mask": options["padding"]}
        real = options["attention_mask"].bool()
    with s2_attention_mode(s2, "dense"):
        outs = [logits(s2, x, **options)]
    assert calls == [1]
    if training and case == "packed" and family == "gpt_oss":  # by itself it makes masks that know nothing of packing
        outs.append(torch.cat([logits(stock, part) for part in x.split([19, 38], dim=1)], dim=1))
    else:
        outs.append(logits(stock, x, **options))
    weight = torch.randn_like(outs[0]) * real[:, :, None]
    for out in outs:
        (out * weight).sum().backward()
    atol, of_gradients = (1e-5, 1e-4) if family in OWN_ATTENTION else (1e-9, 1e-6)
    assert torch.allclose(outs[0][real], outs[1][real], atol=atol)
    for (name, ours), theirs in zip(s2.named_parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, atol=of_gradients), name


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("told", ["cu_seq_lens_q", "position_ids", "attention_mask"])
def test_documents_are_apart_in_training_whatever_a_family_s_mask_knows(family, told):
    """Within a window, too, where the whole mask is small."""
    stock, s2 = (model.train() for model in whole(family))
    x, options = torch.randint(3, 128, (1, 14)), {"position_ids": torch.tensor([[*range(5), *range(9)]])}
    if told == "cu_seq_lens_q":
        options["cu_seq_lens_q"] = torch.tensor([0, 5, 14], dtype=torch.int32)
    if told == "attention_mask":  # for which transformers drops what positions say
        options["attention_mask"] = torch.ones_like(x)
    with s2_attention_mode(s2, "dense"):
        out = logits(s2, x, **options)
    apart = torch.cat([logits(stock, part) for part in x.split([5, 9], dim=1)], dim=1)
    assert torch.allclose(out, apart, atol=1e-5 if family in OWN_ATTENTION else 1e-9)


def test_rows_that_see_nothing_are_no_nan_in_fp64():
    """Gemma 2's softmax is in fp32, whatever the model."""
    model, x = build("gemma2"), torch.randint(3, 128, (2, 40))
    set_s2_attention(model)
    real = padded(2, 40, "left")
    with torch.no_grad():
        expected = logits(model, x, attention_mask=real)[real.bool()]
        assert torch.allclose(logits(model.double(), x, attention_mask=real)[real.bool()].float(), expected, atol=1e-5)


def test_windows_of_a_mask_that_is_shaped_otherwise_are_refused():
    """Gemma 3's pictures see themselves both ways."""
    module = build("gemma3_text").train().model.layers[0].self_attn
    seen = made("sliding", 16, 1, 40, block_sequence_ids=torch.tensor([[-1] * 4 + [0] * 30 + [-1] * 6]))
    told = {"cu_seq_lens_q": torch.tensor([0, 40], dtype=torch.int32), "position_ids": torch.arange(40)[None]}
    interface.refuse_skipping(module, made("sliding", 16, 1, 40), True, True, told)
    with pytest.raises(ValueError, match="mask of its own"):
        interface.refuse_skipping(module, seen, True, True, told)


def by_whole_mask(attend, query, key, value, seen):
    """What `attend_in_blocks` is to give, from the blocks of the mask put together."""
    rows, count, _, size, span = seen.shape
    before, length = span - size, query.shape[2]
    whole = torch.zeros(rows, count * size, before + count * size, dtype=torch.bool)
    for at in range(count):
        start = at * size
        whole[:, start : start + size, start : start + span] = seen[:, at, 0]
    return attend(query, key, value, whole[:, None, :length, before : before + length])


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "llama4_text"])
def test_evaluation_is_as_by_the_whole_mask(family, monkeypatch):
    """Perplexity by length, dense and by the pattern of training; with a cache, as evaluation has it."""
    model, found, real = build(family), [], interface.attend_in_blocks
    set_s2_attention(model, S2AttentionConfig(group_size=8, kernel="reference"))
    documents = [torch.randint(3, 128, (size,)).tolist() for size in (90, 75)]
    for by in (real, by_whole_mask):
        calls = []
        monkeypatch.setattr(interface, "attend_in_blocks", lambda *a, by=by, calls=calls: calls.append(1) or by(*a))
        found.append(compare_attention(model, documents, [32, 70], stride=16, batch_size=2, progress=False))
        assert calls
    for name, records in found[1].items():
        for ours, theirs in zip(found[0][name], records, strict=True):
            assert ours["tokens"] == theirs["tokens"] and abs(ours["nll"] - theirs["nll"]) < 1e-6


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", *CHUNKED])
@pytest.mark.parametrize("mode", ["training", "padded", "packed", "windows", "evaluation"])
def test_no_tensor_is_of_all_pairs(family, mode, monkeypatch):
    if mode == "windows" and family in CHUNKED:
        pytest.skip("chunks can't tell where positions skip")
    monkeypatch.setattr("hf_longlora.attention.eager.BLOCK_SCORES", 4 * 512 * 64)
    model = build(family).train(mode != "evaluation")
    set_s2_attention(
        model, S2AttentionConfig(group_size=64, kernel="reference" if family in OWN_ATTENTION else "auto")
    )
    if family in OWN_ATTENTION:  # whose full layers have the reference alone on a CPU
        model.model.layers = model.model.layers[:1]
    if mode == "windows":
        set_attention_mode(model, "windows")
    largest = {}
    for length in (1024, 4096):
        options = {"attention_mask": padded(2, length, "left")} if mode == "padded" else {}
        if mode in ("packed", "windows"):
            ends = torch.tensor([0, length // 3, length], dtype=torch.int32)
            options = {"cu_seq_lens_q": ends, "position_ids": packed(1, length)}
        x = torch.randint(3, 128, (2 if mode == "padded" else 1, length))
        with Largest() as record:
            hidden = model.model(input_ids=x, use_cache=False, **options).last_hidden_state
            if mode != "evaluation":
                hidden.sum().backward()
        largest[length] = record.elements
    assert largest[4096] <= 4 * largest[1024]
    assert largest[1024] < 1024 * 1024
