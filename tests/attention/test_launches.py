"""How a call is cut into launches: each token once, few of them, and none beyond the limit."""

from collections import Counter
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_longlora.attention import Documents
from hf_longlora.attention.kernels import ragged, sdpa, seen
from hf_longlora.attention.kernels.in_place import _readable, cover, rows_follow

UNLIMITED = 10**6


def launched(launch) -> Counter:
    """How often a launch of the sdpa kernel goes through each (row, head, token)."""
    tokens = [launch.start + launch.gap * i + j for i in range(launch.times) for j in range(launch.length)]
    rows = range(launch.row, launch.row + launch.rows)
    return Counter((row, head, token) for row in rows for head in range(*launch.heads) for token in tokens)


@given(
    # of each row, tokens of padding and of a document, by turns
    packed=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.sampled_from([16, 24]) | st.integers(1, 40)), max_size=3),
        min_size=1,
        max_size=3,
    ),
    padding=st.integers(0, 2),
    alike=st.booleans(),
    heads=st.sampled_from([(4, 2), (5, 1), (1, 1)]),
    group_size=st.sampled_from([None, 2, 3, 8]),
    follow=st.booleans(),
    limit=st.integers(1, 100),
)
def test_each_token_once_and_within_the_limit(packed, padding, alike, heads, group_size, follow, limit):
    rows = []
    for row in [packed[0]] * len(packed) if alike else packed:
        ends = list(accumulate(gap + size for gap, size in row))
        rows.append(tuple((end - size, end) for end, (_, size) in zip(ends, row, strict=True)))
    length = max(1, padding, *(row[-1][1] + padding for row in rows if row))
    documents = Documents(tuple(rows), length)
    parts = documents.parts(*heads, group_size)
    segments = [
        (row, h, *s[:2]) for p in parts for row, cut in enumerate(p.rows) for h in range(*p.heads) for s in cut
    ]
    wanted = Counter((row, head, token) for row, head, start, end in segments for token in range(start, end))
    found = Counter()
    for launch in sdpa.decoded(sdpa.encoded(parts, length, follow, limit)):
        assert launch.tokens <= limit or launch.rows == launch.times == 1
        assert follow or not launch.joins_rows
        found += launched(launch)
    assert found == wanted
    covered = Counter()
    for launch in ragged.decoded(ragged.encoded(parts, length, follow, limit)):
        assert launch.lengths and (launch.tokens <= limit or len(launch.lengths) == 1)
        first, last = launch.start // length, (launch.start + launch.tokens - 1) // length
        assert launch.joins_rows == (first != last) and (follow or first == last)
        edges = launch.edges(torch.device("cpu")).tolist()
        for i, (start, end) in enumerate(pairwise(edges)):
            for at in range(launch.start + start, launch.start + end):
                covered.update((*divmod(at, length), head, i in launch.padding) for head in range(*launch.heads))
    every = {(row, head, token) for row in range(len(rows)) for head in range(heads[0]) for token in range(length)}
    assert covered == Counter((row, token, head, (row, head, token) not in wanted) for row, head, token in every)


@pytest.mark.parametrize(
    ("length", "batch", "follow", "limit", "plain", "shifted"),
    [  # (row, rows, start, gap, times, length)
        (32, 1, True, UNLIMITED, [(0, 1, 0, 8, 4, 8)], [(0, 1, 0, 28, 2, 4), (0, 1, 4, 8, 3, 8)]),
        (
            *(33, 1, True, UNLIMITED, [(0, 1, 0, 8, 4, 8), (0, 1, 32, 1, 1, 1)]),
            [(0, 1, 0, 4, 1, 4), (0, 1, 4, 8, 3, 8), (0, 1, 28, 5, 1, 5)],
        ),
        # Whole rows fold into one batch, and one segment of each row does.
        (16, 2, True, UNLIMITED, [(0, 2, 0, 8, 2, 8)], [(0, 1, 0, 12, 2, 4), (1, 1, 0, 12, 2, 4), (0, 2, 4, 8, 1, 8)]),
        (
            *(16, 2, False, UNLIMITED, [(0, 1, 0, 8, 2, 8), (1, 1, 0, 8, 2, 8)]),
            [(0, 1, 0, 12, 2, 4), (1, 1, 0, 12, 2, 4), (0, 2, 4, 8, 1, 8)],
        ),
        (32, 1, True, 16, [(0, 1, 0, 8, 2, 8), (0, 1, 16, 8, 2, 8)], None),
        (16, 3, True, 32, [(0, 2, 0, 8, 2, 8), (2, 1, 0, 8, 2, 8)], None),
        # Rows that are longer than a launch are cut, too.
        (32, 2, True, 16, [(row, 1, start, 8, 2, 8) for row in (0, 1) for start in (0, 16)], None),
    ],
)
def test_few_launches(length, batch, follow, limit, plain, shifted):
    parts = Documents((((0, length),),) * batch, length).parts(4, 2, 8)
    found = list(sdpa.decoded(sdpa.encoded(parts, length, follow, limit)))
    assert [launch[2:] for launch in found if launch.heads == (0, 2)] == plain
    assert shifted is None or [launch[2:] for launch in found if launch.heads == (2, 4)] == shifted


def test_ragged_launches_are_filled():
    parts = Documents((((0, 5), (5, 8), (8, 11), (11, 15)),), 15).parts(4, 2, None)
    assert [launch.lengths for launch in ragged.decoded(ragged.encoded(parts, 15, True, 6))] == [(5,), (3, 3), (4,)]
    assert [launch.lengths for launch in ragged.decoded(ragged.encoded(parts, 15, True, 4))] == [
        (5,),
        (3,),
        (3,),
        (4,),
    ]


@pytest.mark.parametrize(
    ("shape", "strides", "joined", "kept_on_cpu", "kept_on_gpu"),
    [  # [B, H, S, D] of bf16, 8 of which are 16 bytes
        ((2, 3, 5, 16), (240, 16, 48, 1), True, True, True),
        ((2, 3, 5, 16), (240, 80, 16, 1), True, False, False),  # rows don't follow one another
        ((2, 3, 5, 16), (240, 80, 16, 1), False, True, True),
        ((2, 3, 5, 12), (180, 12, 36, 1), False, True, False),
        ((2, 3, 5, 12), (240, 16, 48, 1), False, True, True),  # a slice of wider heads
        ((2, 3, 5, 12), (260, 16, 52, 1), False, True, False),
        ((1, 3, 5, 16), (7, 16, 48, 1), False, True, True),  # of one row the step says nothing
        ((2, 3, 5, 16), (480, 32, 96, 2), False, False, False),
        ((2, 3, 5, 1), (120, 8, 24, 7), False, True, True),
        ((2, 3, 5, 16), (80, 0, 16, 1), False, False, False),  # expanded over heads
        ((2, 3, 5, 16), (72, 24, 8, 1), False, False, False),  # windows over one another
    ],
)
def test_what_engines_read_where_it_lies(shape, strides, joined, kept_on_cpu, kept_on_gpu):
    for device, kept in (("cpu", kept_on_cpu), ("meta", kept_on_gpu)):
        x = torch.empty(1000, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
        found = _readable(x, joined)
        assert (found is x) == kept and found.shape == x.shape
        assert kept or found.transpose(1, 2).is_contiguous()


def test_groups_that_hold_every_document_are_one_part():
    documents = Documents((((0, 8), (8, 11)), ((2, 10),)), 11)
    assert documents.longest == 8 and documents.packed and not Documents((((0, 8),), ((2, 10),)), 11).packed
    (part,) = documents.parts(4, 2, 8, sink_tokens=4)
    assert part == ((0, 4), (0, 2), (((0, 8, ()), (8, 11, ())), ((2, 10, ()),)))
    assert len(documents.parts(4, 2, 7)) == 2


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_memory_is_set_to_zero_first_only_where_launches_leave_gaps(kernel):
    module, query = {"sdpa": sdpa, "varlen": ragged}[kernel], torch.empty(2, 4, 20, 8)

    def covered(parts):
        return cover(list(module.decoded(module.encoded(parts, 20, True, 16))), query)

    for documents in (((0, 20),), ((0, 7), (7, 20))):
        parts = Documents((documents, ((0, 20),)), 20).parts(4, 2, 8)
        assert covered(parts)
    parts = Documents((((0, 19),), ((0, 20),)), 20).parts(4, 2, 8)
    # ragged launches go through padding, and clear it
    assert covered(parts) == (kernel == "varlen")
    assert not covered(parts[:1])


def test_what_is_in_work_at_a_time_for_first_tokens(monkeypatch):
    """Queries of `CHUNK` elements, or scores where a query has more keys than it is wide; one query at least."""
    monkeypatch.setattr(seen, "CHUNK", 64)
    piece = seen.Piece((2, 4), (1, 2), 0, start=10, end=15, first=5, last=9)
    query = torch.empty(1, 4, 20, 8)
    assert list(seen._chunks(piece, query)) == [slice(10, 14), slice(14, 15)]
    assert list(seen._chunks(piece._replace(first=-7), query)) == [slice(10, 12), slice(12, 14), slice(14, 15)]
    assert list(seen._chunks(piece._replace(first=-60), query)) == [slice(at, at + 1) for at in range(10, 15)]


def test_pieces_whose_keys_adjoin_are_told_from_the_others():
    alone, adjoining = (0, 2, 0, 1, 0, 8, 12, 0, 4), (0, 2, 0, 1, 0, 0, 3, -2, 0)
    last = (2, 4, 1, 2, 1, 16, 20, 8, 10)
    assert seen._by_adjoining((*alone, *adjoining, *last)) == ([*alone, *last], [*adjoining])


def test_which_rows_follow_one_another():
    heads_first, tokens_first = torch.empty(2, 4, 20, 8), torch.empty(2, 20, 4, 8).transpose(1, 2)
    assert rows_follow(tokens_first) and not rows_follow(heads_first)
    assert rows_follow(heads_first[:1], tokens_first) and not rows_follow(tokens_first, heads_first)
