import pytest
import torch

from hf_longlora import demo
from hf_longlora.evaluation import perplexity_by_length


def test_stdlib_documents_are_split_by_file():
    train, test = demo.stdlib_documents()
    assert not train.keys() & test.keys()
    assert len(test) > 20
    assert 0.03 < len(test) / len(train) < 0.25
    assert not any(set(name.split("/")[:-1]) & demo.EXCLUDED_FOLDERS for name in [*train, *test])
    assert sum(len(text) > 16384 for text in test.values()) > 10  # more than 2,048 tokens of any vocabulary
    assert demo.stdlib_documents() == (train, test)


def test_tokenizer_round_trips_any_text():
    tokenizer = demo.train_tokenizer(["def f(x):\n    return x\n"] * 3, 300)
    text = "naïve = 'ÿ€😀'\n\tdef  f( x )"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert max(tokenizer(text)["input_ids"]) < len(tokenizer) <= 300


def test_tokenizer_too_small():
    with pytest.raises(ValueError, match="vocab_size=256 is below the 258"):
        demo.train_tokenizer(["text"], 256)


def test_model_config():
    config = demo.demo_model_config(512)
    assert config.vocab_size == 512
    assert config.max_position_embeddings == 256
    assert config.num_key_value_heads < config.num_attention_heads


def test_pretrain_learns_and_is_reproducible():
    config = demo.demo_model_config(64)
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 32})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16})
    documents = [[2 + (start + index) % 7 for index in range(90)] for start in range(20)]
    model = demo.pretrain(config, documents, steps=60, batch_size=4, progress=False)
    again = demo.pretrain(config, documents, steps=60, batch_size=4, progress=False)
    (record,) = perplexity_by_length(model, documents, 32, progress=False)
    assert record["perplexity"] < 2.5  # 7 where nothing was learnt
    assert not model.training
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_pretrain_without_a_full_row():
    with pytest.raises(ValueError, match="5 tokens, fewer than one row of 256"):
        demo.pretrain(demo.demo_model_config(64), [[1, 2, 3, 4]])


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_muon_updates_are_nearly_orthogonal(shape):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape)
    demo.Muon([parameter], lr=1.0).step()
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    values = torch.linalg.svdvals(parameter.detach()) / scale
    assert values.min() > 0.6 and values.max() < 1.3
    assert (parameter.detach() * parameter.grad).sum() < 0
