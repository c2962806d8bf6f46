"""What a forward knows of its mask, and which layers are left alone for it."""

from types import SimpleNamespace

import pytest
import torch
from transformers.masking_utils import and_masks, causal_mask_function

from hf_longlora import s2_attention
from hf_longlora.attention.interface import left_alone
from hf_longlora.attention.mask import S2Mask, s2_mask


def mask_of(**arguments) -> S2Mask:
    whole = dict(batch_size=1, q_length=12, kv_length=12, attention_mask=None) | arguments
    return s2_mask(**whole)


def only_even_keys(batch, head, query, key):
    return key % 2 == 0


def test_a_mask_that_is_shaped_otherwise_is_not_taken_for_a_causal_one():
    """A mask function of a user's own comes with `use_vmap`: within the window or not, it is no causal mask."""
    own = and_masks(causal_mask_function, only_even_keys)
    assert mask_of().causal
    assert mask_of(mask_function=own, local_size=12).causal  # transformers' sliding mask, longer than the text
    assert not mask_of(mask_function=own, local_size=11).causal
    for window in (None, 11, 12, 100):
        assert not mask_of(mask_function=own, local_size=window, use_vmap=True).causal


def test_a_family_that_works_on_the_mask_itself_is_told():
    with pytest.raises(AttributeError, match=r"works on the attention mask itself(.|\n)*`shape`"):
        mask_of().shape  # noqa: B018
    with pytest.raises(ValueError, match="works on the attention mask itself"):
        mask_of()[:, :, :, :12]
    mask, scores = mask_of(), torch.ones(1)
    for reads in (lambda: scores + mask, lambda: 1.0 - mask, lambda: mask * scores, lambda: ~mask):
        with pytest.raises(ValueError, match="works on the attention mask itself"):
            reads()


def test_positions_that_skip_need_a_window():
    with pytest.raises(ValueError, match="as many keys as queries"):
        mask_of().by_position(torch.tensor([0, 12]), torch.arange(12)[None])


@pytest.mark.parametrize(
    "arguments", [{"kv_length": 13}, {"kv_offset": 3}, {"q_offset": 3}, {"q_offset": torch.tensor(0)}], ids=str
)
def test_queries_that_are_not_the_keys_are_dense(arguments):
    """A decoding step, a prefill into a static cache, a chunk after a prefix."""
    whole = dict(allow_is_causal_skip=False, dtype=torch.float32, config=None, device=torch.device("cpu")) | arguments
    assert not isinstance(mask_of(**whole), S2Mask)
    assert isinstance(mask_of(**whole | {"kv_length": 12, "kv_offset": 0, "q_offset": 0}), S2Mask)


def test_other_keys_than_the_mask_is_for_are_refused():
    keys = torch.empty(1, 1, 10, 2)
    with pytest.raises(ValueError, match="10 keys where the mask is for 12"):
        mask_of().check_keys(module(), keys)
    with pytest.raises(ValueError, match="10 keys where the mask is for 2"):
        mask_of(q_length=2, kv_length=2).check_keys(module(), keys)
    mask_of(q_length=1, kv_length=1).check_keys(module(), keys)


def module(**config) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.mark.parametrize(
    ("window", "reach", "length", "sparse"),
    [
        (None, 64, 12, True),
        (64, 64, 64, True),
        (63, 64, 12, False),
        (64, 64, 65, False),  # the text goes beyond what the model says it reaches, and beyond the window
        (100, 64, 100, True),
        (99, 64, 100, False),
        (12, None, 12, False),  # nothing says where the model's length ends
    ],
)
def test_a_window_that_no_token_sees_the_end_of_is_none(window, reach, length, sparse):
    config = {} if reach is None else {"max_position_embeddings": reach}
    query = torch.empty(1, 1, length, 2)
    words = left_alone(module(**config), query, query, None, True, window)
    assert (words is None) == sparse
    assert words is None or words == f"a window of {window:,} tokens"
    mask = mask_of(q_length=length, kv_length=length, local_size=window)
    assert left_alone(module(**config), query, query, mask, True, None) == words


@pytest.mark.parametrize("kernel", ["auto", "sdpa"])
def test_autocast_is_scaled_dot_product_attention_s(kernel):
    """Half precision in, out and between; gradients come back in the inputs' own."""
    tensors = [torch.randn(1, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2)]
    options = dict(group_size=4, kernel=kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = s2_attention(*tensors, **options)
        assert torch.nn.functional.scaled_dot_product_attention(*tensors[:1] * 3).dtype == out.dtype == torch.bfloat16
    expected = s2_attention(*(x.bfloat16() for x in tensors), **options)
    assert torch.equal(out, expected)
    gradients = torch.autograd.grad(out.float().sum(), tensors)
    for gradient, right in zip(gradients, torch.autograd.grad(expected.float().sum(), tensors), strict=True):
        assert gradient.dtype == torch.float32 and torch.equal(gradient, right)
