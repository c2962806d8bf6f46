"""What people's scripts for TRL's trainer do, done with ours."""

import copy
import re

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import TrainerCallback

from hf_longlora import ContextStage, LongLoraConfig

from .helpers import TEXT, Stop, texts


class Events(TrainerCallback):
    """Step and name of what happens beside the steps."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append((state.global_step, "log"))

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append((state.global_step, "evaluate"))

    def on_save(self, args, state, control, **kwargs):
        self.seen.append((state.global_step, "save"))


EACH_EPOCH = dict(eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", eval_packing=False)


def test_epochs_are_stages(make, tmp_path):
    events = Events()
    trainer = make(callbacks=[events], eval_dataset=texts(2), load_best_model_at_end=True, report=True, **EACH_EPOCH)
    trainer.train()
    assert events.seen == [(step, what) for step in (3, 6) for what in ("log", "evaluate", "save")]
    assert "evaluation" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_stopped_within_a_stage_ends_as_epochs_do(make):
    events = Events()
    make(callbacks=[events, Stop(5)], eval_dataset=texts(2), **EACH_EPOCH).train()
    assert set(events.seen[3:]) == {(5, "log"), (5, "evaluate"), (5, "save")}


@pytest.mark.parametrize("sparse", ["s2", "windows"])
def test_columns_that_no_model_takes_may_stay(make, sparse):
    dataset = texts().add_column("id", list(range(12))).add_column("tags", [["a", "b"]] * 12)
    kept = make(output="kept", dataset=dataset, sparse=sparse, packing=False, remove_unused_columns=False)
    kept.train()
    removed = make(output="removed", dataset=dataset, sparse=sparse, packing=False)
    removed.train()
    assert kept.state.log_history[0]["loss"] == removed.state.log_history[0]["loss"]
    assert kept.state.log_history[-2]["loss"] == removed.state.log_history[-2]["loss"]


def test_a_checkpoint_s_path_is_no_text(make, tmp_path):
    make(save_strategy="steps", save_steps=2, callbacks=[Stop(2)]).train()
    resumed = make(save_strategy="steps", save_steps=2)
    assert resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2").global_step == 6
    for missing in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"There is no checkpoint to resume from: .*nowhere is no folder"):
            make(output="other").train(resume_from_checkpoint=missing)


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        (LongLoraConfig(r=4), ContextStage(512, 1)),
        (LongLoraConfig(r=4), ContextStage(128, 1)),
        (LoraConfig(r=4), ContextStage(64, 1, rope_type=None)),
    ],
    ids=["longer", "as long", "plain LoRA"],
)
def test_a_model_is_not_given_two_adapters(make, tiny_llama, config, stage):
    """PEFT changes the model that it is given, and a loop over settings would train each run on the last one's."""
    base = tiny_llama()
    first = make(model=base, output="first", stages=[ContextStage(128, 1)])
    first.train()
    for peft_config in (config, None):
        with pytest.raises(ValueError, match=r"an adapter in this LlamaForCausalLM already.*trainer.model.unload\(\)"):
            make(model=base, peft_config=peft_config, output="second", stages=[stage], dataset=texts(repeat=30))
    again = make(model=first.model.unload(), output="again", stages=[ContextStage(128, 1)])
    again.train()
    assert again.state.log_history[0]["loss"] == first.state.log_history[0]["loss"]


def test_one_config_serves_several_trainers(make):
    """As one of PEFT's does: it stays as its maker wrote it."""
    config = LongLoraConfig(r=4)
    before = copy.deepcopy(vars(config))
    lengths = []
    for length in (128, 256, 128):
        trainer = make(peft_config=config, output=str(length), stages=[ContextStage(length, 1)])
        trainer.train()
        lengths.append(trainer.model.active_peft_config.scaling.length)
    assert lengths == [128, 256, 128] and vars(config) == before


@pytest.mark.parametrize("kind", [LongLoraConfig, LoraConfig])
def test_a_saved_adapter_s_config_is_none_of_a_new_one(make, tiny_llama, tmp_path, kind):
    """Nothing would be trained, by a config that is for inference."""
    adapted = get_peft_model(tiny_llama(), kind(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "saved")
    plain = {"stages": [ContextStage(64, 1, rope_type=None)]} if kind is LoraConfig else {}
    for config in (PeftConfig.from_pretrained(tmp_path / "saved"), kind(r=4, inference_mode=True)):
        with pytest.raises(ValueError, match=rf"is_trainable=True.*make a fresh {kind.__name__}"):
            make(peft_config=config, **plain)


@pytest.mark.parametrize("change", [lambda rows: rows.shuffle(seed=1), lambda rows: rows.select(range(4))])
def test_rows_are_not_replaced(make, change):
    """The second stage would be trained on the first one's rows."""
    trainer = make()
    trainer.train_dataset = change(trainer.train_dataset)
    with pytest.raises(ValueError, match=r"train_dataset. has been replaced"):
        trainer.train()
    assert trainer.state.global_step == 0


BAD = {
    "none": (Dataset.from_dict({"text": []}), "The dataset is empty"),
    "no column": (Dataset.from_dict({"content": ["a"]}), "The dataset has no text: its columns are ['content']"),
    "null": (Dataset.from_dict({"text": ["a", None]}), "has no text in 1 of 2 rows, such as row 1"),
    "no completion": (Dataset.from_dict({"prompt": ["a"]}), "has a 'prompt' and no 'completion'"),
    "tokens": (Dataset.from_dict({"input_ids": [[5, 128]]}), "token ids from 5 to 128, and the model's are 0 to 127"),
    "classes": (Dataset.from_dict({"text": ["a"], "labels": [1]}), "has a column 'labels', which TRL takes for those"),
    "bad labels": (Dataset.from_dict({"input_ids": [[5]], "labels": [1]}), "The column 'labels' of the dataset holds"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_data_for_evaluation_are_held_to_what_training_is(make, data, message):
    """A run would have ended at its first evaluation, by whatever TRL or torch say."""
    message = re.escape(message)
    with pytest.raises(ValueError, match=message):
        make(dataset=data)
    for evaluated, what in (
        (data, "`eval_dataset`: "),
        ({"good": texts(2), "bad": data}, r"`eval_dataset\['bad'\]`: "),
    ):
        with pytest.raises(ValueError, match=f"^{what}.*{message}"):
            make(eval_dataset=evaluated)
    trainer = make(eval_dataset=texts(2))
    with pytest.raises(ValueError, match=f"^`eval_dataset`: .*{message}"):
        trainer.evaluate(data)
    trainer.evaluate(trainer.eval_dataset)  # prepared, and so token ids with labels
    trainer.evaluate({"more": texts(3)})
    with pytest.raises(TypeError, match=r"`eval_dataset` must be a datasets\.Dataset"):
        make(eval_dataset=[{"text": "a"}])


CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": TEXT}}}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("said", [{"tool_calls": [CALL]}, {"reasoning_content": TEXT}], ids=["calls", "thoughts"])
def test_answers_may_have_no_content(make, tiny_tokenizer, said, streamed):
    """As in TRL's own example of tool calls: a column of messages in which none has any."""
    (name,) = said
    tiny_tokenizer.chat_template = (
        "{%- for message in messages -%}{{ message['role'] }}: {{ message.get('content') or (message['"
        + name
        + "'] | tojson) }}{{ eos_token }}{%- endfor -%}"
    )
    row = {"prompt": [{"role": "user", "content": TEXT}], "completion": [{"role": "assistant", **said}]}
    rows = Dataset.from_list([row] * 8)
    options = dict(packing=False, stages=[ContextStage(256, 2)])
    trainer = make(dataset=rows.to_iterable_dataset() if streamed else rows, eval_dataset=rows, **options)
    (data,) = trainer._stage_data.values()
    assert data.masked and data.used == data.tokens > 8 * 50
    trainer.train()
    empty = Dataset.from_list([row, row | {"completion": [{"role": "assistant", name: None}]}])
    with pytest.raises(ValueError, match=r"'completion' of the dataset has no message with content in 1 of 2 rows"):
        make(dataset=empty, **options)


def test_rows_that_are_packed_already_are_refused(make):
    packed = Dataset.from_dict({"input_ids": [[5] * 300] * 4, "seq_lengths": [[200, 100]] * 4})
    with pytest.raises(ValueError, match="column 'seq_lengths', which says what documents rows are packed of"):
        make(dataset=packed, packing=False)


def test_an_adapter_of_another_name_is_refused(make, tiny_llama):
    """It ended in a file that isn't there, at the first checkpoint; Trainer finds no best model there either."""
    model = get_peft_model(tiny_llama(), LongLoraConfig(r=4), adapter_name="books")
    with pytest.raises(ValueError, match=r"is called books.*leave out `adapter_name`"):
        make(model=model, peft_config=None)
    model.add_adapter("default", LongLoraConfig(r=4))
    model.set_adapter("default")
    model.delete_adapter("books")
    make(model=model, peft_config=None, save_strategy="steps", save_steps=2).train()


def test_a_script_s_own_peft_model_is_trained(make, tiny_llama):
    model = get_peft_model(tiny_llama(), LongLoraConfig(r=4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make(model=model, peft_config=None)
    trainer.optimizer = optimizer
    trainer.train()
    moved = sum(int((p != before[name]).sum()) for name, p in trainer.model.named_parameters())
    assert moved > 1500  # of 6,048, less the embeddings of tokens that the texts don't have


def test_a_card_has_the_name_that_it_is_given(make, tmp_path):
    trainer = make()
    trainer.train()
    trainer.save_model()
    file = tmp_path / "out" / "README.md"
    assert ModelCard.load(file).data.model_name == "out"
    trainer.create_model_card(model_name="long-llama", dataset_name="someone/books", tags="books")
    data = ModelCard.load(file).data
    assert (data.model_name, data.datasets) == ("long-llama", ["someone/books"]) and "books" in data.tags
    trainer.args.hub_model_id = "user/longer"
    trainer.create_model_card(model_name="longer")  # as Trainer's push_to_hub calls it
    assert ModelCard.load(file).data.model_name == "user/longer"
