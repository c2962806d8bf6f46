import dataclasses

import pytest

from hf_longlora import ContextStage, LongLoraSFTConfig, S2AttentionConfig
from hf_longlora.trainer.stages import Schedule


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
    kept = schedule(ContextStage(128, 2, group_size=10), ContextStage(256, 2), shift="none", kernel="reference")
    assert {(kept.attention_config(i).shift, kept.attention_config(i).kernel) for i in range(2)} == {
        ("none", "reference")
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 0, "max_steps": 1}, "max_length"),
        ({"max_length": 8, "max_steps": 0}, "max_steps"),
        ({"max_length": 8, "max_steps": True}, "max_steps"),
        ({"max_length": 8, "max_steps": 1, "group_size": 1}, "group_size"),
        ({"max_length": 8, "max_steps": 1, "group_size_ratio": 1.5}, "group_size_ratio"),
        ({"max_length": 8, "max_steps": 1, "dense_every": -1}, "dense_every"),
        ({"max_length": 8, "max_steps": 1, "attention": "sparse"}, "attention"),
        ({"max_length": 8}, "missing.*max_steps"),
        ({"max_length": 8, "max_steps": 1, "lenght": 3}, "unknown.*lenght"),
    ],
)
def test_bad_stages_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ContextStage.of(fields)


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
        ({"stages": [ContextStage(64, 3)], "group_size": 1}, "group_size"),
        ({"stages": [ContextStage(64, 3)], "group_size_ratio": 0}, "group_size_ratio"),
        ({"stages": [ContextStage(64, 3)], "attention_kernel": "fast"}, "Unknown attention kernel"),
        ({"stages": [ContextStage(64, 3)], "attention_shift": "tokens"}, "shift"),
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
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\ndense_every: 4\n"
        "stages:\n  - {max_length: 64, max_steps: 3}\n  - {max_length: 128, max_steps: 4, rope_type: yarn}\n"
    )
    (args,) = TrlParser(LongLoraSFTConfig).parse_args_and_config(["--config", str(file), "--learning_rate", "1e-3"])
    assert args.stages == [ContextStage(64, 3), ContextStage(128, 4, rope_type="yarn")]
    assert args.dense_every == 4 and args.learning_rate == 1e-3
