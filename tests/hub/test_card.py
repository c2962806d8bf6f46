import json

import pytest
from huggingface_hub import ModelCard, metadata_load
from peft import get_peft_model

from hf_longlora import LongLoraConfig
from hf_longlora.hub import adapter_card
from hf_longlora.trainer import ContextStage, LongLoraSFTConfig

RECORDS = {
    "books": {
        "dense": [{"length": 64, "perplexity": 12.5}, {"length": 256, "perplexity": 11.25}],
        "as trained": [{"length": 256, "perplexity": 11.75}],
    }
}


@pytest.fixture
def config(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), LongLoraConfig(target_length=256))
    args = LongLoraSFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        stages=[ContextStage(128, 2), ContextStage(256, 3, attention="dense")],
        dense_every=4,
    )
    config = model.peft_config["default"]
    config.schedule = json.loads(json.dumps(args.schedule.to_dict()))
    return config


def test_the_card_says_what_happened(config, tmp_path):
    card = adapter_card(
        config,
        name="someone/llama-256",
        base_model="someone/llama",
        perplexity=RECORDS,
        training={"tokens": "1,024"},
        license="apache-2.0",
    )
    text = str(card)
    assert "from 64 to 256 tokens: RoPE type `yarn`, factor 4 over" in text
    assert "| 1 | 128 | 2 | shifted sparse | 8 | 4 |" in text
    assert "| 2 | 256 | 3 | dense | - | - |" in text
    assert "| dense | 12.50 | 11.25 |" in text
    assert "| as trained |  | 11.75 |" in text
    assert "- tokens: 1,024" in text
    assert 'PeftModel.from_pretrained(base, "someone/llama-256")' in text
    assert "None" not in text

    card.save(tmp_path / "README.md")
    metadata = metadata_load(tmp_path / "README.md")
    assert (metadata["library_name"], metadata["base_model"]) == ("peft", "someone/llama")
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in results] == [
        ("books", "perplexity", 12.5),
        ("books", "perplexity", 11.25),
    ]


def test_the_card_claims_nothing_that_was_not_measured(config):
    text = str(adapter_card(config, name="a", base_model="b"))
    assert "has not been evaluated" in text
    assert "Perplexity on" not in text and "model-index" not in text


def test_an_adapter_that_was_never_put_on_a_model_has_no_card():
    with pytest.raises(ValueError, match="not resolved"):
        adapter_card(LongLoraConfig(target_length=256), name="a", base_model="b")
