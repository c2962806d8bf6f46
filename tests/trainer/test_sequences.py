"""`sequence_parallel`: who reads which row, what a batch is, and what is refused before anything is loaded."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Trainer,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer, S2AttentionConfig
from hf_longlora.schedule import Schedule
from hf_longlora.trainer.sequences import (
    InShards,
    ShardableCollator,
    check_sequences,
    gradients_repeated,
    parallelism_config,
    shards_in_turn,
    started_with_deepspeed,
)

SHARES = hasattr(ParallelismConfig, "sp_enabled")


@pytest.mark.parametrize(
    ("steps", "batch", "size", "groups"), [(6, 1, 2, 1), (7, 2, 2, 2), (5, 1, 4, 1), (3, 3, 4, 2), (9, 2, 3, 3)]
)
def test_each_step_sees_its_own_rows(steps, batch, size, groups):
    """As accelerate deals batches out to processes, and DeepSpeed goes through those of a group."""
    for done in range(steps):
        order = InShards(steps * batch * groups, batch, size, groups, done)
        sampler = BatchSampler(order, batch, drop_last=False)
        assert len(order) == len(list(order)) and len(order) % (batch * size * groups) == 0
        read = [list(BatchSamplerShard(sampler, size * groups, rank)) for rank in range(size * groups)]
        for step in range(steps - done):
            for group in range(groups):
                of_turn = read[group * size + step % size][step // size]
                first = ((done + step) * groups + group) * batch
                assert of_turn == list(range(first, first + batch))


@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_a_stage_s_steps_are_of_its_rows_where_one_read_is_of_two_stages(size, groups, accumulated):
    """Processes read a batch each and go through them in turn; where a stage ends midway, the next one's rows wait."""
    batch = 2
    stages = ContextStage(128, 3), ContextStage(256, 1), ContextStage(512, 2)
    schedule = Schedule(stages, S2AttentionConfig(), 0)
    steps = schedule.ends[-1]
    rows = [schedule.step(step).stage for step in range(steps) for _ in range(batch * accumulated * groups)]
    mixed = False
    for done in range(steps):
        order = InShards(len(rows), batch, size, groups, done * accumulated)
        sampler = BatchSampler(order, batch, drop_last=False)
        read = [list(BatchSamplerShard(sampler, size * groups, rank)) for rank in range(size * groups)]
        for group in range(groups):
            of_group = read[group * size : (group + 1) * size]
            mixed |= any(len({rows[i] for b in batches for i in b}) > 1 for batches in zip(*of_group, strict=True))
            trained = [b for batches in zip(*of_group, strict=True) for b in batches]  # as DeepSpeed refills
            for micro in range((steps - done) * accumulated):
                stage = schedule.step(done + micro // accumulated).stage
                assert [rows[i] for i in trained[micro]] == [stage] * batch
    assert mixed or accumulated * 3 % size == accumulated % size == 0


@pytest.mark.parametrize("drop_last", [False, True])
def test_no_batch_of_shards_is_taken_for_padding(make, monkeypatch, drop_last):
    """Where the last batch may be filled up, accelerate counts of it what the dataset's length leaves."""
    trainer = make(dataloader_drop_last=drop_last)
    trainer.args.sequence_parallel = 2
    told = []
    get = lambda self, **kwargs: told.append(self.args.dataloader_drop_last)  # noqa: E731
    monkeypatch.setattr(Trainer, "_get_dataloader", get)
    for training in (True, False):
        trainer._get_dataloader(dataset=trainer.train_dataset, is_training=training)
    assert told == [True, drop_last] and trainer.args.dataloader_drop_last == drop_last


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_can_be_cut(packed):
    collator = DataCollatorForLanguageModeling(pad_token_id=5, padding_free=packed, return_position_ids=True)
    examples = [{"input_ids": [7, 8, 9]}, {"input_ids": [7, 8, 9, 10]}]
    batch = ShardableCollator(collator, 4)(examples)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "attention_mask"}
    assert len({x.shape for x in batch.values()}) == 1 and batch["input_ids"].shape[1] % 4 == 0
    if packed:
        assert batch["input_ids"].tolist() == [[7, 8, 9, 7, 8, 9, 10, 5]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
        assert batch["labels"].tolist() == [[-100, 8, 9, -100, 8, 9, 10, -100]]
        assert batch["attention_mask"].tolist() == [[1] * 7 + [0]]
    else:
        assert batch["attention_mask"].sum(1).tolist() == [3, 4]


def in_turn(group):
    rank = dist.get_rank(group)
    ids = torch.arange(2 * 8 * (rank + 1)).view(2, -1) + 100 * rank
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids), "use_cache": False}
    return list(shards_in_turn(batch, group))


def test_evaluated_batches_are_cut_in_turn(processes):
    """Each process's batch, of its own length, over all of the group; labels are those of the next tokens."""
    for size in (2, 4):
        found = processes.run(size, in_turn)
        for turn in range(size):
            whole = torch.arange(2 * 8 * (turn + 1)).view(2, -1) + 100 * turn
            shards = [of_rank[turn] for of_rank in found]
            names = {"input_ids", "labels", "attention_mask", "shift_labels", "use_cache"}
            assert all(shard.keys() == names for shard in shards)
            assert {shard["input_ids"].shape[1] for shard in shards} == {8 * (turn + 1) // size}
            assert torch.equal(torch.cat([shard["input_ids"] for shard in shards], dim=1), whole)
            for name in ("labels", "shift_labels"):
                labels = torch.cat([shard[name] for shard in shards], dim=1)
                assert torch.equal(labels[:, :-1], whole[:, 1:]) and labels[:, -1].eq(-100).all()


def test_a_collator_without_positions_is_refused():
    """Each process would count them from its shard's beginning, and take that for a document's."""
    collator = DataCollatorForLanguageModeling(pad_token_id=5)
    with pytest.raises(ValueError, match="batches need `position_ids`"):
        ShardableCollator(collator, 2)([{"input_ids": [7, 8]}])


def test_gradients_are_what_deepspeed_makes_of_them():
    assert gradients_repeated(4, {"zero_optimization": {"stage": 2}}) == 4
    assert gradients_repeated(4, {"zero_optimization": {"stage": 3}}) == 1
    assert gradients_repeated(4, {"zero_optimization": {"stage": 3, "reduce_scatter": False}}) == 4
    assert gradients_repeated(4, {}) == 4


@pytest.mark.skipif(not SHARES, reason="needs accelerate>=1.12")
def test_accelerate_is_told_of_groups():
    config = parallelism_config(2, 8)
    assert (config.sp_size, config.sp_backend, config.data_parallel_size) == (2, "deepspeed", 4)


def test_an_accelerate_without_groups_is_refused(tiny_tokenizer, tmp_path, launched, monkeypatch):
    monkeypatch.delattr(ParallelismConfig, "sp_enabled")
    with pytest.raises(ValueError, match="needs a later accelerate"):
        refused(tiny_tokenizer, tmp_path)


TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
LLAMA = {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def refused(tiny_tokenizer, tmp_path, model=None, adapter=None, **options):
    of_trl = {name: options.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in options}
    args = LongLoraSFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        **{"stages": [ContextStage(128, 2)], "sequence_parallel": 2, **options},
    )
    LongLoraSFTTrainer(
        model or LlamaForCausalLM(LlamaConfig(**LLAMA)),
        args,
        train_dataset=Dataset.from_dict({"text": ["a" * 300] * 4}),
        processing_class=tiny_tokenizer,
        peft_config=adapter or LongLoraConfig(r=2),
        **of_trl,
    )


@pytest.fixture
def launched(monkeypatch):
    """As under `accelerate launch` with DeepSpeed, before it starts anything."""
    if not SHARES:
        pytest.skip("needs accelerate>=1.12")
    monkeypatch.setattr(LongLoraSFTConfig, "world_size", 4)
    monkeypatch.setattr("hf_longlora.trainer.sequences.started_with_deepspeed", lambda args: True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "deepspeed" or find_spec(name, *rest))


def test_one_process_and_no_deepspeed_are_refused(tiny_tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"multiple of 2 processes.*accelerate launch"):
        refused(tiny_tokenizer, tmp_path)
    monkeypatch.setattr(LongLoraSFTConfig, "world_size", 3)
    with pytest.raises(ValueError, match="there are 3"):
        refused(tiny_tokenizer, tmp_path)
    monkeypatch.setattr(LongLoraSFTConfig, "world_size", 2)
    with pytest.raises(ValueError, match="goes with DeepSpeed, of any ZeRO stage"):
        refused(tiny_tokenizer, tmp_path)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        refused(tiny_tokenizer, tmp_path, sequence_parallel=0)


def test_what_cannot_be_in_shards_is_refused(tiny_tokenizer, tmp_path, launched, monkeypatch):
    mistral = MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=16))
    with pytest.raises(ValueError, match="a window of 16 tokens"):
        refused(tiny_tokenizer, tmp_path, mistral)
    hybrid = Qwen3NextConfig(**LLAMA, layer_types=["linear_attention"], num_experts=2)
    with pytest.raises(ValueError, match="linear_attention, which see no further"):
        refused(tiny_tokenizer, tmp_path, Qwen3NextForCausalLM(hybrid))
    with pytest.raises(ValueError, match="RoPE of type 'dynamic'"):
        refused(tiny_tokenizer, tmp_path, stages=[ContextStage(128, 2, rope_type="dynamic")])
    with pytest.raises(ValueError, match="windows fit one process"):
        refused(tiny_tokenizer, tmp_path, sparse="pose")
    with pytest.raises(ValueError, match="`compile_layers` is not for"):
        refused(tiny_tokenizer, tmp_path, compile_layers=True)
    with pytest.raises(ValueError, match="`compute_metrics` gets none"):
        refused(tiny_tokenizer, tmp_path, compute_metrics=len)
    with pytest.raises(ValueError, match="the mean over the labels"):
        refused(tiny_tokenizer, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="the mean over the labels"):
        refused(tiny_tokenizer, tmp_path, compute_loss_func=len)
    with pytest.raises(ValueError, match="leave `even_batches` on"):
        refused(tiny_tokenizer, tmp_path, accelerator_config={"even_batches": False})
    experts = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=2))
    with pytest.raises(ValueError, match="set router_aux_loss_coef=0"):
        refused(tiny_tokenizer, tmp_path, experts)
    spread = LlamaForCausalLM(LlamaConfig(**LLAMA))
    spread.hf_device_map = {"": 0}
    with pytest.raises(ValueError, match="`device_map` has one process"):
        refused(tiny_tokenizer, tmp_path, spread)


def test_what_a_config_says_and_what_a_class_says(tmp_path, launched, monkeypatch):
    """Of code that comes with a model there is no class yet."""
    args = LongLoraSFTConfig(
        output_dir=str(tmp_path), stages=[ContextStage(128, 2)], sequence_parallel=2, use_cpu=True, bf16=False
    )

    def check(config, model_class=None):
        check_sequences(args, args.schedule, [], config, model_class, False, {})

    with pytest.raises(ValueError, match="MistralConfig has layers with a window"):
        check(MistralConfig(**LLAMA, sliding_window=16))
    with pytest.raises(ValueError, match="Recurrent has layers with a state"):
        check(LlamaConfig(**LLAMA), type("Recurrent", (), {"_is_stateful": True}))
    args.router_aux_loss_coef = 0.5
    check(LlamaConfig(**LLAMA))  # has no experts
    args.router_aux_loss_coef = 0.0
    check(MixtralConfig(**LLAMA))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'deepspeed"):
        check(LlamaConfig(**LLAMA))


def test_a_run_is_deepspeeds_by_its_arguments_or_by_its_launch(monkeypatch):
    for environment, deepspeed, found in (None, None, False), (None, "zero2.json", True), ("true", None, True):
        if environment is not None:
            monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", environment)
        assert started_with_deepspeed(SimpleNamespace(deepspeed=deepspeed)) is found


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LlamaConfig(**LLAMA), {"sequence_parallel": 3}, "needs a multiple of 3 processes, and there are 4"),
        (LlamaConfig(**LLAMA), {"model_init_kwargs": {"device_map": "auto"}}, "`device_map` has one process"),
        (LlamaConfig(**LLAMA), {"stages": [ContextStage(128, 2, rope_type="longrope")]}, "RoPE of type 'longrope'"),
        (MistralConfig(**LLAMA, sliding_window=16), {}, "a window of 16 tokens"),
        (Qwen3NextConfig(**LLAMA, layer_types=["linear_attention"]), {}, "linear_attention, which see no further"),
        (MixtralConfig(**LLAMA), {}, "set router_aux_loss_coef=0"),
        (LlamaConfig(**LLAMA), {"loss_type": "dft"}, "the mean over the labels"),
    ],
    ids=["processes", "device_map", "rope", "window", "linear", "experts", "loss"],
)
def test_nothing_is_loaded_before_it_is_refused(tiny_tokenizer, tmp_path, launched, config, options, message):
    """The model's folder has a config and nothing else."""
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        refused(tiny_tokenizer, tmp_path, str(tmp_path / "base"), **options)


@pytest.mark.skipif(not SHARES, reason="needs accelerate>=1.12")
def test_accelerates_own_key_is_refused(tiny_tokenizer, tmp_path, monkeypatch):
    for kind in ("sp", "cp", "tp"):
        with pytest.raises(ValueError, match="by `sequence_parallel`, not by accelerate's"):
            refused(tiny_tokenizer, tmp_path, parallelism_config=ParallelismConfig(**{f"{kind}_size": 2}))
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with pytest.raises(ValueError, match="by `sequence_parallel`, not by accelerate's"):
        refused(tiny_tokenizer, tmp_path)


def test_counts_go_by_groups_of_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(LongLoraSFTConfig, "world_size", 8)
    args = LongLoraSFTConfig(
        output_dir=str(tmp_path), stages=[ContextStage(128, 2)], sequence_parallel=4, use_cpu=True, bf16=False
    )
    assert args.data_parallel == 2


def test_logits_of_evaluated_shards_are_refused(make):
    """`predict` asks for them."""
    trainer = make()
    trainer.args.sequence_parallel = 2
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.ones(1, 8, dtype=torch.long)}
    with pytest.raises(ValueError, match="set `prediction_loss_only`"):
        trainer.prediction_step(trainer.model.eval(), batch, prediction_loss_only=False)
