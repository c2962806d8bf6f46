"""FlexAttention's blocks and mask, without a GPU; what it computes by them is tested on one (`test_kernels.py`)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_longlora.attention import Documents
from hf_longlora.attention.kernels import flex
from hf_longlora.attention.reference import reference_kernel
from hf_longlora.parallel.shards import localize

from .oracle import oracle, visible
from .test_kernels import TOLERANCE, draw


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    pads=st.integers(0, 9),
    group_size=st.integers(2, 20),
    sink_tokens=st.integers(0, 20),
    cut=st.floats(0, 0.9),
)
def test_blocks_and_mask_are_the_formula(lengths, pads, group_size, sink_tokens, cut):
    """A block that is left out holds nothing that is seen, one that is taken in full nothing that is not.

    For a whole row, and for what of it stands after a cut: there keys come before the first query.
    """
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [(end - size + pads, end + pads) for size, end in zip(lengths, ends, strict=True)]
    total = ends[-1] + 2 * pads
    documents = Documents((tuple(spans),), total)
    parts = documents.parts(4, 2, group_size, sink_tokens=sink_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 4)
        for part, shift in zip(parts, (0, group_size // 2), strict=False):
            first = int(cut * total)
            local = localize(part, (first, total))
            mask = flex.block_mask.__wrapped__(local.part.rows, total - first, local.keys, torch.device("cpu"))
            tokens = [token for span in local.halo[0] for token in range(*span)] + list(range(first, total))
            seen = visible(total, spans, group_size, shift, sink_tokens)[first:]
            assert seen.sum() == seen[:, tokens].sum()
            seen = seen[:, tokens]
            queries, keys = (torch.arange(size) for size in seen.shape)
            found = mask.mask_mod(torch.tensor(0), torch.tensor(0), queries[:, None], keys[None, :])
            assert torch.equal(found, seen)
            blocks = [-(-size // 4) for size in seen.shape]
            down, right = (4 * many - size for many, size in zip(blocks, seen.shape, strict=True))
            tiles = torch.nn.functional.pad(seen, (0, right, 0, down)).unflatten(0, (-1, 4)).unflatten(2, (-1, 4))
            some, every = tiles.any(3).any(1), tiles.all(3).all(1)
            partial, full = (
                listed(*each, *blocks)
                for each in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
            )
            assert not (partial & full).any()
            assert (some <= (partial | full)).all() and (full <= every).all()


def listed(count, which, blocks, key_blocks):
    chosen = torch.zeros(blocks, key_blocks, dtype=torch.bool)
    for query in range(blocks):
        chosen[query, which[0, 0, query, : count[0, 0, query]].long()] = True
    return chosen


def test_learned_sinks_and_sink_tokens_are_two_things():
    """gpt-oss's, a score for each head that gives nothing, beside the tokens that every group sees."""
    query, key, value = (x.detach() for x in draw(4, 2, 30))
    learned = torch.randn(4)
    parts = Documents.find(1, 30).parts(4, 2, 8, sink_tokens=3)
    expected = oracle(query, key, value, [[(0, 30)]], 8, softcap=5.0, learned_sinks=learned, sink_tokens=3)
    for kernel in (flex.flex_kernel, reference_kernel):
        out = kernel(query, key, value, parts, softcap=5.0, learned_sinks=learned).transpose(1, 2)
        assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[torch.float32]
