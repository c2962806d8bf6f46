import contextlib
import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
)
from trl import SFTTrainer

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer
from hf_longlora.attention import get_s2_attention, interface
from hf_longlora.rope import scaled_rope, write_rope
from hf_longlora.trainer import checkpoints, guards, identity

from .helpers import STAGES, TEXT, Spy, Stop, check_same, texts, weights


def test_stages_in_one_run(make, tmp_path):
    spy = Spy()
    trainer = make(dense_every=2, callbacks=[spy])
    before = weights(trainer)
    trainer.train()
    assert spy.steps == [
        (2.0, 32, "auto"),
        (2.0, 32, "dense"),
        (2.0, 32, "auto"),
        (4.0, 64, "dense"),
        (4.0, 64, "auto"),
        (4.0, 64, "dense"),
    ]
    moved = [name for name, p in weights(trainer).items() if not torch.equal(p, before[name])]
    assert {kind for kind in ("lora_B", "norm", "embed_tokens") if any(kind in name for name in moved)} == {
        "lora_B",
        "norm",
        "embed_tokens",
    }
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [1, 1, 1, 2, 2, 2]
    assert [log["context_length"] for log in logs] == [128] * 3 + [256] * 3
    assert [log["rope_factor"] for log in logs] == [2.0] * 3 + [4.0] * 3
    assert [log["attention"] for log in logs] == ["s2attn", "dense"] * 1 + ["s2attn", "dense", "s2attn", "dense"]
    assert all(log["tokens_per_second"] > 0 and log["peak_memory_gib"] > 0 for log in logs)
    assert get_s2_attention(trainer.model).mode == "auto"


def test_each_step_sees_its_stage_s_length(make):
    seen = []

    class Lengths(LongLoraSFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(tuple(inputs["input_ids"].shape))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make(gradient_accumulation_steps=2)
    trainer.__class__ = Lengths
    trainer.train()
    # wrapped packing ends in one shorter row for each pass over the text
    assert [shape[1] for shape in seen[:6]].count(128) >= 5 and all(shape[1] <= 128 for shape in seen[:6])
    assert [shape[1] for shape in seen[6:]].count(256) >= 5 and len(seen) == 12


def test_evaluation_is_of_the_last_stage_s_length_with_the_rope_of_the_stage_trained(make):
    seen = []

    class Lengths(LongLoraSFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if not model.training:
                seen.append((self.state.global_step, inputs["input_ids"].shape[1], rope_of(self)[0]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make(eval_strategy="steps", eval_steps=1, eval_dataset=texts(2))
    trainer.__class__ = Lengths
    trainer.train()
    assert seen == [(step, 256, 2.0 if step <= 3 else 4.0) for step in range(1, 7)]


def test_the_saved_adapter_carries_the_last_rope(make, tiny_llama, tmp_path):
    trainer = make()
    trainer.train()
    trainer.save_model()
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (stored["target_length"], stored["rope_type"], stored["schedule"]["group_sizes"]) == (
        256,
        "yarn",
        [32, 64],  # of the base's 64 tokens, where that is a quarter at most
    )
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    assert loaded.config.rope_parameters["factor"] == 4.0
    x = torch.randint(3, 100, (1, 200))
    assert torch.allclose(loaded(input_ids=x).logits, trainer.model.eval()(input_ids=x).logits, atol=1e-6)


RESUMED_STAGES = {
    "yarn": STAGES,
    "dynamic": [ContextStage(s.max_length, s.max_steps, rope_type="dynamic") for s in STAGES],
    "dense end": [ContextStage(128, 3), ContextStage(128, 3, rope_type=None, attention="dense")],
}


@pytest.mark.parametrize("stages", RESUMED_STAGES.values(), ids=RESUMED_STAGES)
def test_a_resumed_run_is_the_unbroken_run(make, stages, tmp_path):
    """From a checkpoint in stage 1 (2), at the boundary (3) and in stage 2 (5)."""
    options = dict(
        stages=stages,
        dense_every=2,
        packing_strategy="bfd",
        dataset=texts(40, repeat=2),
        gradient_accumulation_steps=2,
    )
    unbroken = make(output="unbroken", save_strategy="steps", save_steps=1, **options)
    unbroken.train()
    for stop in (2, 3, 5):
        checkpoint = str(tmp_path / "unbroken" / f"checkpoint-{stop}")
        resumed = make(**options)
        resumed.train(resume_from_checkpoint=checkpoint)
        check_same(
            resumed, unbroken, checkpoint, ("step", "loss", "stage", "context_length", "rope_factor", "attention")
        )


def test_a_stopped_run_goes_on_from_its_last_checkpoint(make):
    options = dict(dense_every=2, save_strategy="steps", save_steps=100)
    unbroken = make(output="unbroken", **options)
    unbroken.train()
    broken = make(callbacks=[Stop(4)], **options)
    broken.train()
    assert broken.state.global_step == 4
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=True)
    expected, got = weights(unbroken), weights(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert any(not torch.equal(got[name], p) for name, p in weights(broken).items())


def test_the_data_have_a_seed_of_their_own(make):
    """As `Trainer` has it: `data_seed` orders the data, `seed` does where it is not given."""

    def shown(**options):
        return make(packing=False, **options).train_dataset["input_ids"]

    default = shown()
    assert shown(data_seed=42) == default  # the seed
    other = shown(data_seed=7)
    assert other != default and shown(data_seed=7, seed=1) == other and shown(seed=7) == other


def test_save_steps_of_0_leave_a_checkpoint_at_each_stage_s_end(make, tmp_path):
    make(save_strategy="steps", save_steps=0).train()
    assert {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def rope_of(trainer):
    return trainer.model.config.rope_parameters["factor"], trainer.model.active_peft_config.target_length


def test_a_finished_run_resumed_is_saved_as_it_was(make, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    options = dict(save_strategy="steps", save_steps=3)
    make(**options).train()
    again = make(**options)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert rope_of(again) == (4.0, 256)
    assert "Other weights" not in caplog.text  # the checkpoint's RoPE is set


@pytest.mark.parametrize("best", [3, 6], ids=["in stage 1", "the last"])
def test_the_best_model_has_the_rope_it_was_trained_with(make, best, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = make(
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=texts(2),
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="epoch",
        greater_is_better=best == 6,
    )
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_epoch": trainer.state.epoch}
    trainer.train()
    assert trainer.state.best_global_step == best
    assert rope_of(trainer) == ((2.0, 128) if best == 3 else (4.0, 256))
    assert ("it is for 128 tokens" in caplog.text) == (best == 3)
    assert get_s2_attention(trainer.model).mode == "auto"


def test_bf16_base_resumes_exactly_and_saves_in_its_dtype(make, tiny_llama, tmp_path):
    options = dict(save_strategy="steps", save_steps=2)

    def model():
        torch.manual_seed(0)
        return tiny_llama().to(torch.bfloat16)

    unbroken = make(model=model(), output="unbroken", **options)
    unbroken.train()
    broken = make(model=model(), output="broken", callbacks=[Stop(2)], **options)
    broken.train()
    resumed = make(model=model(), output="broken", **options)
    resumed.train(resume_from_checkpoint=True)
    norm = next(name for name in weights(resumed) if "norm" in name)
    assert weights(resumed)[norm].dtype == torch.float32
    assert all(torch.equal(p, weights(resumed)[name]) for name, p in weights(unbroken).items())
    resumed.save_model()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    assert {t.dtype for name, t in saved.items() if "norm" in name or "embed" in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "warned"),
    [({}, 0), ({"peft_config": None}, 1), ({"peft_config": None, "learning_rate": 2e-5}, 0)],
    ids=["adapter", "all weights", "all weights, at a rate of their own"],
)
def test_the_rate_of_adapters_is_not_that_of_all_weights(make, monkeypatch, options, warned):
    said = []
    monkeypatch.setattr(guards.logger, "warning", said.append)
    make(**{"learning_rate": LongLoraSFTConfig.learning_rate} | options)
    assert ["All weights are trained at a learning rate of 0.0001" in words for words in said] == [True] * warned


def test_full_fine_tuning_writes_rope_to_the_config(make, tmp_path):
    trainer = make(peft_config=None)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.rope_parameters["factor"] == 4.0
    x = torch.randint(3, 100, (1, 200))
    assert torch.allclose(loaded(input_ids=x).logits, trainer.model.eval()(input_ids=x).logits, atol=1e-6)


@pytest.mark.parametrize("peft_config", ["default", None], ids=["adapter", "all weights"])
def test_no_old_length_is_saved_beside_a_longer_model(make, tiny_llama, tiny_tokenizer, tmp_path, peft_config):
    tiny_tokenizer.model_max_length = 64
    model = tiny_llama()
    model.generation_config.max_length = 64
    trainer = make(model=model, peft_config=peft_config, save_strategy="steps", save_steps=100)
    trainer.train()
    trainer.save_model()
    lengths = {"checkpoint-3": 128, "checkpoint-6": 256, ".": 256}
    for name, length in lengths.items():
        assert AutoTokenizer.from_pretrained(tmp_path / "out" / name).model_max_length == length
        if peft_config is None:
            assert GenerationConfig.from_pretrained(tmp_path / "out" / name).max_length == length
    # One of a kind that knows no limit keeps to that.
    tiny_tokenizer.model_max_length = 10**9
    make().save_model()
    assert tiny_tokenizer.model_max_length == 10**9


def test_an_existing_adapter_goes_on(make, tiny_llama, tmp_path):
    first = make(stages=STAGES[:1])
    first.train()
    first.save_model()
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"), is_trainable=True)
    spy = Spy()
    second = make(
        model=model,
        peft_config=None,
        output="second",
        stages=[ContextStage(96, 1, rope_type=None), ContextStage(512, 1)],
        dataset=texts(repeat=20),
        callbacks=[spy],
    )
    second.train()
    assert [step[0] for step in spy.steps] == [2.0, 8.0]  # as the adapter had it; then cumulative, from the base


@pytest.fixture
def documents(monkeypatch):
    """The documents of each call of sparse attention."""
    seen = []
    real = interface._documents

    def record(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(interface, "_documents", record)
    return seen


def test_conversations_with_bfd_packing(make, documents):
    chats = [
        [{"role": "user", "content": f"Tell me {i}"}, {"role": "assistant", "content": TEXT * (1 + i % 7)}]
        for i in range(60)
    ]
    trainer = make(
        dataset=Dataset.from_dict({"messages": chats}),
        packing_strategy="bfd",
        assistant_only_loss=True,
        stages=[ContextStage(128, 2), ContextStage(256, 2)],
    )
    trainer.train()
    assert any(docs.packed for docs in documents)  # packed, and kept apart
    assert max(docs.longest for docs in documents) > 128


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_strategies(make, documents, strategy):
    """Documents are kept apart where TRL keeps them apart, and are one stream where it doesn't."""
    dataset = texts(40, repeat=1)
    lengths = {"bfd": [128, 128], "bfd_split": [128, 128], "wrapped": [128, 256]}[strategy]
    make(dataset=dataset, packing_strategy=strategy, stages=[ContextStage(n, 2) for n in lengths]).train()
    assert all(docs.packed for docs in documents) == (strategy != "wrapped")
    longest = max(docs.longest for docs in documents)
    assert longest == 256 if strategy == "wrapped" else 64 < longest <= 128


class Recorder(LongLoraSFTTrainer):
    """Keeps each batch, and what a row of it is worth by itself, without padding."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        alone, targets = 0.0, 0
        for ids, mask, labels in zip(*(inputs[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
            assert (labels[mask == 0] == -100).all()
            row, labels = ids[mask == 1][None], labels[mask == 1]
            with torch.no_grad():
                logits = model(input_ids=row).logits[0, :-1]
            alone += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            targets += (labels[1:] != -100).sum().item()
        self.seen.append((inputs, float(loss.detach()), alone / targets))
        return loss


def test_a_padded_row_is_trained_as_it_would_be_alone(make):
    trainer = make(packing=False, dataset=texts(repeat=3), stages=[ContextStage(128, 3), ContextStage(200, 3)])
    trainer.__class__, trainer.seen = Recorder, []
    before = weights(trainer)
    trainer.train()
    masks = [inputs["attention_mask"] for inputs, *_ in trainer.seen]
    assert [max(m.shape[1] for m in part) for part in (masks[:3], masks[3:])] == [128, 200]
    assert any((mask == 0).any() for mask in masks)
    assert get_s2_attention(trainer.model).config.group_size < 128  # rows are sparse
    for _, batch, alone in trainer.seen:
        assert batch == pytest.approx(alone, rel=1e-4)
    assert all(not torch.equal(p, before[name]) for name, p in weights(trainer).items() if "lora_A" not in name)


def test_prompts_are_context_and_completions_are_taught(make, tiny_tokenizer):
    pairs = Dataset.from_dict({"prompt": [f"What time, {i}? " for i in range(8)], "completion": [TEXT * 2] * 8})
    trainer = make(dataset=pairs, packing=False, stages=[ContextStage(96, 3)])
    trainer.__class__, trainer.seen = Recorder, []
    trainer.train()
    for inputs, *_ in trainer.seen:
        for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            taught = labels != -100
            assert torch.equal(ids[taught], labels[taught])
            assert (TEXT * 2).startswith(tiny_tokenizer.decode(labels[taught], skip_special_tokens=True).strip())
            assert tiny_tokenizer.decode(ids[: int(taught.int().argmax())]).startswith("What time, ")


def test_token_ids_are_taken_as_they_are_and_cut_to_the_stage(make):
    tokens = [[5 + (i + row) % 90 for i in range(300)] for row in range(8)]
    trainer = make(dataset=Dataset.from_dict({"input_ids": tokens}), packing=False)
    trainer.__class__, trainer.seen = Recorder, []
    trainer.train()
    for number, (inputs, *_) in enumerate(trainer.seen):
        length = 128 if number < 3 else 256
        for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
            assert ids == labels and ids in [row[:length] for row in tokens]


def test_an_evaluation_set_may_be_called_train(make):
    trainer = make(eval_strategy="no")
    trainer.evaluate({"train": texts(2)})
    assert len(trainer.train_dataset) == 2 * (3 + 3)


def test_a_run_stopped_in_a_dense_step_leaves_the_model_sparse_in_training(make):
    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make(stages=[ContextStage(128, 1, attention="dense")], callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert get_s2_attention(trainer.model).mode == "auto"


def test_the_training_set_may_be_the_evaluation_set(make):
    dataset = texts()
    trainer = make(dataset=dataset, eval_dataset=dataset, packing=False, eval_strategy="no")
    assert len(trainer.train_dataset) == 2 * (3 + 3) and len(trainer.eval_dataset) == len(dataset) == 12
    other = make(eval_dataset=texts(), packing=False)
    assert trainer.eval_dataset[0]["input_ids"] == other.eval_dataset[0]["input_ids"]


def test_evaluation_during_training_is_dense(make, monkeypatch):
    trainer = make(eval_strategy="steps", eval_steps=2, eval_dataset=texts(2))
    sparse = []
    real = interface._documents

    def record(*args):
        sparse.append(trainer.model.training)
        return real(*args)

    monkeypatch.setattr(interface, "_documents", record)
    trainer.train()
    assert len([log for log in trainer.state.log_history if "eval_loss" in log]) == 3
    assert sparse and all(sparse)


def test_no_batch_depends_on_the_lengths_before_it(make, tiny_llama):
    """Dynamic RoPE remembers the longest; neither evaluations nor the steps of a run may."""
    model = tiny_llama()
    write_rope(model.config, scaled_rope(model.config, 512, "dynamic"))
    state = tiny_llama().state_dict()

    def trainer():
        scaled = type(model)(copy.deepcopy(model.config))
        scaled.load_state_dict(state)
        return make(
            model=scaled,
            stages=[ContextStage(256, 2, rope_type=None)],
            packing=False,
            per_device_eval_batch_size=1,
            eval_dataset=texts(2, repeat=2),
            peft_config=None,
        )

    fresh, used = trainer(), trainer()
    expected = fresh.evaluate()["eval_loss"]
    ids = torch.randint(3, 100, (1, 500))
    with torch.no_grad():
        used.model.eval()(input_ids=ids)
    assert used.evaluate()["eval_loss"] == expected
    with torch.no_grad():
        used.model.eval()(input_ids=ids)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (fresh, used) if t.train()]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_two_lines_change_a_trl_script(tiny_llama, tiny_tokenizer, tmp_path):
    """The stock script and ours share every argument but the trainer's, the config's and the adapter's class."""
    from trl import SFTConfig

    shared = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    stages = [ContextStage(128, 2)]
    for trainer_class, config, peft_config in (
        (SFTTrainer, SFTConfig(str(tmp_path / "stock"), **shared, max_steps=2), LoraConfig(r=4)),
        (LongLoraSFTTrainer, LongLoraSFTConfig(str(tmp_path / "ours"), **shared, stages=stages), LongLoraConfig(r=4)),
    ):
        trainer = trainer_class(
            model=tiny_llama(),
            args=config,
            train_dataset=texts(),
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )
        assert trainer.train().global_step == 2


@pytest.mark.parametrize("given", [None, {"attn_implementation": None}, {"attn_implementation": "sdpa"}])
def test_the_model_may_be_a_path(make, tiny_llama, tiny_tokenizer, given, tmp_path):
    """Whatever attention its arguments ask for: TRL's script says None where none is named."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    trainer = make(model=str(tmp_path / "base"), model_init_kwargs=given)
    assert trainer.model.config._attn_implementation == "s2attn"
    trainer.train()


def test_an_adapter_s_folder_is_no_model_s(make, tmp_path):
    make().save_model()
    with pytest.raises(ValueError, match=r"is an adapter, and training starts from a model.*takes PeftModel"):
        make(model=str(tmp_path / "out"), output="other")


def test_nothing_is_saved_into_the_model_s_own_folder(make, tiny_llama, tmp_path):
    """An adapter there would be loaded with the base, and by whatever is trained on it next."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "base")
    on_it = get_peft_model(type(model).from_pretrained(tmp_path / "base"), LongLoraConfig(r=2))
    for given in (str(tmp_path / "base"), loaded, on_it):
        adapter = None if given is on_it else LongLoraConfig(r=2)
        with pytest.raises(ValueError, match=r"output_dir='.*base' is the folder of the model that is trained"):
            make(model=given, peft_config=adapter, output="base")


def test_the_vocabulary_is_not_resized(make):
    """The published code resizes it unconditionally."""
    trainer = make()
    trainer.train()
    assert trainer.model.get_input_embeddings().weight.shape[0] == 128


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [ContextStage(64, 1)]}, r"Stage 1.*reaches 64 tokens already.*rope_type=None"),
        ({"stages": [ContextStage(128, 1, rope_type="spiral")]}, "Stage 1.*unknown rope_type"),
        ({"peft_config": LoraConfig(r=4)}, "saved without RoPE"),
        ({"peft_config": LongLoraConfig(r=4, target_length=512)}, "target_length=512.*contradicts"),
        ({"peft_config": LongLoraConfig(r=4, rope_type="linear")}, "contradict the stages"),
        ({"peft_config": LongLoraConfig(r=4, rope_parameters={"rope_type": "yarn"})}, "contradict the stages"),
        ({"dataset": Dataset.from_dict({"content": ["a"]})}, "no text.*content"),
        ({"dataset": Dataset.from_dict({"messages": [["a"]]})}, "not a list of messages"),
        ({"dataset": Dataset.from_dict({"text": [1]})}, "not text alone"),
        ({"dataset": Dataset.from_dict({"text": []})}, "empty"),
        ({"dataset": Dataset.from_dict({"text": ["short"] * 9}), "packing": False}, "Too few tokens for stage 1"),
        ({"dataset": texts(1, repeat=2), "packing_strategy": "bfd"}, "Too few tokens for stage 2 .*wrapped"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "group_by_length"}, "mix the stages"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "skip_prepare_dataset"),
        ({"dataset": Dataset.from_dict({"text": ["a"], "image": [1]})}, "images are not supported"),
        ({"padding_free": True, "packing": False}, "set packing=True as well"),
        (
            {"gradient_accumulation_steps": 0},
            "`gradient_accumulation_steps` must be a whole number",
        ),
        (
            {"per_device_eval_batch_size": 0},
            "`per_device_eval_batch_size` must be a whole number",
        ),
        ({"eval_strategy": "steps", "eval_steps": 0}, 'eval_steps=0.*eval_strategy="no"'),
        ({"logging_steps": 0}, "non-zero --logging_steps"),
        ({"attention_kernel": "flex"}, "The attention kernel 'flex' lacks device 'cpu'.*'auto' or one of .*'sdpa'"),
    ],
)
def test_refused_before_training(make, tiny_llama, options, message):
    model = tiny_llama()
    rope = copy.deepcopy(model.config.rope_parameters)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        make(model=model, **options)
    assert model.config.rope_parameters == rope


def frozen(model, *parts):
    """`model` with what any of `parts` names frozen."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(False)
    return model


def test_a_run_that_would_train_nothing_is_refused(make, tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), LongLoraConfig(target_length=128)).save_pretrained(tmp_path / "adapter")
    options = dict(peft_config=None, stages=[ContextStage(256, 1)])
    adapter = str(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Nothing would be trained.*is_trainable=True"):
        make(model=PeftModel.from_pretrained(tiny_llama(), adapter), **options)
    lora = get_peft_model(tiny_llama(), LoraConfig(inference_mode=True))
    with pytest.raises(ValueError, match=r"Nothing would be trained.*is_trainable=True"):
        make(model=lora, peft_config=None, stages=[ContextStage(64, 1, rope_type=None)])
    with pytest.raises(ValueError, match="no weight of LlamaForCausalLM has requires_grad"):
        make(model=tiny_llama().requires_grad_(False), **options)
    make(model=tiny_llama().requires_grad_(False))  # its adapter
    # Something is trained, but nothing of the adapter.
    model = PeftModel.from_pretrained(tiny_llama(), adapter)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"LoRA, norms, embeddings.*is_trainable=True"):
        make(model=model, **options)
    make(model=PeftModel.from_pretrained(tiny_llama(), adapter, is_trainable=True), **options)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (["lora_"], "LoRA"),
        (["norm"], "norms"),
        (["embed"], "embeddings"),
        (["norm", "embed"], "norms, embeddings"),
        (["layers.0", "lora_A"], None),  # a choice among what is trained
    ],
)
def test_a_part_of_an_adapter_that_would_not_be_trained_is_named(make, tiny_llama, parts, named):
    """Its card would say that it was trained."""
    model = frozen(get_peft_model(tiny_llama(), LongLoraConfig()), *parts)
    if named is None:
        make(model=model, peft_config=None)
        return
    with pytest.raises(ValueError, match=f"asks for {named}, of which nothing is trainable"):
        make(model=model, peft_config=None)


@pytest.mark.parametrize("options", [{"embedding_rank": 2}, {"trainable_token_indices": [5, 6]}], ids=str)
def test_embeddings_trained_in_part_are_the_embeddings(make, tiny_llama, options):
    model = get_peft_model(tiny_llama(), LongLoraConfig(r=2, **options))
    make(model=model, peft_config=None)
    with pytest.raises(ValueError, match="asks for embeddings, of which nothing is trainable"):
        make(model=frozen(model, "embed"), peft_config=None)


def test_parts_of_an_adapter_that_are_let_be_are_said_to_be(make, tiny_llama, tmp_path):
    """As the message says it."""
    model = frozen(get_peft_model(tiny_llama(), LongLoraConfig()), "norm", "embed")
    model.active_peft_config.train_norms = model.active_peft_config.train_embeddings = False
    trainer = make(model=model, peft_config=None)
    trainer.train()
    trainer.save_model()
    assert " on `k_proj`, `o_proj`, `q_proj`, `v_proj`.\n" in (tmp_path / "out" / "README.md").read_text()


def test_lm_head_is_refused(make):
    with pytest.raises(ValueError, match="lm_head"):
        make(peft_config=LongLoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


def test_what_is_no_dataset_is_refused(make):
    with pytest.raises(TypeError, match=r"Dataset\.from_list"):
        make(dataset=[{"text": TEXT}])
    with pytest.raises(TypeError, match="one split of a dataset, not all of them: train, test"):
        make(dataset=DatasetDict(train=texts(), test=texts()))


def test_what_counts_examples_otherwise_is_refused(make, monkeypatch):
    """Each process is taken to see a batch of its own."""
    monkeypatch.setattr(LongLoraSFTConfig, "world_size", 2)
    with pytest.raises(ValueError, match="split_batches"):
        make(accelerator_config={"split_batches": True})
    with pytest.raises(ValueError, match="parallelism_config"):
        make(parallelism_config=ParallelismConfig(cp_size=2))


def test_several_gpus_in_one_process_are_refused(make, monkeypatch):
    guards.check_replicas(SimpleNamespace(n_gpu=1))
    monkeypatch.setattr(LongLoraSFTConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"DataParallel.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        make()


def test_stages_are_served_their_examples_where_a_model_takes_several_gpus(make, monkeypatch):
    """Trainer counts the GPUs into the batch until it has seen that one model has them all (`test_devices.py`)."""
    monkeypatch.setattr(LongLoraSFTConfig, "train_batch_size", 4)
    assert len(make(per_device_train_batch_size=2).train_dataset) == 2 * sum(stage.max_steps for stage in STAGES)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"group_size": 256}, True),
        ({"group_size_ratio": 1.0}, True),
        ({"group_size": 255}, False),
        ({"stages": [ContextStage(256, 1, group_size=256), ContextStage(512, 1)]}, True),
        ({"group_size": 256, "stages": [ContextStage(256, 1, attention="dense")]}, False),
    ],
)
def test_a_stage_that_groups_make_dense_is_said(make, monkeypatch, options, warned):
    said = []
    monkeypatch.setattr(guards.logger, "warning", said.append)
    trainer = make(**{"stages": [ContextStage(256, 1)], **options})
    words = "Stage 1: A group of 256 tokens holds all of a sequence of 256: attention is dense"
    assert [message.startswith(words) for message in said] == [True] * warned
    trainer.train()
    assert trainer.state.log_history[0]["attention"] == ("s2attn" if options.get("group_size") == 255 else "dense")


@pytest.mark.parametrize("there", [False, True])
def test_activations_are_moved_off_an_accelerator_alone(monkeypatch, tmp_path, there):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    args = LongLoraSFTConfig(
        output_dir=str(tmp_path), stages=STAGES, use_cpu=True, bf16=False, activation_offloading=True
    )
    with contextlib.nullcontext() if there else pytest.raises(ValueError, match="there is none here"):
        guards.check_arguments(args)


def test_plain_arguments_are_refused(tiny_llama, tmp_path):
    from trl import SFTConfig

    with pytest.raises(TypeError, match="LongLoraSFTConfig"):
        LongLoraSFTTrainer(tiny_llama(), SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=texts())


def test_a_model_without_rope_is_refused_where_rope_is_asked_for(make):
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(ValueError, match="has no RoPE"):
        make(model=gpt2)


def test_an_unknown_model_is_one_clear_error(make, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        make(model=str(tmp_path / "nowhere"))


def test_code_that_comes_with_a_model_runs_if_it_is_trusted(make, tiny_llama, tmp_path):
    folder = tmp_path / "remote"
    tiny_llama().save_pretrained(folder)
    (folder / "remote.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class RemoteConfig(LlamaConfig):\n    model_type = 'remote'\n"
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["RemoteForCausalLM"], "model_type": "remote"}
    config["auto_map"] = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="custom code"):
        make(model=str(folder))
    trainer = make(model=str(folder), trust_remote_code=True)
    assert type(trainer.model.get_base_model()).__name__ == "RemoteForCausalLM"
    assert trainer.train().global_step == 6


def test_a_model_outside_the_attention_interface_is_refused(make, tmp_path):
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    falcon.save_pretrained(tmp_path / "falcon")
    for model in (falcon, str(tmp_path / "falcon")):
        with pytest.raises(ValueError, match="does not call its attention through"):
            make(model=model)


def test_a_damaged_checkpoint_is_one_clear_error(make, tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    make(callbacks=[Stop(2)], **options).train()
    file = tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors"
    whole = file.read_bytes()
    trainer = make(**options)
    before = weights(trainer)
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated"):
        trainer.train(resume_from_checkpoint=True)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items())
    file.write_bytes(whole)
    assert trainer.train(resume_from_checkpoint=True).global_step == 6


def other_words():
    """As many texts of as many tokens, with other words."""
    return texts().map(lambda row: {"text": row["text"].replace("clocks", "cloaks")})


SETTINGS = {
    "lora_alpha": (dict(peft_config=LongLoraConfig(r=4, lora_alpha=64)), r"adapter\.lora_alpha was 16, is 64"),
    "use_rslora": (dict(peft_config=LongLoraConfig(r=4, use_rslora=True)), r"adapter\.use_rslora was False, is True"),
    "target_modules": (
        dict(peft_config=LongLoraConfig(r=4, target_modules=["v_proj"])),
        r"adapter\.target_modules was .*is \['v_proj'\]",
    ),
    "base_length": (dict(peft_config=LongLoraConfig(r=4, base_length=32)), "group_sizes was .*is \\[32, 32\\]"),
    "no adapter": (dict(peft_config=None, stages=STAGES), "adapter was .*is None"),
    "learning_rate": (dict(learning_rate=2e-3), r"optimizer\.learning_rate was 0.001, is 0.002"),
    "lr_scheduler_type": (dict(lr_scheduler_type="cosine"), r"optimizer\.lr_scheduler_type was .*is cosine"),
    "weight_decay": (dict(weight_decay=0.1), r"optimizer\.weight_decay was 0.0, is 0.1"),
    "precision": (dict(bf16=True), r"optimizer\.bf16 was False, is True"),
    "data_seed": (dict(data_seed=7), "data_seed was None, is 7"),
    "other words": (dict(dataset=other_words), "the training data are others, or tokenized otherwise"),
    "as many rows": (dict(dataset=lambda: texts().select([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10])), "data are others"),
}


@pytest.fixture(scope="module")
def stopped():
    """The checkpoint of a stopped run; made once."""
    return []


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_is_resumed_as_what_it_was(make, tiny_llama, setting, stopped, tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    if not stopped:
        make(callbacks=[Stop(2)], **options).train()
        stopped.append(tmp_path / "out" / "checkpoint-2")
    other, message = SETTINGS[setting]
    other = {key: value() if key == "dataset" else copy.deepcopy(value) for key, value in other.items()}
    trainer = make(output="other", **options | other)
    with pytest.raises(ValueError, match=f"of another run and can't be resumed: .*{message}.*output_dir"):
        trainer.train(resume_from_checkpoint=str(stopped[0]))
    assert trainer.state.global_step == 0


def test_a_run_is_resumed_on_the_base_it_had(make, tiny_llama):
    def model(seed=0, dtype=torch.float32):
        torch.manual_seed(seed)
        return tiny_llama().to(dtype)

    options = dict(save_strategy="steps", save_steps=2)
    make(model=model(), callbacks=[Stop(2)], **options).train()
    for other in (model(seed=1), model(dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="the base's weights are others, or in another dtype"):
            make(model=other, **options).train(resume_from_checkpoint=True)
    moved = model()
    moved.config._name_or_path = "/elsewhere"  # a path is no part of what a base is
    assert make(model=moved, **options).train(resume_from_checkpoint=True).global_step == 6


def told(folder):
    """What identifies a run, of a base in a folder: printed by a process of its own, in the test below."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LongLoraConfig(r=4))
    rows = Dataset.from_dict({"input_ids": [[i, i + 1] * i for i in range(1, 300)]})
    settings = identity.adapter_settings(model.active_peft_config)
    return json.dumps([identity.weights_fingerprint(model), identity.data_fingerprint(rows), settings])


@pytest.mark.slow
def test_what_a_run_is_is_told_alike_in_each_process(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, script = told(tmp_path / "here"), f"import {__name__} as m, sys; print(m.told(sys.argv[1]))"
    command = [sys.executable, "-c", script, tmp_path / "there"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "1"}
    )
    assert done.stdout.splitlines()[-1] == here


def test_weights_and_data_that_differ_are_told_apart(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    before = identity.weights_fingerprint(model)
    assert identity.weights_fingerprint(model) == before
    for parameter in model.parameters():
        kept = parameter.clone()
        parameter.add_(1e-3 * torch.randn_like(parameter))
        assert identity.weights_fingerprint(model) != before
        parameter.copy_(kept)
    assert identity.weights_fingerprint(model) == before
    rows = [[i % 7, i % 11, 5] * (1 + i % 90) for i in range(1000)]
    said = {identity.data_fingerprint(Dataset.from_dict({"input_ids": rows}))}
    said.add(identity.data_fingerprint(Dataset.from_dict({"input_ids": rows}).select(range(1000))))
    assert len(said) == 1
    for changed in (rows[::-1], rows[:-1], [*rows[:500], rows[500] + [5], *rows[501:]]):
        said.add(identity.data_fingerprint(Dataset.from_dict({"input_ids": changed})))
    said.add(identity.data_fingerprint(Dataset.from_dict({"input_ids": rows, "labels": rows})))
    assert len(said) == 5


@pytest.mark.parametrize("kept", [True, False], ids=["save_only_model", "files that were not copied"])
def test_weights_alone_are_not_resumed(make, kept, tmp_path):
    options = dict(save_strategy="steps", save_steps=2, save_only_model=kept)
    make(callbacks=[Stop(2)], **options).train()
    for name in [] if kept else ["optimizer.pt", "scheduler.pt", "rng_state.pth"]:
        (tmp_path / "out" / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match=r"it lacks the optimizer's state.*schedule.*random state.*is_trainable=True"):
        make(**options).train(resume_from_checkpoint=True)


def test_a_second_run_leaves_the_checkpoints_of_the_first_alone(make, tmp_path):
    """It took the first one's later checkpoint, trained nothing, and saved that under its own settings."""
    options = dict(save_strategy="steps", save_steps=2, save_total_limit=1)
    make(**options).train()
    held = {path: path.read_bytes() for path in (tmp_path / "out").rglob("checkpoint-*/*") if path.is_file()}
    assert held
    second = dict(options, learning_rate=2e-3)
    for resumed in (False, True):
        with pytest.raises(ValueError, match=r"checkpoint-6 is of another run.*learning_rate was 0.001, is 0.002"):
            make(**second).train(resume_from_checkpoint=resumed)
    assert {path: path.read_bytes() for path in held} == held
    make(**dict(second, save_strategy="no")).train()  # it saves none, and so shares nothing
    assert {path: path.read_bytes() for path in held} == held
    assert make(**options).train().global_step == 6  # the same run, once more


def test_the_best_checkpoints_and_each_stage_s_end(make, tmp_path):
    trainer = make(
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=texts(2),
        save_strategy="best",
        metric_for_best_model="epoch",
        greater_is_better=False,
    )
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_epoch": trainer.state.epoch}
    trainer.train()
    found = {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")}
    assert found == {"checkpoint-1", "checkpoint-3", "checkpoint-6"}  # the best, and the stages' ends
    assert trainer.state.best_global_step == 1


def test_checkpoints_of_another_schedule_are_refused(make, tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    make(callbacks=[Stop(2)], **options).train()
    for other, message in (
        (dict(stages=[ContextStage(128, 3), ContextStage(512, 3)], dataset=texts(repeat=20)), "stages was"),
        (dict(dense_every=5), "dense_every was 0, is 5"),
        (dict(seed=7), "seed was 42, is 7"),
        (dict(dataset=texts(30)), "examples was"),
        (dict(per_device_train_batch_size=1), "batch_size was 2, is 1"),
        (dict(train_sampling_strategy="sequential"), "order was random, is sequential"),
        (dict(ignore_data_skip=True), "ignore_data_skip"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options | other).train(resume_from_checkpoint=True)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    file = checkpoint / checkpoints.SCHEDULE_NAME
    signature = json.loads(file.read_text())
    assert signature["seed"] == 42
    file.write_text(json.dumps(signature | {"optimizer_states": "those of FSDP"}))
    with pytest.raises(ValueError, match="optimizer_states was those of FSDP, is whole"):
        make(**options).train(resume_from_checkpoint=True)
    file.write_text(json.dumps({key: value for key, value in signature.items() if key != "optimizer_states"}))
    with pytest.raises(ValueError, match="another version, and doesn't say its optimizer_states"):
        make(**options).train(resume_from_checkpoint=True)
    file.write_text(json.dumps(signature))
    assert make(**options).train(resume_from_checkpoint=True).global_step == 6
    file.unlink()
    with pytest.raises(ValueError, match=r"it has no context_schedule.json, which each checkpoint of"):
        make(**options).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        make(output="other", **options).train(resume_from_checkpoint=True)


def test_no_surprising_warnings(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        make().train()


def test_a_stage_beyond_its_rope_is_warned_of(make, caplog, monkeypatch):
    """A merged model's config would say no more than what the RoPE reaches."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for stages, warned in (
        ([ContextStage(64, 1, rope_type=None)], None),
        ([ContextStage(128, 1)], None),
        ([ContextStage(128, 1), ContextStage(128, 1, rope_type=None)], None),
        ([ContextStage(96, 1, rope_type=None)], "Stage 1 trains 96 tokens under a RoPE that reaches 64"),
        (
            [ContextStage(128, 1), ContextStage(256, 1, rope_type=None)],
            "Stage 2 trains 256 tokens under a RoPE that reaches 128",
        ),
    ):
        caplog.clear()
        make(stages=stages)
        found = [
            record.getMessage() for record in caplog.records if "under a RoPE that reaches" in record.getMessage()
        ]
        assert [message.startswith(warned or "") for message in found] == [True] * (warned is not None)


def test_a_text_longer_than_the_base_took_is_no_warning(make, tiny_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tiny_tokenizer.model_max_length = 64
    make()
    assert "indexing errors" not in caplog.text
    tiny_tokenizer.deprecation_warnings.clear()
    tiny_tokenizer(TEXT * 99)
    assert "indexing errors" in caplog.text
