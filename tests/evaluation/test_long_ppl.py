import math

import pytest
import torch

from hf_longlora import long_perplexity, perplexity_by_length


def log_probability(model, ids, context):
    """Of the last of `ids`, by the `context` tokens before it: one forward for one token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[-1 - context : -1]])).logits[0, -1]
    return logits.double().log_softmax(-1)[ids[-1]].item()


def naive(model, documents, length, short, alpha, beta, stride, evaluator):
    """The paper's definition, token for token."""
    keys, tokens, losses = 0, 0, []
    for document in documents:
        for begin in range(0, len(document) - length + 1, length):
            ids = document[begin : begin + length]
            for i in range(short, length):
                start = (i - short) // stride * stride
                far = log_probability(evaluator, ids[: i + 1], i)
                near = log_probability(evaluator, ids[: i + 1], i - start)
                tokens += 1
                if far - near > alpha and far > beta:
                    keys += 1
                    losses.append(-log_probability(model, ids[: i + 1], i))
    return keys, tokens, math.exp(sum(losses) / len(losses)) if losses else None


@pytest.fixture
def models(tiny_llama):
    """Two whose answers depend on the context, and documents."""
    made = []
    for _ in range(2):
        model = tiny_llama(vocab_size=32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(12)
        made.append(model)
    return made, [torch.randint(3, 32, (n,)).tolist() for n in (50, 30, 20)]


@pytest.mark.parametrize("stride", [1, 7])
@pytest.mark.parametrize("other", [False, True])
def test_by_definition(models, stride, other):
    (model, evaluator), documents = models
    options = dict(short=8, alpha=0.5, beta=-4.0, stride=stride)
    keys, tokens, expected = naive(model, documents, 24, evaluator=evaluator if other else model, **options)
    assert 0 < keys < tokens == 48  # three windows of 16 candidates
    options |= dict(evaluator=evaluator if other else None, progress=False)
    for batch_size in (1, 2):
        [record] = long_perplexity(model, documents, 24, batch_size=batch_size, **options)
        assert (record["key_tokens"], record["tokens"], record["windows"]) == (keys, tokens, 3)
        assert record["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert record["documents"] == 2 and record["nll"] == pytest.approx(math.log(expected), rel=1e-4)


def test_each_threshold_counts(models):
    """Both off, it is the perplexity of all; a candidate less where one of them is on."""
    (model, _), documents = models
    options = dict(short=8, stride=4, progress=False)

    def counted(alpha, beta):
        return long_perplexity(model, documents, 24, alpha=alpha, beta=beta, **options)[0]

    every = counted(-math.inf, -math.inf)
    assert every["key_tokens"] == every["tokens"] == 48
    by_far, by_sight = counted(0.5, -math.inf)["key_tokens"], counted(-math.inf, -4.0)["key_tokens"]
    assert 0 < counted(0.5, -4.0)["key_tokens"] < min(by_far, by_sight) < 48
    first = [documents[0][:24]]
    [record] = long_perplexity(model, first, 24, alpha=-math.inf, beta=-math.inf, **options)
    [plain] = perplexity_by_length(model, first, 24, 16, progress=False)
    assert record["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)


def test_evenly_spaced_tokens_stand_for_all_and_none_may_be_key(models):
    (model, _), documents = models
    model.train()
    options = dict(short=8, stride=5, positions_per_window=4, progress=False)
    records = long_perplexity(model, documents, [24, 16], max_windows=2, **options)
    assert [(r["length"], r["tokens"], r["windows"]) for r in records] == [(24, 8, 2), (16, 8, 2)]
    assert model.training
    [record] = long_perplexity(model, documents, 24, alpha=1e9, **options)
    assert record["perplexity"] is None and record["nll"] is None and record["key_tokens"] == 0
    [record] = long_perplexity(model, documents, 24, max_windows=1, **options)
    assert (record["windows"], record["tokens"]) == (1, 4)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([8, 24], {}, "above that of the short context, 8"),
        ([], {}, "above that of the short context, 8"),
        (60, {}, "no document has 60 tokens"),
        *((24, {name: 0}, f"`{name}`") for name in ("short", "stride", "batch_size", "max_windows")),
        (24, {"positions_per_window": 0}, "`positions_per_window`"),
    ],
)
def test_errors(models, lengths, options, message):
    (model, _), documents = models
    with pytest.raises(ValueError, match=message):
        long_perplexity(model, documents, lengths, **{"short": 8} | options)


def test_a_token_at_a_threshold_is_none_of_the_key_tokens(tiny_llama):
    """Of a vocabulary of one token each is sure: 0 nats, by any context."""
    model = tiny_llama(vocab_size=1, bos_token_id=0, eos_token_id=0)
    for alpha, beta, keys in ((-0.1, -0.1, 4), (0.0, -0.1, 0), (-0.1, 0.0, 0)):
        [record] = long_perplexity(model, [[0] * 8], 8, short=4, alpha=alpha, beta=beta, progress=False)
        assert (record["key_tokens"], record["tokens"]) == (keys, 4)
