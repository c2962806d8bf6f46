"""`perplexity_by_length` and `loss_by_position` against one token at a time."""

import math
from itertools import pairwise
from statistics import fmean, pstdev
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma3Config, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_longlora import S2AttentionConfig, long_perplexity
from hf_longlora.evaluation import (
    compare_attention,
    far_context,
    loss_by_position,
    perplexity_by_length,
    scoring,
    windows,
)
from hf_longlora.rope import scaled_rope, write_rope

VOCABULARY = 97


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # far from uniform predictions, so that a wrong token shows
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (size,), generator=generator).tolist() for size in (45, 12, 32, 70)]


@torch.no_grad()
def token_nll(model, ids: list[int], start: int, target: int) -> float:
    """Loss of the token at `target` with the context from `start` on: one forward per token."""
    logits = model(torch.tensor([ids[start:target]])).logits[0, -1].double()
    return (torch.logsumexp(logits, 0) - logits[ids[target]]).item()


def brute_force(model, documents, length, stride, first_end, most=None) -> list[float]:
    losses = []
    for ids in documents:
        done, end = None, first_end
        while len(ids) >= first_end and (done is None or done < len(ids)):
            end = min(end, len(ids))
            begin = max(end - stride if done is None else done, end - length + 1)
            begin = max(begin, end - most) if most else begin
            losses += [token_nll(model, ids, end - length, target) for target in range(begin, end)]
            done, end = end, end + stride
    return losses


@pytest.mark.parametrize("stride", [1, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_one_token_at_a_time(model, documents, stride, batch_size):
    for length, used in ((8, 4), (16, 3)):
        (record,) = perplexity_by_length(model, documents, length, stride, batch_size=batch_size, progress=False)
        losses = brute_force(model, documents, length, stride, first_end=length)
        assert record["length"] == length
        assert record["tokens"] == len(losses)
        assert record["documents"] == used
        assert record["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@pytest.mark.parametrize("stride", [3, 8])
def test_aligned_lengths_score_the_same_tokens(model, documents, stride):
    records = perplexity_by_length(model, documents, [32, 8, 16], stride, progress=False)
    assert [record["length"] for record in records] == [32, 8, 16]
    assert len({(record["tokens"], record["documents"], record["windows"]) for record in records}) == 1
    assert records[0]["documents"] == 3
    for record in records:
        losses = brute_force(model, documents, record["length"], stride, first_end=32, most=7)
        assert record["tokens"] == len(losses)
        assert record["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_every_target_of_the_aligned_range_is_scored_once(model):
    ids = list(range(70))
    (record,) = perplexity_by_length(model, [ids], [16], 5, progress=False)
    assert record["tokens"] == 70 - (16 - 5)
    assert record["windows"] == 1 + math.ceil((70 - 16) / 5)


def test_a_document_of_exactly_one_window(model):
    (record,) = perplexity_by_length(model, [list(range(16))], 16, 16, progress=False)
    assert (record["tokens"], record["windows"]) == (15, 1)


def test_documents_are_weighted_by_tokens(model, documents):
    long, short = documents[3], documents[1]
    together, first, second = (
        perplexity_by_length(model, chosen, 8, progress=False)[0] for chosen in ([long, short], [long], [short])
    )
    weighted = first["nll"] * first["tokens"] + second["nll"] * second["tokens"]
    assert together["tokens"] == first["tokens"] + second["tokens"]
    assert together["nll"] == pytest.approx(weighted / together["tokens"], abs=1e-6)


def test_full_logits_give_the_same(model, documents, monkeypatch):
    lean = perplexity_by_length(model, documents, [8, 32], 4, batch_size=2, progress=False)
    lean_positions = loss_by_position(model, documents, 32, progress=False)
    monkeypatch.setattr(scoring, "_takes_logits_to_keep", lambda model: False)
    full = perplexity_by_length(model, documents, [8, 32], 4, batch_size=2, progress=False)
    full_positions = loss_by_position(model, documents, 32, progress=False)
    for one, other in zip(lean + lean_positions, full + full_positions, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_only_scored_logits_are_computed(model, documents, monkeypatch):
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    try:
        records = perplexity_by_length(peft_model, documents, 32, 4, max_windows=2, progress=False)
    finally:
        handle.remove()
        peft_model.unload()
    assert records[0]["windows"] == 2
    assert shapes == [(1, 5, VOCABULARY)] * 2


def test_models_with_learned_positions(documents):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    (record,) = perplexity_by_length(gpt2, documents, 16, 4, progress=False)
    losses = brute_force(gpt2.eval(), documents, 16, 4, first_end=16)
    assert record["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_come_back(model, documents, fails, monkeypatch):
    model.train()
    model.model.layers[1].eval()
    before = {name: part.training for name, part in model.named_modules()}
    seen = []

    def spy(self, inputs):
        seen.append((self.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("out of luck")

    handle = model.model.layers[0].register_forward_pre_hook(spy)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="out of luck"):
                perplexity_by_length(model, documents, 8, progress=False)
        else:
            perplexity_by_length(model, documents, 8, max_windows=1, progress=False)
    finally:
        handle.remove()
    assert seen == [(False, False)]
    assert {name: part.training for name, part in model.named_modules()} == before
    model.eval()


def test_half_precision_with_fp32_norms(model, documents):
    reference = perplexity_by_length(model, documents, 16, progress=False)[0]
    mixed = LlamaForCausalLM(model.config).to(torch.bfloat16)
    mixed.load_state_dict(model.state_dict())
    for part in mixed.modules():
        if "Norm" in type(part).__name__:
            part.float()
    record = perplexity_by_length(mixed, documents, 16, progress=False)[0]
    assert record["nll"] == pytest.approx(reference["nll"], rel=0.05)


@pytest.mark.parametrize("norms", [torch.bfloat16, torch.float32])
def test_only_norms_of_another_dtype_make_it_autocast(model, documents, norms):
    """Not LoRA in fp32, for which PEFT casts: numbers are those of the model's own forward."""
    mixed = get_peft_model(LlamaForCausalLM(model.config).bfloat16(), LoraConfig(target_modules=["q_proj"]))
    assert {p.dtype for name, p in mixed.named_parameters() if "lora_" in name} == {torch.float32}
    cast = []
    for part in mixed.modules():
        if "Norm" in type(part).__name__:
            part.to(norms)
    mixed.register_forward_pre_hook(lambda module, inputs: cast.append(torch.is_autocast_enabled("cpu")))
    perplexity_by_length(mixed, documents, 32, max_windows=1, progress=False)
    assert cast == [norms == torch.float32]


def test_more_targets_than_are_turned_to_fp32_at_a_time():
    ids = torch.randint(VOCABULARY, (1100,))
    model = Bigram()
    losses = nn.functional.cross_entropy(model.table(ids)[:-1], ids[1:], reduction="none").double()
    (record,) = perplexity_by_length(model, [ids], 1100, 1100, progress=False)
    assert (record["tokens"], record["nll"]) == (1099, pytest.approx(losses.mean().item(), abs=1e-6))
    (record,) = loss_by_position(model, [ids], 1100, buckets=1, progress=False)
    assert (record["tokens"], record["nll"]) == (1099, pytest.approx(losses.mean().item(), abs=1e-6))


def test_texts_and_tensors(model):
    class Tokenizer:
        def __call__(self, text, add_special_tokens, verbose):
            assert not add_special_tokens and not verbose
            return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    text = "the quick brown fox jumps over the lazy dog"
    ids = torch.tensor([ord(letter) % VOCABULARY for letter in text], dtype=torch.int32)
    from_text = perplexity_by_length(model, [text], 8, tokenizer=Tokenizer(), progress=False)
    assert from_text == perplexity_by_length(model, [ids], 8, progress=False)


def test_progress_bar_can_be_off(model, documents, capfd):
    perplexity_by_length(model, documents, 8, max_windows=1, progress=False)
    assert capfd.readouterr() == ("", "")
    perplexity_by_length(model, documents, 8, max_windows=1)
    assert "perplexity" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("documents", "lengths", "options", "message"),
    [
        ([[1] * 9, [1] * 7], [4, 16], {}, "no document has 16 tokens: the longest of 2 has 9"),
        ([[1] * 9], [1], {}, "at least 2"),
        ([[1] * 9], [], {}, "lengths is empty"),
        ([[1] * 9], [4, 8], {"stride": 5}, "shortest length, 4; got 5"),
        ([[1] * 9], [4], {"stride": 0}, "stride must lie"),
        ([], [4], {}, "documents is empty"),
        ([[1] * 9, []], [4], {}, "document 1 is empty"),
        (["text"], [4], {}, "pass tokenizer="),
        ("text", [4], {}, "wrap a single text"),
        ([[1, 2, VOCABULARY, 3]], [4], {}, f"token id {VOCABULARY}, outside the model's vocabulary of {VOCABULARY}"),
        ([[0, 2, VOCABULARY, 3]], [4], {}, f"token id {VOCABULARY}"),
        ([[1, 2, -100, 3]], [4], {}, "token id -100"),
        ([[True] * 9], [4], {}, "one row of integer"),
        ([[[1, 2, 3, 4]]], [4], {}, "one row"),
        ([[0.5] * 9], [4], {}, "one row of integer"),
        ([[1] * 9], [4], {"batch_size": 0}, "batch_size"),
        ([[1] * 9], [4], {"max_windows": 0}, "max_windows"),
    ],
)
def test_errors(model, documents, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity_by_length(model, documents, lengths, **options)


def test_loss_by_position(model, documents):
    """A bucket is its targets, all of them: of positions from `start` on and before `end`, in each whole window."""
    documents = [*documents, documents[3][:63]]  # a token less than two windows
    windows = [ids[at : at + 32] for ids in documents for at in range(0, len(ids) - 31, 32)]
    assert len(windows) == 5
    losses = {target: [token_nll(model, ids, 0, target) for ids in windows] for target in range(1, 32)}
    eighths, single = list(range(0, 33, 4)), list(range(33))
    for buckets, edges in (
        *((edges, edges) for edges in ([0, 4, 10, 32], [0, 32], [0, 2], [0, 1, 32], [31, 32], [1, 8, 32])),
        *((1, [0, 32]), (8, eighths), (32, single)),
    ):
        records = loss_by_position(model, documents, 32, buckets=buckets, batch_size=2, progress=False)
        targets = {(low, high): range(max(low, 1), high) for low, high in pairwise(edges)}
        expected = {bucket: [loss for at in of for loss in losses[at]] for bucket, of in targets.items() if of}
        assert [(record["start"], record["end"]) for record in records] == list(expected)
        for record, found in zip(records, expected.values(), strict=True):
            assert record["tokens"] == len(found)
            assert record["nll"] == pytest.approx(fmean(found), abs=1e-5)
            assert record["perplexity"] == pytest.approx(math.exp(fmean(found)), rel=1e-5)
            assert record["nll_error"] == pytest.approx(pstdev(found) / math.sqrt(len(found)), rel=1e-3)


def test_loss_by_position_of_some_positions(model, documents):
    records = loss_by_position(model, documents, 32, buckets=4, positions_per_window=8, progress=False)
    assert [(record["start"], record["end"]) for record in records] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert sum(record["tokens"] for record in records) == 4 * 8
    options = dict(positions_per_window=1, max_windows=1, progress=False)
    (record,) = loss_by_position(model, documents, 32, buckets=4, **options)  # none in the last buckets
    assert (record["start"], record["end"], record["tokens"]) == (0, 8, 1)
    assert record["nll"] == pytest.approx(token_nll(model, documents[0], 0, 1), abs=1e-5)


def test_two_tokens_are_the_shortest_window(model, documents):
    ids = documents[1]
    (record,) = perplexity_by_length(model, [ids], 2, progress=False)
    losses = [token_nll(model, ids, target - 1, target) for target in range(1, len(ids))]
    assert (record["tokens"], record["windows"]) == (11, 11)
    assert record["nll"] == pytest.approx(fmean(losses), abs=1e-5)
    (record,) = loss_by_position(model, [ids], 2, buckets=1, progress=False)
    assert (record["tokens"], record["nll"]) == (6, pytest.approx(fmean(losses[::2]), abs=1e-5))


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (1, {}, "length must be at least 2"),
        (71, {}, "no document has 71 tokens: the longest of 4 has 70"),
        (8, {"batch_size": 0}, "`batch_size`"),
        (8, {"positions_per_window": 0}, "`positions_per_window`"),
        (8, {"max_windows": 0}, "`max_windows`"),
    ],
)
def test_errors_of_loss_by_position(model, documents, length, options, message):
    with pytest.raises(ValueError, match=message):
        loss_by_position(model, documents, length, buckets=1, **options)


@pytest.mark.parametrize("buckets", [0, 33, [4], [4, 4], [0, 33], [0, 4, 33], [-1, 5], [0, 1]])
def test_bad_buckets(model, documents, buckets):
    with pytest.raises(ValueError, match="bucket"):
        loss_by_position(model, documents, 32, buckets=buckets)


class Bigram(nn.Module):
    """Anything with the forward of a causal language model will do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": self.table(input_ids)})


def test_a_model_without_a_config(documents):
    records = perplexity_by_length(Bigram(), documents, [4, 8, 16], progress=False)
    assert records[0]["nll"] == pytest.approx(records[2]["nll"], abs=1e-6)


def test_vocabulary_and_device_of_models_of_any_kind():
    """By the config of their text, any config or none; of the weights where nothing says which are embeddings."""
    texts = Gemma3Config(text_config={"vocab_size": 11})
    for config, size in ((texts, 11), (SimpleNamespace(vocab_size=12), 12), (SimpleNamespace(), None), (None, None)):
        assert scoring.vocabulary_size(SimpleNamespace(config=config)) == size
    assert scoring.vocabulary_size(Bigram()) is None
    assert scoring.embedding_device(Bigram().to("meta")) == torch.device("meta")


def test_the_stride_is_the_papers_or_half_of_the_shortest_length():
    ids = torch.randint(VOCABULARY, (1100,))
    (record,) = perplexity_by_length(Bigram(), [ids], 600, progress=False)
    assert (record["windows"], record["tokens"]) == (3, 256 + 256 + (1100 - 856))  # ends at 600, 856, 1100
    for record in perplexity_by_length(Bigram(), [ids], [600, 101], progress=False):
        assert (record["windows"], record["tokens"]) == (1 + 500 / 50, 50 + 500)


def sure_of_another(by):
    """What it gives the next token is `exp(by)` times less likely than another one."""
    model = Bigram()
    nn.init.constant_(model.table.weight, -1e9)
    with torch.no_grad():
        model.table.weight[:, 0], model.table.weight[:, 1] = 0.0, by
    return model


@pytest.mark.parametrize("nll", [700.0, 709.5, 710.0, 1e5])
def test_a_perplexity_beyond_all_numbers_is_infinite(nll):
    model, zeros = sure_of_another(nll), [[0] * 9]
    perplexity = math.inf if nll > 709.7 else pytest.approx(math.exp(nll), rel=1e-3)
    for (record,) in (
        perplexity_by_length(model, zeros, 8, progress=False),
        loss_by_position(model, zeros, 8, buckets=1, progress=False),
        long_perplexity(model, zeros, 8, short=4, alpha=-math.inf, beta=-math.inf, progress=False),
    ):
        assert (record["nll"], record["perplexity"]) == (nll, perplexity)


def test_what_the_standard_error_says_of_the_far_context():
    def two(near, far, error):
        return [
            {"start": start, "end": 2 * start, "nll": nll, "nll_error": error}
            for start, nll in ((256, 9.0), (512, near), (1024, far))
        ]

    assert "beyond 1,024 tokens helps" in far_context(two(2.0, 1.9, 0.03))  # 2.4 errors of the difference
    assert "hurts" in far_context(two(2.0, 2.1, 0.03)) and "+0.100" in far_context(two(2.0, 2.1, 0.03))
    assert "makes no difference" in far_context(two(2.0, 2.1, 0.04)[1:])
    with pytest.raises(ValueError, match="at least two buckets"):
        far_context(two(1.0, 1.0, 0.1)[:1])


def test_documents_that_are_too_short_are_said(model, documents, monkeypatch):
    said = []
    monkeypatch.setattr(windows.logger, "warning_once", said.append)
    perplexity_by_length(model, documents, 12, progress=False)
    assert not said
    perplexity_by_length(model, documents, 33, progress=False)
    assert len(said) == 1 and said[0].startswith("2 of 4 documents have fewer than 33 tokens")


def scaled(rope_type):
    """A Llama of 64 tokens whose RoPE changes with the lengths it sees, for 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    write_rope(config, scaled_rope(config, 256, rope_type))
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_no_window_depends_on_what_ran_before(rope_type):
    """Dynamic RoPE stays at the longest length that it has seen, for all that is longer than the original's."""
    documents = torch.randint(VOCABULARY, (2, 250), generator=torch.Generator().manual_seed(1)).tolist()
    options = dict(stride=16, max_windows=3, progress=False)
    fresh = {length: perplexity_by_length(scaled(rope_type), documents, length, **options)[0] for length in (80, 250)}
    model = scaled(rope_type)
    order = [250, 80, 250, 80]
    assert [perplexity_by_length(model, documents, length, **options)[0] for length in order] == [
        fresh[length] for length in order
    ]
    both = perplexity_by_length(scaled(rope_type), documents, [80, 250], **options)
    assert perplexity_by_length(model, documents, [250, 80], **options) == both[::-1]
    position = loss_by_position(scaled(rope_type), documents, 80, buckets=2, progress=False)
    with torch.no_grad():
        model(torch.tensor(documents))
    assert loss_by_position(model, documents, 80, buckets=2, progress=False) == position
    # A pattern whose groups hold every window is dense attention.
    records = compare_attention(model, documents, [80, 250], attention=S2AttentionConfig(group_size=256), **options)
    assert records["dense"] == records["as trained"]


def test_adapted_and_wrapped_models_forget_lengths_too():
    documents = torch.randint(VOCABULARY, (2, 250), generator=torch.Generator().manual_seed(1)).tolist()
    model = get_peft_model(scaled("dynamic"), LoraConfig(target_modules=["q_proj"]))
    expected = perplexity_by_length(model, documents, 80, progress=False)
    wrapped = nn.Module()
    wrapped.module, wrapped.config = model, model.config
    wrapped.forward = model.forward
    for each in (model, wrapped):
        with torch.no_grad():
            model(torch.tensor(documents))
        assert perplexity_by_length(each, documents, 80, progress=False) == expected


def test_fewer_windows_are_spread_evenly_from_the_first_on(model, documents):
    ten = list(range(10))
    for most, chosen in {1: [0], 2: [0, 5], 3: [0, 3, 6], 4: [0, 2, 5, 7], 10: ten, 15: ten, None: ten}.items():
        assert windows.spread(ten, most) == chosen
    ids = documents[3]  # 70 tokens: windows end at 16, 26, ..., 66, 70
    (record,) = perplexity_by_length(model, [ids], 16, 10, max_windows=3, progress=False)
    scored = [range(end - 10, end) for end in (16, 36, 56)]
    losses = [token_nll(model, ids, targets[-1] - 15, target) for targets in scored for target in targets]
    assert (record["windows"], record["tokens"]) == (3, 30)
    assert record["nll"] == pytest.approx(sum(losses) / 30, abs=1e-5)
