import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_longlora import S2AttentionConfig
from hf_longlora.attention import Documents, segments

from .oracle import visible


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    group_size=st.integers(2, 20),
    shifted=st.booleans(),
    sink_tokens=st.integers(0, 50),
)
def test_segments_are_the_formula(lengths, group_size, shifted, sink_tokens):
    shift = group_size // 2 if shifted else 0
    documents, at = [], 0
    for length in lengths:
        if length:
            documents.append((at, at + length))
        at += length
    seen = torch.zeros(at, at, dtype=torch.bool)
    cut = segments(documents, group_size, shift, sink_tokens)
    for start, end, others in cut:
        assert end > start
        seen[start:end, start:end] = True
        for first, last in others:
            assert first < last <= start
            seen[start:end, first:last] = True
    assert torch.equal(seen.tril(), visible(at, documents, group_size, shift, sink_tokens))
    assert sum(segment.pairs for segment in cut) == seen.tril().sum()


def test_dense_segments_are_the_documents():
    assert segments([(0, 7), (9, 12)], None, sink_tokens=4) == ((0, 7, ()), (9, 12, ()))


def test_short_documents_are_dense_even_in_shifted_heads():
    assert segments([(3, 11)], 8, 4, 4) == ((3, 11, ()),)
    assert segments([(3, 12)], 8, 4) == ((3, 7, ()), (7, 12, ()))


def test_sink_tokens_are_a_documents_first():
    """Counted from where the document begins; the segment that holds them counts them once."""
    documents = [(3, 13), (13, 16), (16, 27)]
    assert segments(documents, 4, 0, 2) == (
        *((3, 7, ()), (7, 11, ((3, 5),)), (11, 13, ((3, 5),))),
        (13, 16, ()),
        *((16, 20, ()), (20, 24, ((16, 18),)), (24, 27, ((16, 18),))),
    )
    # More of them than the first segment has: the second sees those before it, and its own anyway.
    assert segments([(3, 10)], 4, 2, 4) == ((3, 5, ()), (5, 9, ((3, 5),)), (9, 10, ((3, 7),)))


def test_find_without_hints_is_one_document_a_row():
    assert Documents.find(2, 5).rows == (((0, 5),), ((0, 5),))


def test_find_padding_on_both_sides_and_empty_rows():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    assert Documents.find(5, 5, attention_mask=mask).rows == (((2, 5),), ((0, 2),), (), ((0, 5),), ((1, 4),))


def test_find_packed_by_position_ids_with_and_without_mask():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1]])
    expected = (((0, 3), (3, 5), (5, 6), (6, 8)),)
    assert Documents.find(1, 8, position_ids=positions).rows == expected
    # transformers loses packing when there is a mask of ones; we don't
    assert Documents.find(1, 8, position_ids=positions, attention_mask=torch.ones(1, 8)).rows == expected
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    assert Documents.find(1, 8, position_ids=positions, attention_mask=mask).rows == (((0, 3), (3, 5)),)


@pytest.mark.parametrize("pad_position", [0, 1])
def test_find_left_padding_with_positions(pad_position):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, pad_position)
    assert Documents.find(2, 6, attention_mask=mask, position_ids=positions).rows == (((3, 6),), ((1, 6),))


def test_find_cu_seqlens_skips_empty_documents():
    documents = Documents.find(1, 6, cu_seqlens=torch.tensor([0, 2, 2, 6]))
    assert documents.rows == (((0, 2), (2, 6)),)
    assert documents.longest == 4 and documents.packed
    assert Documents(((), ()), 4).longest == 0
    whole = torch.tensor([0, 6])
    assert Documents.find(1, 6, cu_seqlens=whole, attention_mask=torch.ones(1, 6)).rows == (((0, 6),),)


def test_positions_of_all_rows_and_documents_between_padding():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert Documents.find(2, 6, position_ids=positions).rows == (((0, 3), (3, 6)),) * 2
    assert Documents.find(1, 6, position_ids=torch.tensor([[0, 1, 7, 8, 9, 3]])).rows == (((0, 2), (2, 5), (5, 6)),)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0]])
    restarting = Documents.find(1, 6, attention_mask=mask, position_ids=torch.tensor([[0, 1, 0, 0, 1, 0]]))
    assert restarting.rows == (((0, 2), (3, 5)),)
    for going_on in ([0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 2, 3]):
        with pytest.raises(ValueError, match="padding inside a document"):
            Documents.find(1, 6, attention_mask=mask, position_ids=torch.tensor([going_on]))


def test_heads_are_cut_in_two():
    documents = Documents((((0, 12),),), 12)
    plain, shifted, dense = (documents.segments(*cut) for cut in ((4, 0, 1), (4, 2, 1), (None,)))
    assert len({plain, shifted, dense}) == 3
    for heads, kv_heads, first, second in (
        (4, 2, ((0, 2), (0, 1)), ((2, 4), (1, 2))),
        (6, 3, ((0, 4), (0, 2)), ((4, 6), (2, 3))),
        (9, 3, ((0, 6), (0, 2)), ((6, 9), (2, 3))),
        (3, 1, ((0, 2), (0, 1)), ((2, 3), (0, 1))),
        (2, 1, ((0, 1), (0, 1)), ((1, 2), (0, 1))),
    ):
        assert documents.parts(heads, kv_heads, 4, sink_tokens=1) == ((*first, plain), (*second, shifted))
    whole = (0, 4), (0, 2)
    assert documents.parts(4, 2, 4, "none", 1) == ((*whole, plain),)
    assert documents.parts(4, 2, 4, "all", 1) == ((*whole, shifted),)
    for group_size in (None, 12, 13):
        assert documents.parts(4, 2, group_size, sink_tokens=1) == ((*whole, dense),)
    assert documents.parts(1, 1, 4, sink_tokens=1) == (((0, 1), (0, 1), plain),)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3])}, "rise from 0"),
        ({"cu_seqlens": torch.tensor([1, 5])}, "rise from 0"),
        ({"position_ids": torch.arange(5).expand(3, -1)}, "shape"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 5]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "either"),
        ({"attention_mask": torch.ones(1, 4)}, "shape"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}, "padding inside"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1]]), "position_ids": torch.arange(5)[None]}, "padding inside"),
    ],
)
def test_find_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Documents.find(1, 5, **kwargs)


def test_cu_seqlens_are_for_one_row():
    with pytest.raises(ValueError, match="rise from 0"):
        Documents.find(1, 0, cu_seqlens=torch.tensor([0]))
    with pytest.raises(ValueError, match="one packed row"):
        Documents.find(2, 5, cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"group_size": 1},
        {"group_size": 0},
        {"group_size": -4},
        {"group_size": 2.0},
        {"group_size": True},
        {"group_size_ratio": 0.0},
        {"group_size_ratio": 1.01},
        {"group_size_ratio": -0.25},
        {"group_size_ratio": True},
        {"group_size_ratio": "0.25"},
        {"sink_tokens": -1},
        {"sink_tokens": 4.0},
        {"sink_tokens": True},
        {"sink_tokens": None},
        {"kernel": "no-such-kernel"},
    ],
)
def test_config_refuses(kwargs):
    with pytest.raises(ValueError, match=r"group_size|sink_tokens|Unknown attention kernel"):
        S2AttentionConfig(**kwargs)


@pytest.mark.parametrize(
    ("options", "longest", "native_window", "expected"),
    [
        ({}, 4096, None, 1024),
        ({}, 4097, None, 1025),
        ({}, 3, None, 2),
        ({}, 32768, 8192, 8192),
        ({}, 32767, 8192, 8192),  # a quarter, rounded up
        ({}, 32764, 8192, 8191),
        ({}, 131072, 8192, 8192),
        ({}, 16384, 8192, 4096),
        ({}, 4096, 8192, 1024),
        ({}, 4096, 1, 1024),
        ({"group_size_ratio": 1 / 16}, 131072, 8192, 8192),
        ({"group_size_ratio": 1 / 16}, 65536, 8192, 4096),
        ({}, 12, 2, 2),  # the smallest window that can be a group
        ({"group_size_ratio": 1 / 16}, 10, None, 2),
        ({"group_size_ratio": 1.0}, 10, 2, 10),
        ({"group_size": 512}, 4096, 64, 512),
        ({"group_size": 512, "group_size_ratio": 0.5}, 4096, 64, 512),
    ],
)
def test_group_size(options, longest, native_window, expected):
    assert S2AttentionConfig(**options).resolve_group_size(longest, native_window) == expected
