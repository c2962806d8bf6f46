"""How often a training step holds something of the embedding's size."""

import pytest

try:
    from benchmarks.embedding_memory import WAYS, measure
except ImportError:
    pytest.skip("this TRL has no fused head", allow_module_level=True)

# Large, so that TRL's fused head, which casts its weight by chunks of the vocabulary, never casts it whole.
# The width is no 16, for LoRA of rank 8 in fp32 takes the bytes of that in bf16.
VOCABULARY, WIDTH = 70_000, 24


@pytest.mark.parametrize(
    ("way", "tied", "most"),
    [
        ("full", False, 1),  # the gradient
        ("full", True, 2),  # the head's and its own; autograd adds them up in place
        ("embedding_rank=8", False, 0),
        ("embedding_rank=8", True, 0),
        ("trainable_token_indices, 16 tokens", False, 1),  # PEFT puts the tokens into a copy
        ("trainable_token_indices, 16 tokens", True, 3),
        ("train_embeddings=False", True, 0),
    ],
)
def test_the_gradient_of_an_embedding_is_made_once(way, tied, most):
    assert way in WAYS
    row = measure(way, tied, VOCABULARY, WIDTH)
    assert row["peak_tensors_of_its_size_in_a_step"] == most


def test_embedding_rank_trains_a_small_share():
    full, low = (measure(way, False, VOCABULARY, WIDTH)["trained_numbers"] for way in ("full", "embedding_rank=8"))
    assert full == VOCABULARY * WIDTH
    assert low == 8 * (VOCABULARY + WIDTH)
