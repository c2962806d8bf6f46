import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from peft import get_peft_model
from transformers import TrainerState

from hf_longlora import LongLoraConfig
from hf_longlora.hub import adapter_card, folder_card, refresh_card, run
from hf_longlora.hub.card import MARK, weights_sha256
from hf_longlora.trainer import ContextStage, LongLoraSFTConfig

from ..trainer.helpers import Stop, texts

RECORDS = {
    "books": {
        "dense": [{"length": 64, "perplexity": 12.5}, {"length": 256, "perplexity": 11.25}],
        "as trained": [{"length": 256, "perplexity": 11.75}],
    }
}
LONG_PPL = [
    {"length": 8192, "short": 4096, "perplexity": 7.125, "key_tokens": 50, "tokens": 2000, "evaluator": "llama"},
    {"length": 16384, "short": 4096, "perplexity": None, "key_tokens": 0, "tokens": 2000, "evaluator": "llama"},
]
RULER = [
    {"task": task, "length": 8192, "accuracy": accuracy, "error": 0.1, "trials": 20, "chat_template": True}
    for task, accuracy in (("vt", 0.5), ("cwe", 0.25))
]
PASSKEY = [
    {"length": length, "depth": depth, "accuracy": accuracy, "trials": 10}
    for length, depth, accuracy in ((64, 0.0, 1.0), (64, 1.0, 0.9), (256, 0.0, 0.5), (256, 1.0, 1.0))
]


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
    assert "from 64 to 256 tokens" in text and "`abf` (`rope_theta` 80000), factor 4" in text
    assert "| 1 | 128 | 2 | shifted sparse | 32 | 4 | 4 |" in text
    assert "| 2 | 256 | 3 | dense | - | - | - |" in text
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


def test_the_card_calls_a_stage_dense_where_a_group_holds_all_of_it(config):
    config.schedule["group_sizes"][0] = 128
    assert "| 1 | 128 | 2 | dense | - | - | - |" in str(adapter_card(config, name="a", base_model="b"))


def test_an_adapter_of_before_there_were_sink_tokens_had_none(config):
    del config.schedule["sink_tokens"]
    assert "| 1 | 128 | 2 | shifted sparse | 32 | 0 | 4 |" in str(adapter_card(config, name="a", base_model="b"))


def test_the_card_claims_nothing_that_was_not_measured(config):
    text = str(adapter_card(config, name="a", base_model="b"))
    assert "has not been evaluated" in text
    assert "Perplexity on" not in text and "model-index" not in text


def test_an_adapter_that_was_never_put_on_a_model_has_no_card():
    with pytest.raises(ValueError, match="not resolved"):
        adapter_card(LongLoraConfig(target_length=256), name="a", base_model="b")


def test_retrieval_and_a_plot_are_shown_where_there_are_such(config):
    text = str(adapter_card(config, name="a", base_model="b", retrieval={"passkey": PASSKEY}, plot="perplexity.png"))
    assert "| tokens | 0% | 100% |" in text and "| 64 | 100% | 90% |" in text and "| 256 | 50% | 100% |" in text
    assert "![Perplexity by context length](perplexity.png)" in text
    assert "no test of reading" in text and "has not been evaluated" not in text
    results = ModelCard(text).data.eval_results
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("accuracy", "passkeys found at 64 tokens", 0.95),
        ("accuracy", "passkeys found at 256 tokens", 0.75),
    ]


def test_the_card_says_how_to_do_without_the_package(config):
    text = str(adapter_card(config, name="user/a", base_model="user/b"))
    assert "hf-longlora merge user/a merged\nvllm serve merged --max-model-len 256\n" in text
    assert "AutoTokenizer" not in text  # the base's has the base's length, and vLLM would serve no more
    assert "--hf-overrides" not in text
    config.rope["rope_parameters"] |= {"rope_type": "dynamic"}
    assert "--hf-overrides" in str(adapter_card(config, name="user/a", base_model="user/b"))


def test_a_base_that_is_a_folder_is_no_metadata(config, tmp_path):
    """The Hub takes names of its own alone there; and where a folder lay is nobody's business."""
    (tmp_path / "llama").mkdir()
    folder = tmp_path / "adapter"
    config.base_model_name_or_path = str(tmp_path / "llama")
    config.save_pretrained(folder)
    card = folder_card(folder)
    assert card.data.base_model is None and "base_model" not in card.data.to_yaml()
    assert "adapter for `llama`" in card.text and str(tmp_path) not in str(card)
    assert "# adapter" in card.text


def test_a_card_shows_a_picture_where_there_is_one_and_names_the_base_that_it_is_told(config, tmp_path):
    config.base_model_name_or_path = "someone/llama"
    config.save_pretrained(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"perplexity": RECORDS["books"]}))
    told, told_of = folder_card(tmp_path), folder_card(tmp_path, base_model="user/other")
    assert "| dense | 12.50 | 11.25 |" in told.text and "perplexity.png" not in told.text
    assert (told.data.base_model, told_of.data.base_model) == ("someone/llama", "user/other")
    (tmp_path / "perplexity.png").write_bytes(b"PNG")
    assert "(perplexity.png)" in folder_card(tmp_path).text
    (tmp_path / "evaluation.json").write_text(json.dumps({"passkey": PASSKEY}))
    assert "perplexity.png" not in folder_card(tmp_path).text  # of another time


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, "LoRA (r = 8, alpha = 16) on `k_proj`, `o_proj`, `q_proj`, `v_proj`, norms, embeddings"),
        (
            {"target_modules": ["q_proj", "up_proj"], "train_norms": False, "use_dora": True},
            "DoRA (r = 8, alpha = 16) on `q_proj`, `up_proj`, embeddings",
        ),
        (
            {"target_modules": r".*\.1\..*_proj", "r": 2, "train_embeddings": False},
            r"LoRA (r = 2, alpha = 16) on `.*\.1\..*_proj`, norms",
        ),
        (
            {"target_modules": ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"], "embedding_rank": 4},
            "LoRA (r = 8, alpha = 16) on `up_proj`, norms, embeddings by LoRA (r = 4)",
        ),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
            "LoRA (r = 8, alpha = 16) on `q_proj`, norms, embeddings of some tokens",
        ),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"], "train_norms": False},
            "LoRA (r = 8, alpha = 16) on `q_proj`, `up_proj`, embeddings",
        ),
    ],
)
def test_the_card_says_what_was_trained(tiny_llama, options, trained):
    model = get_peft_model(tiny_llama(), LongLoraConfig(**options))
    assert f"Trained: {trained}.\n" in adapter_card(model.active_peft_config, name="a", base_model="b").text


def test_the_card_loads_the_revision_of_the_base_that_was_trained(config):
    config.revision = "v1"
    text = adapter_card(config, name="user/long", base_model="user/llama").text
    assert 'AutoModelForCausalLM.from_pretrained("user/llama", revision="v1")' in text


# --- the trainer's --------------------------------------------------------------------------------------------------


def test_a_card_is_brought_up_to_date_unless_it_was_edited(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert refresh_card(tmp_path, "someone/long")
    folder_card(tmp_path, name="someone/long", tags=["mine"], dataset="someone/books", license="mit").save(
        tmp_path / "README.md"
    )
    evaluation = {"perplexity": RECORDS["books"], "passkey": PASSKEY, "needles": PASSKEY[:2]}
    evaluation |= {"ruler": RULER, "long_ppl": LONG_PPL}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert refresh_card(tmp_path)  # under the name that it has
    card = ModelCard.load(tmp_path / "README.md")
    assert 'from_pretrained(base, "someone/long")' in card.text and "Each is of 10 texts." in card.text
    assert "# long\n" in card.text and "| dense | 12.50 | 11.25 |" in card.text
    assert "## Passkeys found, by" in card.text and "## Passkeys found among several, by" in card.text
    assert "| tokens | vt | cwe | mean |" in card.text and "| 8,192 tokens | 50.0% | 25.0% | 37.5% |" in card.text
    assert "20 texts in the tokenizer's chat template" in card.text
    assert "| LongPPL | 7.12 | no key token |" in card.text and "| key tokens | 2.50% of 2,000 | 0.00%" in card.text
    assert "context of 4,096 tokens does not tell" in card.text and "found by `llama`" in card.text
    assert [r.metric_value for r in card.data.eval_results if r.dataset_type == "ruler"] == [0.5, 0.25]
    assert "mine" in card.data.tags and card.data.tags.count("longlora") == 1
    assert (card.data.datasets, card.data.license) == (["someone/books"], "mit")
    edited = str(card).replace(MARK, "") + "\nMine.\n"
    (tmp_path / "README.md").write_text(edited)
    assert not refresh_card(tmp_path, "someone/long") and (tmp_path / "README.md").read_text() == edited


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_leaves_the_card_of_what_happened(make, tmp_path):
    trainer = make(save_strategy="steps", save_steps=100, dense_every=2, learning_rate=3e-4)
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    for folder, steps in ((out, "6"), (out / "checkpoint-6", "6"), (out / "checkpoint-3", "3 of 6")):
        text = (folder / "README.md").read_text()
        assert f"- steps: {steps}, batch size 2" in text
        assert "None" not in text and "More Information Needed" not in text and str(tmp_path) not in text
        assert {"longlora", "hf_longlora", "sft", "trl"} <= set(front(text)["tags"])
    text = (out / "README.md").read_text()
    tokens = int(trainer.state.log_history[-2]["num_tokens"])
    for line in (
        "| 2 | 256 | 3 | shifted sparse | 64 | 4 | 2 |",
        "- data: 12 examples, packed (wrapped)",
        f"- tokens: {tokens:,}",
        "- learning rate: 0.0003, constant_with_warmup, warm-up over 1 step",
        "RoPE type `yarn`, factor 4",
    ):
        assert line in text, line
    assert all(f"- {fact}: " in text for fact in ("loss", "hardware", "time", "peak memory", "versions", "date"))
    assert "energy" not in text  # it was not measured
    # what was known stays known where the card is written anew
    assert str(folder_card(out, tags=["trl", "sft"])) == text


def test_an_evaluation_and_measured_energy_come_into_the_card(make, tmp_path):
    out = tmp_path / "out"
    trainer = make()
    trainer.train()
    (out / run.EMISSIONS_NAME).write_text("run_id,energy_consumed\na,0.25\nb,0.5\n")
    trainer.save_model()
    evaluation = {"adapter_sha256": weights_sha256(out), "perplexity": RECORDS["books"], "passkey": PASSKEY}
    evaluation["documents"] = [f"{number}.txt" for number in range(6)]
    (out / "evaluation.json").write_text(json.dumps(evaluation))
    (out / "perplexity.png").write_bytes(b"PNG")
    trainer.save_model()
    text = (out / "README.md").read_text()
    assert "- energy: 0.75 kWh, by codecarbon" in text
    assert "## Perplexity on 0.txt, 1.txt, 2.txt, 3.txt, 2 more\n" in text  # which may have been trained on
    assert "| dense | 12.50 | 11.25 |" in text and "| 256 | 50% | 100% |" in text and "(perplexity.png)" in text
    assert len(front(text)["model-index"][0]["results"]) == 2
    trainer.train()  # on, to other weights
    trainer.save_model()
    text = (out / "README.md").read_text()
    assert "has not been evaluated" in text and "12.50" not in text and "model-index" not in front(text)


def test_a_whole_model_has_trl_s_card(make, tmp_path):
    trainer = make(peft_config=None)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "LongLoRA SFT" in (tmp_path / "out" / "README.md").read_text()


def test_the_time_is_that_of_all_starts(make):
    options = dict(save_strategy="steps", save_steps=100)
    first = make(callbacks=[Stop(2)], **options)
    first.train()
    logs = [log for log in first.state.log_history if "loss" in log]
    before = run.training_seconds(logs)
    assert before == pytest.approx(
        sum(
            (log["num_tokens"] - earlier) / log["tokens_per_second"]
            for log, earlier in zip(logs, (0, logs[0]["num_tokens"]), strict=True)
        )
    )
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=True)
    logs = [log for log in resumed.state.log_history if "loss" in log]
    assert run.training_seconds(logs) > before and run.training_seconds(logs[:2]) == pytest.approx(before)


@pytest.mark.parametrize(
    ("seconds", "text"), [(34.4, "34 s"), (89, "89 s"), (90, "2 min"), (3599, "1 h 0 min"), (4320, "1 h 12 min")]
)
def test_durations(seconds, text):
    assert run.duration(seconds) == text


def test_facts_that_are_not_known_are_left_out(tmp_path):
    args = LongLoraSFTConfig(str(tmp_path), stages=[ContextStage(128, 2)], use_cpu=True, bf16=False)
    facts = run.run_facts(args, TrainerState(global_step=1, max_steps=2))
    assert set(facts) == {"steps", "learning rate", "hardware", "versions", "date"}
    logged = run.run_facts(args, TrainerState(global_step=1, max_steps=2, log_history=[{"loss": 2.0}]))
    assert set(logged) == {*facts, "loss"}


def test_facts_are_read_as_they_were_written(tmp_path):
    folder = tmp_path / "not" / "there"
    assert run.read_facts(folder) == {}
    for facts in ({"data": "Über, 12 examples"}, {"data": "others", "loss": "1 at first"}):
        run.write_facts(folder, facts)
        assert run.read_facts(folder) == facts


def test_facts_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(LongLoraSFTConfig, "data_parallel", property(lambda args: 3))
    args = LongLoraSFTConfig(
        str(tmp_path),
        stages=[ContextStage(128, 2000)],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=200,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=1000,
    )
    logs = [
        {"loss": 3.25, "num_tokens": 100_000, "tokens_per_second": 1000.0, "peak_memory_gib": 2.375},
        {"eval_loss": 3.0, "eval_books_loss": 2.0},
        {"loss": 2.5, "num_tokens": 300_000.0, "tokens_per_second": 2000.0, "peak_memory_gib": 1.5},
        {"eval_loss": 2.875, "eval_books_loss": 2.125, "eval_runtime": 9.0},
        {"loss": 2.75, "num_tokens": 400_000, "tokens_per_second": None},
        {"train_loss": 2.8, "train_runtime": 1000.0},
    ]
    (tmp_path / run.EMISSIONS_NAME).write_text("run_id,energy_consumed\na,0.25\nb,0.5\n")
    facts = run.run_facts(args, TrainerState(global_step=1500, max_steps=2000, log_history=logs))
    assert facts["versions"].startswith("hf-longlora ") and ", trl " in facts["versions"]
    del facts["versions"], facts["date"]
    assert facts == {
        "steps": "1,500 of 2,000, batch size 1,200",
        "tokens": "400,000",
        "learning rate": "0.0002, cosine, warm-up over 1,000 steps",
        "loss": "3.250 at first, 2.750 at last",
        "evaluation loss": "3.000 at first, 2.875 at last",
        "evaluation loss, books": "2.000 at first, 2.125 at last",
        "hardware": f"{os.cpu_count()} CPU cores",
        "time": "3 min of training",  # 100 s and 100 s; of the third log it is not known
        "peak memory": "2.4 GiB of the process",
        "energy": "0.75 kWh, by codecarbon",
    }
    assert list(facts)[:3] == ["steps", "tokens", "learning rate"]


def test_hardware_is_the_cards_and_how_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert run.hardware(2, torch.device("cuda", 1)) == "2 x card 1"
    assert run.hardware(1, torch.device("mps")) == "1 x mps"


def test_a_dataset_s_name_is_told_where_it_has_one(make, tmp_path):
    dataset = texts()
    dataset.info.dataset_name = "pg19"
    assert make(dataset=dataset)._data == "pg19, 12 examples, packed (wrapped)"
    dataset.info.dataset_name = dataset.info.builder_name = "json"  # that is how it was read
    assert make(dataset=dataset, packing=False)._data == "12 examples"


# --- the cards in this repository -----------------------------------------------------------------------------------

CARDS = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("folder", CARDS, ids=[folder.name for folder in CARDS])
def test_the_published_cards_are_those_that_the_code_writes(folder):
    from benchmarks.quality import example, publish

    of = example if (folder / example.TIMES).is_file() else publish
    assert str(of.card(folder)) == (folder / "README.md").read_text()
    assert front((folder / "README.md").read_text())["library_name"] == "peft"
