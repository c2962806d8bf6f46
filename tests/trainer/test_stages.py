import dataclasses
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_longlora import (
    ContextStage,
    LongLoraConfig,
    LongLoraSFTConfig,
    LongLoraSFTTrainer,
    S2AttentionConfig,
    set_s2_attention,
)
from hf_longlora.attention import get_s2_attention
from hf_longlora.modules import attention_modules
from hf_longlora.rope import current_rope, reach, rope_factor
from hf_longlora.schedule import Schedule, auto_stages
from hf_longlora.trainer.callbacks import ContextStageCallback
from hf_longlora.trainer.data import order
from hf_longlora.trainer.ropes import Start, check_lengths, stage_ropes

from .helpers import Stop, texts, weights


def schedule(*stages, dense_every=0, **attention):
    return Schedule(tuple(stages), S2AttentionConfig(**attention), dense_every)


def test_a_step_follows_from_its_number_alone():
    plan = schedule(ContextStage(128, 3), ContextStage(256, 2))
    assert [plan.step(i).stage for i in range(5)] == [0, 0, 0, 1, 1]
    assert [plan.step(i).last_of_stage for i in range(5)] == [False, False, True, False, True]
    assert plan.max_steps == 5
    for outside in (-1, 5):
        with pytest.raises(ValueError, match="outside"):
            plan.step(outside)


def test_each_kth_optimizer_step_is_dense():
    plan = schedule(ContextStage(128, 4), ContextStage(256, 5), dense_every=3)
    assert [i + 1 for i in range(9) if plan.step(i).mode == "dense"] == [3, 6, 9]


def test_a_stage_overrides_the_run():
    plan = schedule(
        ContextStage(128, 2, dense_every=0, group_size=10),
        ContextStage(256, 2, attention="dense", group_size_ratio=0.5),
        ContextStage(512, 2),
        dense_every=1,
        group_size_ratio=0.125,
    )
    assert [plan.step(i).mode for i in range(6)] == ["auto", "auto", "dense", "dense", "dense", "dense"]
    assert [plan.attention_config(i).group_size for i in range(3)] == [10, 128, 64]
    kept = schedule(ContextStage(128, 2, group_size=10), ContextStage(256, 2), kernel="reference")
    assert {kept.attention_config(i).kernel for i in range(2)} == {"reference"}


def test_a_group_of_a_stage_s_whole_length_makes_it_dense():
    plan = schedule(ContextStage(128, 1, group_size=128), ContextStage(256, 1), group_size=255)
    assert [plan.step(i).mode for i in range(2)] == ["dense", "auto"]
    assert [plan.is_dense(i) for i in range(2)] == [True, False]


@pytest.mark.parametrize("sparse", ["windows", "pose"])
def test_which_stages_and_steps_are_in_windows(sparse):
    stages = (
        ContextStage(64, 2),  # a window holds all of it
        ContextStage(65, 2),
        ContextStage(128, 2, dense_every=1),
        ContextStage(128, 2, attention="dense"),
        ContextStage(256, 2, sparse="s2"),
    )
    plan = Schedule(stages, S2AttentionConfig(group_size=16), dense_every=2, native_window=64, sparse=sparse)
    assert [plan.sparse_by(i) for i in range(5)] == [sparse] * 4 + ["s2"]
    assert [plan.has_windows(i) for i in range(5)] == [False, True, False, False, False]
    assert [plan.is_dense(i) for i in range(5)] == [True, False, False, True, False]
    modes = ["dense", "dense", "windows", "dense", *["dense"] * 4, "auto", "dense"]
    assert [plan.step(i).mode for i in range(10)] == modes
    stored = json.loads(json.dumps(plan.to_dict()))
    assert stored["windows"] == [None, 64, None, None, None] and stored["group_sizes"] == [16] * 5
    again = Schedule.from_dict(stored)
    assert [again.step(i) for i in range(10)] == [plan.step(i) for i in range(10)]
    # Before a model is known, none of them is known to be dense.
    assert [dataclasses.replace(plan, native_window=None).is_dense(i) for i in range(2)] == [False, False]
    # A run by shifted groups with a stage in windows.
    mixed = Schedule(
        (ContextStage(128, 2, sparse="pose"), ContextStage(128, 2)), S2AttentionConfig(group_size=16), 0, 64
    )
    assert [mixed.step(i).mode for i in range(4)] == ["windows", "windows", "auto", "auto"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 0, "max_steps": 1}, "max_length"),
        ({"max_length": 8, "max_steps": 0}, "max_steps"),
        ({"max_length": 8, "max_steps": True}, "max_steps"),
        ({"max_length": 8.5, "max_steps": 1}, "max_length.*whole number"),
        ({"max_length": 8, "max_steps": 1, "group_size": 1}, "group_size"),
        ({"max_length": 8, "max_steps": 1, "group_size_ratio": 1.5}, "group_size_ratio"),
        ({"max_length": 8, "max_steps": 1, "group_size_ratio": "1/16"}, "group_size_ratio.*'1/16'"),
        ({"max_length": 8, "max_steps": 1, "sink_tokens": -1}, "sink_tokens"),
        ({"max_length": 8, "max_steps": 1, "sink_tokens": 0.5}, "sink_tokens"),
        ({"max_length": 8, "max_steps": 1, "dense_every": -1}, "dense_every"),
        ({"max_length": 8, "max_steps": 1, "dense_every": True}, "dense_every.*got True"),
        ({"max_length": 8, "max_steps": 1, "dense_every": 2.5}, "dense_every.*whole number"),
        ({"max_length": 8, "max_steps": 1, "attention": "sparse"}, "attention"),
        ({"max_length": 8}, "missing.*max_steps"),
        ({"max_length": 8, "max_steps": 1, "lenght": 3}, "unknown.*lenght"),
    ],
)
def test_bad_stages_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ContextStage.of(fields)


def test_a_schedule_holds_its_stages_to_their_order():
    for stages, message in (((), "`stages` is empty"), ((ContextStage(64, 1), ContextStage(32, 1)), "Stage 2 has")):
        with pytest.raises(ValueError, match=message):
            schedule(*stages)


def test_groups_that_were_stored_are_as_they_were_by_whatever_rule():
    plan = schedule(ContextStage(128, 1), ContextStage(256, 1, sparse="windows"))
    stored = plan.to_dict() | {"group_sizes": [24, 40], "sink_tokens": [1, 2]}
    first, second = Schedule.from_dict(stored).stages
    assert (first.group_size, first.sink_tokens) == (24, 1)
    assert (second.group_size, second.sink_tokens) == (None, None)  # it has none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": None}, "list of stages"),
        ({"stages": []}, "empty"),
        ({"stages": ContextStage(8, 1)}, "list of stages"),
        ({"stages": [8192]}, "mapping"),
        ({"stages": [ContextStage(64, 1), ContextStage(32, 1)]}, "Stage 2.*RoPE scaling only grows"),
        ({"stages": [ContextStage(64, 3)], "max_steps": 4}, "contradicts the stages.*3 steps"),
        ({"stages": [ContextStage(64, 3)], "max_length": 128}, "contradicts the last stage"),
        ({"stages": [ContextStage(64, 3)], "dense_every": -2}, "dense_every"),
        ({"stages": "auto", "max_length": 64, "max_steps": 3, "dense_every": -2}, "dense_every"),
        ({"stages": "auto", "max_length": 64, "max_steps": 3, "group_size": 1}, "group_size"),
        ({"stages": [ContextStage(64, 3)], "group_size": 1}, "group_size"),
        ({"stages": [ContextStage(64, 3)], "group_size_ratio": 0}, "group_size_ratio"),
        ({"stages": [ContextStage(64, 3)], "sink_tokens": -4}, "sink_tokens"),
        ({"stages": [ContextStage(64, 3)], "attention_kernel": "fast"}, "Unknown attention kernel"),
    ],
)
def test_bad_configurations_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LongLoraSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arguments)


def test_configuration_follows_from_the_stages(tmp_path):
    stages = [{"max_length": 64, "max_steps": 3}, {"max_length": 128, "max_steps": 4, "rope_type": "yarn"}]
    args = LongLoraSFTConfig(output_dir=str(tmp_path), stages=stages, use_cpu=True, bf16=False)
    assert args.stages == [ContextStage(64, 3), ContextStage(128, 4, rope_type="yarn")]
    assert args.max_steps == 7 and args.max_length == 128
    assert args.to_dict()["stages"][1] == dataclasses.asdict(args.stages[1])
    args.to_json_string()
    # a second pass over its own result, as dataclasses.replace and TRL do, changes nothing
    again = dataclasses.replace(args)
    assert again.schedule == args.schedule


def test_stages_come_through_a_yaml_file(tmp_path):
    from trl import TrlParser

    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\ndense_every: 4\nsparse: pose\n"
        "stages:\n  - {max_length: 64, max_steps: 3, sparse: s2}\n"
        "  - {max_length: 128, max_steps: 4, rope_type: yarn}\n"
    )
    (args,) = TrlParser(LongLoraSFTConfig).parse_args_and_config(["--config", str(file), "--learning_rate", "1e-3"])
    assert args.stages == [ContextStage(64, 3, sparse="s2"), ContextStage(128, 4, rope_type="yarn")]
    assert args.dense_every == 4 and args.learning_rate == 1e-3
    assert [args.schedule.step(step).mode for step in range(7)] == ["auto"] * 3 + ["dense"] + ["windows"] * 3
    with pytest.raises(ValueError, match="`sparse` must be one of"):
        LongLoraSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, stages=args.stages, sparse="dense")


SPELLINGS = {
    "a list": '[{"max_length": 64, "max_steps": 3}, {"max_length": 128, "max_steps": 4, "rope_type": "yarn"}]',
    "auto": "auto",
    "doubling": "doubling",
}


@pytest.mark.parametrize("how", ["python", "yaml", "shell", "json in yaml"])
@pytest.mark.parametrize("stages", SPELLINGS.values(), ids=SPELLINGS)
def test_stages_are_the_same_however_they_are_written(how, stages, tmp_path):
    from trl import TrlParser

    lengths = [] if stages.startswith("[") else ["--max_length", "512", "--max_steps", "100"]
    expected = LongLoraSFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        stages=json.loads(stages) if how == "python" and not lengths else stages,
        **{"max_length": 512, "max_steps": 100} if lengths else {},
    )
    if how != "python":
        file = tmp_path / "run.yaml"
        values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
        if how == "yaml":
            values["stages"] = stages if lengths else json.loads(stages)
        elif how == "json in yaml":
            values["stages"] = stages
        else:
            lengths += ["--stages", stages]
        file.write_text(json.dumps(values))  # JSON is YAML
        (args,) = TrlParser(LongLoraSFTConfig).parse_args_and_config(["--config", str(file), *lengths])
        assert args.stages == expected.stages and args.max_steps == expected.max_steps
        expected = args
    if not stages.startswith("["):
        expected.resolve_stages(64)
        doubling = [ContextStage(128, 10), ContextStage(256, 10), ContextStage(512, 80)]
        auto = [ContextStage(128, 20), ContextStage(512, 80)]
        assert expected.stages == (auto if stages == "auto" else doubling)
    else:
        assert expected.stages == [ContextStage(64, 3), ContextStage(128, 4, rope_type="yarn")]
    assert expected.schedule.max_steps == expected.max_steps


@pytest.mark.parametrize(
    ("kind", "base", "target", "steps", "stages"),
    [
        ("auto", 4096, 32768, 1000, [(8192, 200), (32768, 800)]),
        ("auto", 8192, 32768, 1000, [(32768, 1000)]),  # a quarter is no longer than the base
        ("auto", 4096, 100_000, 10, [(25_000, 2), (100_000, 8)]),
        ("doubling", 4096, 32768, 1000, [(8192, 100), (16384, 100), (32768, 800)]),
        ("doubling", 4096, 20_000, 1000, [(8192, 100), (16384, 100), (20_000, 800)]),
        ("doubling", 4096, 8192, 7, [(8192, 7)]),
        ("doubling", 4096, 32768, 4, [(32768, 4)]),  # too few to share
        ("auto", 4096, 32768, 1, [(32768, 1)]),
    ],
)
def test_stages_by_themselves(kind, base, target, steps, stages):
    made = auto_stages(kind, base, target, steps)
    assert made == [ContextStage(length, count) for length, count in stages]
    assert sum(stage.max_steps for stage in made) == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": "automatic", "max_steps": 5, "max_length": 512}, "JSON list"),
        ({"stages": '{"max_length": 64}'}, "list of stages"),
        ({"stages": "auto", "max_length": 512}, "needs `max_steps`"),
        ({"stages": "doubling", "max_steps": 10, "max_length": None}, "Set `max_length`"),
    ],
)
def test_bad_automatic_stages_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LongLoraSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arguments)
    with pytest.raises(ValueError, match=r"or one of .*, got 'halving'"):
        auto_stages("halving", 64, 512, 10)


def test_automatic_stages_belong_to_a_model_and_not_to_the_arguments(tiny_llama, tiny_tokenizer, tmp_path):
    args = LongLoraSFTConfig(
        str(tmp_path),
        stages="doubling",
        max_length=256,
        max_steps=10,
        packing=True,
        packing_strategy="wrapped",
        use_cpu=True,
        bf16=False,
    )

    def stages(length):
        trainer = LongLoraSFTTrainer(
            tiny_llama(max_position_embeddings=length),
            args,
            train_dataset=texts(),
            processing_class=tiny_tokenizer,
            peft_config=LongLoraConfig(r=2),
        )
        return [(stage.max_length, stage.max_steps) for stage in trainer.schedule.stages]

    assert stages(64) == [(128, 2), (256, 8)]
    assert stages(128) == [(256, 10)]
    with pytest.raises(ValueError, match="the model reaches 256 tokens as it is"):
        stages(256)
    assert args.stages == "doubling"


@pytest.mark.parametrize(("kind", "target"), [("auto", 512), ("doubling", 256)])
def test_a_run_of_automatic_stages_resumes(make, kind, target):
    options = dict(
        stages=kind, max_length=target, max_steps=5, dataset=texts(30), save_strategy="steps", save_steps=100
    )
    unbroken = make(output="unbroken", **options)
    unbroken.train()
    assert [s.max_steps for s in unbroken.schedule.stages] == [1, 4]
    make(output="broken", callbacks=[Stop(3)], **options).train()
    resumed = make(output="broken", **options)
    resumed.train(resume_from_checkpoint=True)
    expected, got = weights(unbroken), weights(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_checkpointing_goes_by_the_name_that_transformers_has(tmp_path):
    """TRL's default by the old name is no deprecation that a user could mend; what a user asks for holds."""
    shared = dict(output_dir=str(tmp_path), stages=[ContextStage(64, 3)], use_cpu=True, bf16=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert LongLoraSFTConfig(**shared).gradient_checkpointing
        if "activation_checkpointing" in LongLoraSFTConfig.__dataclass_fields__:
            off = LongLoraSFTConfig(**shared, activation_checkpointing=False)
            assert not off.gradient_checkpointing and not off.activation_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        off = LongLoraSFTConfig(**shared, gradient_checkpointing=False)
    assert not off.gradient_checkpointing and not getattr(off, "activation_checkpointing", False)


def test_a_stage_that_would_see_nothing_says_why():
    plan = schedule(ContextStage(64, 2), ContextStage(128, 2))
    start = Start(None, None, None, None)
    check_lengths(start, plan, [None, None], [64, 128])
    with pytest.raises(ValueError, match=r"Stage 2 .* nothing to learn from"):
        check_lengths(start, plan, [None, None], [64, 0])


def test_stages_of_one_length_may_see_documents_shorter_than_it(tiny_llama):
    start = Start.of(model := tiny_llama(), model.config, None)  # 64 tokens
    same = schedule(ContextStage(128, 2), ContextStage(128, 2, dense_every=4), ContextStage(128, 2, rope_type=None))
    check_lengths(start, same, stage_ropes(start, same), [100, 100, 100])
    longer = schedule(ContextStage(128, 2), ContextStage(128, 2), ContextStage(256, 2))
    with pytest.raises(ValueError, match=r"Too few tokens for stage 3 .* 100 tokens"):
        check_lengths(start, longer, stage_ropes(start, longer), [100, 100, 100])


def test_a_stage_gives_back_what_the_allocators_keep(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name in ("empty_cache", "empty_host_cache"):
        monkeypatch.setattr(torch.accelerator, name, lambda name=name: given.append(name), raising=False)
    callback = ContextStageCallback(schedule(ContextStage(128, 2), ContextStage(256, 1)), [None, None])
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    for step in (1, 2, 3):
        callback.on_step_end(args, TrainerState(global_step=step), TrainerControl())
        assert given == ["empty_cache", "empty_host_cache"] * (step - 1)


def test_a_step_sets_what_all_layers_share_and_walks_over_none(make, monkeypatch):
    trainer = make(dense_every=2, sparse="s2")
    apply, model = trainer._stage_callback.apply, trainer.model
    apply(model, 0)

    def named_modules(*args, **kwargs):
        raise AssertionError("a walk over the model")

    layers = [module for _, module in attention_modules(model.get_base_model())]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "named_modules", named_modules)
        apply(model, 1)
        assert {layer.s2_attention_state.mode for layer in layers} == {"dense"}
        apply(model, 2)
        assert {layer.s2_attention_state.mode for layer in layers} == {"auto"}
    apply(model, 3)
    assert {layer.s2_attention_state.config.group_size for layer in layers} == {64}


def test_a_training_step_looks_for_no_modules(make, tiny_llama, monkeypatch):
    """But for the tuner's, that all it trains is fp32 each time the model is set to training; others' are theirs."""
    model, walks, named_modules = tiny_llama().to(torch.bfloat16), [], torch.nn.Module.named_modules
    trainer = make(model=model, stages=[ContextStage(128, 3)], bf16=True, sparse="s2", dense_every=2)

    wholes = (trainer.model, trainer.model.base_model, trainer.model.get_base_model())

    def counted(module, *args, **kwargs):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == torch.nn.modules.module.__file__:
            frame = frame.f_back
        ours = "hf_longlora" in frame.f_code.co_filename or "/peft/" in frame.f_code.co_filename
        if ours and any(module is whole for whole in wholes):
            walks.append(frame.f_code.co_name)
        return named_modules(module, *args, **kwargs)

    class Counting(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            torch.nn.Module.named_modules = counted

        def on_step_end(self, *args, **kwargs):
            torch.nn.Module.named_modules = named_modules

    trainer.callback_handler.callbacks.insert(0, Counting())
    monkeypatch.setattr(torch.nn.Module, "named_modules", named_modules)  # given back if a step fails
    trainer.train()
    assert set(walks) == {"_trained"}


def test_groups_of_stages_by_default_are_the_base_s_native_window():
    stages = ContextStage(128, 1), ContextStage(256, 1), ContextStage(1024, 1), ContextStage(1024, 1, group_size=32)
    plan = dataclasses.replace(schedule(*stages), native_window=64)
    assert [plan.attention_config(i).group_size for i in range(4)] == [32, 64, 64, 32]
    unknown = schedule(*stages)
    assert [unknown.attention_config(i).group_size for i in range(4)] == [32, 64, 256, 32]


@pytest.mark.parametrize("sparse", ["s2", "windows"])
def test_a_stage_of_dense_steps_alone_is_dense_by_whatever_name(sparse):
    stages = ContextStage(256, 4, sparse=sparse), ContextStage(512, 4, dense_every=1, sparse=sparse)
    plan = dataclasses.replace(schedule(*stages, dense_every=2), native_window=64)
    assert plan.pattern(0) == (sparse, 64, 4 if sparse == "s2" else 0, 2)
    assert plan.pattern(1) == ("dense", None, 0, 1)
    assert [plan.step(i).mode for i in range(4, 8)] == ["dense"] * 4


def test_a_stored_schedule_means_what_it_meant():
    """Also one of the time when groups were 1/16 by default, and whatever the rule becomes."""
    plan = dataclasses.replace(schedule(ContextStage(128, 1), ContextStage(1024, 1)), native_window=64)
    stored = json.loads(json.dumps(plan.to_dict()))
    again = Schedule.from_dict(stored)
    assert [again.attention_config(i) for i in range(2)] == [plan.attention_config(i) for i in range(2)]
    assert again.to_dict()["group_sizes"] == stored["group_sizes"] == [32, 64]
    assert again.to_dict()["sink_tokens"] == stored["sink_tokens"] == [4, 4]
    card = Path(__file__).parents[2] / "model_cards" / "llama-44m-books-math-8192" / "adapter_config.json"
    old = json.loads(card.read_text())["schedule"]
    assert old["attention"]["group_size_ratio"] == 1 / 16
    assert "sink_tokens" not in old["attention"]  # there were none
    attention = Schedule.from_dict(old).attention_config(0)
    assert (attention.group_size, attention.sink_tokens) == (8192 // 16, 0)
    trained = LongLoraConfig(schedule=old).trained_attention
    assert (trained.group_size, trained.sink_tokens) == (8192 // 16, 0)


@pytest.mark.parametrize("adapter", [True, False])
def test_the_trainer_goes_by_the_base_s_native_window(make, tiny_llama, adapter):
    """Whatever the base has been stretched to, as its config, or the adapter's base_length, says."""
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    stages = [ContextStage(256, 1), ContextStage(512, 1)]
    options = {"model": tiny_llama(rope_parameters=scaled), "stages": stages}
    trainer = make(**options, peft_config=LongLoraConfig(r=2) if adapter else None)
    assert trainer.schedule.native_window == 64
    assert [trainer.schedule.attention_config(i).group_size for i in range(2)] == [64, 64]
    if adapter:
        options["model"] = tiny_llama(rope_parameters=scaled)
        trainer = make(**options, peft_config=LongLoraConfig(r=2, base_length=32))
        assert [trainer.schedule.attention_config(i).group_size for i in range(2)] == [32, 32]
        assert trainer.model.get_base_model().config.rope_parameters["factor"] == 8.0  # 256 over 32
        again = make(model=trainer.model, stages=stages, peft_config=None)  # a loaded adapter
        assert again.schedule.native_window == 32


def test_sink_tokens_of_a_stage_and_of_the_run(tmp_path):
    stages = [{"max_length": 64, "max_steps": 1, "sink_tokens": 0}, {"max_length": 128, "max_steps": 1}]
    options = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for given, expected in (({}, [0, 4]), ({"sink_tokens": 16}, [0, 16]), ({"sink_tokens": 0}, [0, 0])):
        plan = LongLoraSFTConfig(stages=stages, **options, **given).schedule
        assert [plan.attention_config(i).sink_tokens for i in range(2)] == expected
        assert plan.to_dict()["sink_tokens"] == expected


def test_a_run_of_before_there_were_sink_tokens_goes_on_as_it_was(make, tmp_path):
    """And not by today's defaults: that is another run, and says so."""
    was = dict(group_size_ratio=1 / 16, sink_tokens=0, dense_every=2)
    make(output="old", callbacks=[Stop(4)], save_strategy="steps", save_steps=100, **was).train()
    checkpoint = tmp_path / "old" / "checkpoint-4"
    file = checkpoint / "context_schedule.json"
    stored = json.loads(file.read_text())
    for since in ("sink_tokens", "native_window", "sparse", "windows"):
        del stored[since]
    del stored["attention"]["sink_tokens"]
    for stage in stored["stages"]:
        del stage["sink_tokens"], stage["sparse"]
    file.write_text(json.dumps(stored))
    resumed = make(output="old", **was)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    with pytest.raises(ValueError, match=r"another run.*attention\.sink_tokens was 0, is 4"):
        make(output="old", group_size_ratio=1 / 16, dense_every=2).train(resume_from_checkpoint=str(checkpoint))


# -- RoPE from stage to stage, and from run to run -------------------------------------------------------------------


def ropes(model, *stages, peft_config=None):
    return stage_ropes(Start.of(model, model.config, peft_config), schedule(*stages))


def trained(tiny_llama, length, rope_type="auto", **options):
    """An adapter as a run leaves it: loaded, it reaches `length` tokens."""
    return get_peft_model(tiny_llama(), LongLoraConfig(r=2, target_length=length, rope_type=rope_type, **options))


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3", "longrope", "abf"])
def test_one_run_and_several_end_in_the_same_rope(tiny_llama, rope_type):
    """Stages of one run; an adapter that is trained on; a model that an adapter was merged into; all at once."""
    last = ContextStage(512, 1, rope_type=rope_type)
    once = ropes(tiny_llama(), last)[-1]
    one_run = ropes(tiny_llama(), ContextStage(128, 1, rope_type=rope_type), last)[-1]
    by_auto = ropes(tiny_llama(), ContextStage(128, 1, rope_type=rope_type), ContextStage(512, 1))[-1]
    loaded = ropes(trained(tiny_llama, 128, rope_type), ContextStage(512, 1))[-1]
    merged = ropes(trained(tiny_llama, 128, rope_type).merge_and_unload(), last)[-1]
    assert reach(once)[1] == 512
    for other in (one_run, by_auto, loaded, merged):
        assert other.rope_type == once.rope_type
        assert other.max_position_embeddings == once.max_position_embeddings
        for key, value in once.parameters.items():
            assert other.parameters[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12)), key


def test_a_stage_does_not_shrink_what_a_loaded_adapter_reaches(tiny_llama, make):
    model = trained(tiny_llama, 128, "yarn")
    stored = dict(model.active_peft_config.rope)
    for stage in (ContextStage(100, 1), ContextStage(64, 1, rope_parameters={"rope_type": "yarn"})):
        with pytest.raises(
            ValueError, match=r"Stage 1: max_length=\d+ is less than the 128 tokens.*rope_type=None trains"
        ):
            make(model=model, stages=[stage], peft_config=None)
    assert model.active_peft_config.rope == stored and reach(current_rope(model.config))[1] == 128
    kept = make(model=model, stages=[ContextStage(64, 1, rope_type=None)], peft_config=None)
    kept.train()
    assert model.active_peft_config.rope == stored and reach(current_rope(model.config))[1] == 128
    again = make(model=model, stages=[ContextStage(128, 1), ContextStage(256, 1)], peft_config=None)
    again.train()  # at what it reaches, and beyond
    assert reach(current_rope(model.config)) == (64, 256)


@pytest.mark.parametrize("second", ["linear", "llama3", "abf"])
def test_a_stage_does_not_change_the_rope_type(tiny_llama, second):
    """Neither midway nor of an adapter that was trained before, nor of a model that it was merged into."""
    stage = ContextStage(256, 1, rope_type=second)
    with pytest.raises(ValueError, match=r"Stage 2: RoPE was stretched by 'yarn' before.*rope_type=\"yarn\""):
        ropes(tiny_llama(), ContextStage(128, 1, rope_type="yarn"), stage)
    with pytest.raises(ValueError, match="Stage 1: RoPE was stretched by 'yarn' before"):
        ropes(trained(tiny_llama, 128, "yarn"), stage)
    with pytest.raises(ValueError, match="Stage 1: this base is scaled by 'yarn' RoPE"):
        ropes(trained(tiny_llama, 128, "yarn").merge_and_unload(), stage)
    with pytest.raises(ValueError, match="Stage 2: RoPE was stretched by 'abf' before"):
        ropes(tiny_llama(), ContextStage(128, 1, rope_type="abf"), ContextStage(256, 1, rope_type="yarn"))


def test_settings_of_a_stage_go_on_into_the_next(tiny_llama):
    own = {"rope_type": "yarn", "beta_fast": 8.0, "beta_slow": 2.0}
    first, second = ropes(tiny_llama(), ContextStage(128, 1, rope_parameters=own), ContextStage(256, 1))
    assert second.parameters["beta_fast"] == 8.0 and second.parameters["factor"] == 4.0
    same, dense = ropes(tiny_llama(), ContextStage(128, 1), ContextStage(128, 1, attention="dense"))
    assert same == dense and first.parameters["factor"] == 2.0
    other = {"rope_type": "linear", "factor": 8.0}  # explicit ones may change the type
    assert (
        ropes(tiny_llama(), ContextStage(128, 1), ContextStage(256, 1, rope_type="linear", rope_parameters=other))[
            1
        ].rope_type
        == "linear"
    )


def test_base_length_holds_for_the_base_and_not_for_what_is_stretched(tiny_llama):
    for kind, value in (("linear", 16.0), ("yarn", 16.0)):
        options = dict(peft_config=LongLoraConfig(base_length=32, rope_type=kind))
        stages = ContextStage(128, 1, rope_type=kind), ContextStage(512, 1, rope_type=kind)
        assert ropes(tiny_llama(), *stages, **options)[1].parameters["factor"] == value
    stages = ContextStage(128, 1, rope_type="abf"), ContextStage(512, 1, rope_type="abf")
    config = LongLoraConfig(base_length=32)
    theta = ropes(tiny_llama(), *stages, peft_config=config)[1].parameters["rope_theta"]
    assert theta == pytest.approx(10000.0 * 16**1.5, rel=1e-12)


def test_a_run_by_a_larger_theta(make, tiny_llama, tmp_path):
    trainer = make(stages=[ContextStage(128, 2, rope_type="abf"), ContextStage(512, 2, rope_type="abf")])
    trainer.train()
    trainer.save_model()
    assert [log["rope_factor"] for log in trainer.state.log_history if "stage" in log] == [2.0, 2.0, 8.0, 8.0]
    assert [trainer.schedule.attention_config(i).group_size for i in range(2)] == [32, 64]
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    theta = pytest.approx(10000.0 * 8**1.5)
    assert (stored["rope_type"], stored["target_length"]) == ("abf", 512)
    assert stored["rope"]["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert stored["base_rope"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(said in card for said in ("from 64 to 512 tokens", "`abf` (`rope_theta` 226274), factor 8"))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"), is_trainable=True)
    set_s2_attention(loaded)  # groups go by the base that the adapter knows of, not by the length it reaches
    assert get_s2_attention(loaded).native_window == 64
    again = make(model=loaded, stages=[ContextStage(1024, 1)], peft_config=None)
    assert again.schedule.native_window == 64
    assert rope_factor(again._ropes[0], again._start.base) == 16.0
    merged = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert written["max_position_embeddings"] == 512


def test_a_base_whose_config_leaves_its_length_open_is_asked_for_it(make, tiny_llama):
    def base():
        return tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})

    same = {"sparse": "pose", "stages": [ContextStage(64, 1, rope_type=None)]}  # windows of either
    for options in ({}, {"stages": "auto", "max_length": 512, "max_steps": 2}, {"sparse": "pose"}, same):
        options = {"stages": [ContextStage(256, 1)], **options}
        with pytest.raises(ValueError, match="128 tokens, from originally 64, or 64 tokens, from originally 32"):
            make(model=base(), **options)
    # Nothing depends on it where RoPE stays, but for groups, which are a quarter then.
    trainer = make(model=base(), stages=[ContextStage(64, 1, rope_type=None)])
    assert trainer.schedule.native_window is None and trainer.schedule.attention_config(0).group_size == 16
    config = LongLoraConfig(r=2, base_length=32)
    trainer = make(model=base(), stages="auto", max_length=512, max_steps=10, peft_config=config)
    assert trainer.schedule.native_window == 32
    assert [stage.max_length for stage in trainer.schedule.stages] == [128, 512]  # 128 is beyond the 64 it reaches
    assert trainer._ropes[-1].parameters["factor"] == 16.0


def test_each_pass_and_each_stage_has_an_order_of_its_own(make):
    passes = torch.tensor(order(20, 50, seed=1, shuffle=True))
    first, second, rest = passes[:20], passes[20:40], passes[40:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20)) and len(set(rest.tolist())) == 10
    assert not torch.equal(first, second) and not torch.equal(rest, first[:10]) and not torch.equal(rest, second[:10])
    assert order(20, 50, seed=1, shuffle=True) == passes.tolist() != order(20, 50, seed=2, shuffle=True)
    assert list(order(20, 45, seed=1, shuffle=False)) == [*range(20), *range(20), *range(5)]

    tokens = [[5 + row] * 300 for row in range(12)]  # a row says which it is
    options = dict(dataset=Dataset.from_dict({"input_ids": tokens}), packing=False, per_device_train_batch_size=4)
    stages = [ContextStage(128, 3), ContextStage(256, 3)]
    rows = [ids[0] for ids in make(stages=stages, **options).train_dataset["input_ids"]]
    assert sorted(rows[:12]) == sorted(rows[12:]) == [5 + row for row in range(12)]
    assert rows[:12] != rows[12:]
    in_order = make(stages=stages, train_sampling_strategy="sequential", **options).train_dataset["input_ids"]
    assert [ids[0] for ids in in_order] == 2 * [5 + row for row in range(12)]


def test_a_stage_ends_with_a_log_whatever_logging_steps_say(make):
    trainer = make(logging_steps=100)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [3, 6]


def test_attention_that_is_trained_whole_follows_the_schedule(tiny_llama, tiny_tokenizer, tmp_path):
    """An adapter's copies are made before the run is, and their attention is not the base's."""
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            copies = [m for name, m in attention_modules(model) if "modules_to_save" in name]
            seen.append([(m.s2_attention_state.config.group_size, m.s2_attention_state.mode) for m in copies])

    model = tiny_llama()
    set_s2_attention(model, S2AttentionConfig(group_size=4))
    trainer = LongLoraSFTTrainer(
        model=model,
        args=LongLoraSFTConfig(
            output_dir=str(tmp_path),
            stages=[ContextStage(128, 2), ContextStage(256, 1)],
            sparse="s2",
            dense_every=2,
            group_size=32,
            per_device_train_batch_size=1,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=texts(),
        processing_class=tiny_tokenizer,
        peft_config=LongLoraConfig(modules_to_save=["self_attn"], target_modules=["up_proj"]),
        callbacks=[Look()],
    )
    trainer.train()
    assert seen == [[(32, mode)] * 2 for mode in ("auto", "dense", "auto")]
