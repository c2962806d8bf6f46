"""The planner against torch's own record of live memory, against counted parameters, and against itself."""

import copy
import json
import math
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    TrainerCallback,
)

from benchmarks.planning import compared, compared_shared
from benchmarks.provenance import RESULTS, read_rows
from hf_longlora import (
    ContextStage,
    LongLoraConfig,
    LongLoraSFTConfig,
    LongLoraSFTTrainer,
    S2AttentionConfig,
    plan_run,
)
from hf_longlora.cli import main
from hf_longlora.planning import GIB, GPUS, RunSettings, check_model, find_gpu, gpu_called
from hf_longlora.planning.gpus import Gpu
from hf_longlora.planning.memory import kept_of_a_window, kept_of_the_mlp, kept_outside_the_mlp
from hf_longlora.planning.seconds import MATMUL_SHARE, SHORT_SEGMENT, TRAFFIC, TRAFFIC_FUSED
from hf_longlora.planning.shape import Shape

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = LlamaConfig(**SHAPE, num_key_value_heads=2)
WINDOWED = MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=256)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
EIGHT_LAYERS = copy.copy(LLAMA_8B)
EIGHT_LAYERS.num_hidden_layers = 8
OPT = {"ffn_dim": 512, "word_embed_proj_dim": 64}
JAMBA = {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_expand": 2}
LORA_ONLY = LongLoraConfig(train_norms=False, train_embeddings=False)


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in storages that operators return and something still holds."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.gone, key)
        self.peak = max(self.peak, self.live)
        return out

    def gone(self, key):
        self.live -= self.sizes.pop(key, 0)


def peak_of_a_step(config, tokens, adapter, tokenizer, folder, **options):
    """Bytes of the second step, what stood before it left out."""
    record = LiveBytes()

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                record.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                record.__exit__(None, None, None)

    trainer = LongLoraSFTTrainer(
        model=AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
        args=LongLoraSFTConfig(
            output_dir=str(folder),
            stages=[ContextStage(tokens, 2, rope_type=None)],
            dense_every=0,
            per_device_train_batch_size=1,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            report=False,
            disable_tqdm=True,
            **{"gradient_checkpointing": True} | options,
        ),
        train_dataset=Dataset.from_list([{"input_ids": torch.randint(4, config.vocab_size, (tokens,)).tolist()}]),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(adapter),
        callbacks=[Second()],
    )
    trainer.train()
    return record.peak


@pytest.mark.parametrize(
    ("config", "adapter", "options", "tolerance"),
    [
        (LLAMA, LongLoraConfig(), {}, 0.01),
        (LLAMA, LongLoraConfig(), {"gradient_checkpointing": False}, 0.01),
        (LLAMA, LongLoraConfig(), {"mlp_tile": 8}, 0.01),
        (LLAMA, LongLoraConfig(), {"mlp_tile": 8, "gradient_checkpointing": False}, 0.01),
        (LLAMA, LORA_ONLY, {}, 0.01),
        (LLAMA, LongLoraConfig(target_modules="all-linear"), {}, 0.01),
        (LLAMA, LongLoraConfig(target_modules="all-linear"), {"gradient_checkpointing": False}, 0.01),
        (LLAMA, None, {}, 0.01),
        (LLAMA, None, {"gradient_checkpointing": False}, 0.02),
        (Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16), LongLoraConfig(), {}, 0.03),
        (GPTNeoXConfig(**SHAPE), LongLoraConfig(), {}, 0.06),
        (MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4), LongLoraConfig(), {}, 0.06),
        (WINDOWED, LongLoraConfig(), {}, 0.01),
        (WINDOWED, LongLoraConfig(), {"gradient_checkpointing": False}, 0.01),
    ],
    ids=[
        *("llama", "not checkpointed", "tiled", "tiled, not checkpointed"),
        *("lora only", "all-linear", "all-linear, not checkpointed"),
        *("all weights", "all weights, not checkpointed", "qwen3", "gpt_neox", "mixtral"),
        *("windows", "windows, not checkpointed"),
    ],
)
def test_bytes_a_token_are_those_that_torch_holds(
    config, adapter, options, tolerance, tiny_tokenizer, tmp_path, monkeypatch
):
    loss = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL < 1.15 has another loss")
    monkeypatch.setattr(loss, "TOKEN_CHUNK_SIZE", 16)  # its tiles outweigh so small a model
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    short, long = (
        peak_of_a_step(config, tokens, adapter, tiny_tokenizer, tmp_path, **options) for tokens in (512, 1024)
    )
    plan = plan_run(config, [512, 1024], adapter=adapter, dense_every=0, **options).lengths
    assert (plan[1].total - plan[0].total) * GIB == pytest.approx(long - short, rel=tolerance)


@pytest.mark.parametrize("adapter", [LongLoraConfig(r=4), LORA_ONLY, LoraConfig(target_modules=["q_proj"]), None])
def test_parameters_are_counted_as_they_are(adapter):
    shape = Shape.of(LLAMA, RunSettings(adapter=adapter))
    model = AutoModelForCausalLM.from_config(LLAMA)
    assert shape.parameters == model.num_parameters()
    if adapter is not None:
        model = get_peft_model(model, copy.deepcopy(adapter))
    assert shape.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "special", "mixers"), [("llama", {}, 0), ("opt", OPT, 0), ("jamba", JAMBA, 2 * 256)]
)
def test_the_width_of_mlps_is_that_of_mlps(family, special, mixers):
    """Whatever the class of the layer they stand in is called, and without what mixes tokens beside attention."""
    config = AutoConfig.for_model(family, **SHAPE, **special)
    shape = Shape.of(config, RunSettings(adapter=LORA_ONLY))
    assert shape.mlp == (512 if family == "opt" else 2 * 512)
    assert shape.layers * shape.mixers == pytest.approx(mixers)


def test_the_parts_of_an_8b_step():
    plan = plan_run(LLAMA_8B, [32768], gpu="H200")
    (row,) = plan.lengths
    assert plan.parameters == 8_030_261_248
    # LoRA r=8 on q, k, v, o; an embedding of 128,256 x 4,096; 65 norms of 4,096.
    assert plan.trainable == 32 * 8 * (2 * 8192 + 2 * 5120) + 128256 * 4096 + 65 * 4096
    assert row.weights == pytest.approx((2 * plan.parameters + 4 * plan.trainable) / GIB)
    assert row.optimizer == pytest.approx(8 * plan.trainable / GIB)
    checkpoints = 32 * 32768 * 4096 * 2 / GIB
    assert checkpoints < row.activations < 2.5 * checkpoints
    assert row.total == pytest.approx(row.weights + row.gradients + row.optimizer + row.activations + row.logits)


def of(length=32768, **changes):
    return plan_run(EIGHT_LAYERS, [length], gpu="H200", **changes).lengths[0]


def test_what_settings_change():
    plain = of()
    offloaded = of(activation_offloading=True)
    moved = plain.activations - offloaded.activations
    assert plain.host == 0
    assert moved == pytest.approx(offloaded.host) == pytest.approx(5 * 32768 * 4096 * 2 / GIB)  # all but 3
    half = of(activation_offloading=True, offload_share=0.5)
    assert half.host == pytest.approx(1 * 32768 * 4096 * 2 / GIB)  # 4 of 8, but for 3
    assert plain.activations - half.activations == pytest.approx(half.host)
    assert of(gradient_checkpointing=False).activations > 4 * plain.activations
    assert of(gradient_checkpointing=False, dense_every=0).seconds < of(dense_every=0).seconds
    tiled, fused = of(mlp_tile=1024), of(fused=True)
    assert tiled.activations < plain.activations and fused.activations < plain.activations
    assert fused.seconds < plain.seconds == tiled.seconds
    assert plain.logits == 0  # the loss is not at the peak
    assert of(quantization="4bit").weights == pytest.approx(plain.weights - 8 * 218.1e6 * (2 - 0.516) / GIB, rel=0.01)
    assert of(adapter=LORA_ONLY).optimizer < 0.02 < plain.optimizer
    low_rank = of(adapter=LongLoraConfig(embedding_rank=8))
    assert low_rank.optimizer < 0.03 and low_rank.activations == plain.activations
    assert of(batch_size=2).activations == pytest.approx(2 * plain.activations)
    twice = of(gradient_accumulation_steps=2)
    assert twice.seconds == pytest.approx(2 * plain.seconds, rel=0.01) and twice.gradients > 0 == plain.gradients
    several = of(batch_size=2, gradient_accumulation_steps=3)
    assert several.tokens_per_second == pytest.approx(2 * 3 * 32768 / several.seconds)
    selective = of(selective_checkpointing=True)
    kept = 8 * 32768 * (2 * 4096 + 4 * 32) / GIB  # attention's output, and a number a head
    assert selective.activations == pytest.approx(plain.activations + kept)
    every_weight = of(adapter=None, dtype="float32")
    parameters = plan_run(EIGHT_LAYERS, [64]).parameters
    assert every_weight.optimizer == pytest.approx(8 * parameters / GIB)
    assert every_weight.gradients == pytest.approx(4 * parameters / GIB)
    in_bf16 = of(adapter=None)
    assert (in_bf16.optimizer, in_bf16.weights) == pytest.approx((4 * parameters / GIB, 2 * parameters / GIB))


def groups(size=None, **options):
    return {"attention": S2AttentionConfig(group_size=size, **options)}


def test_bytes_that_a_layer_keeps():
    settings = RunSettings(adapter=LongLoraConfig())
    norms, inputs = 2 * 64 * (4 + 2), 2 * 64  # of fp32 and of bf16; what query, key and value share
    attention = 2 * (64 + 64) + 2 * (32 + 32) + 4 * 4 + 2 * (16 + 16)  # a number a head; sine and cosine
    assert kept_outside_the_mlp(Shape.of(LLAMA, settings), settings) == norms + inputs + attention
    for heads, copied in ((1, 0), (2, 3 * (2 * 2 * 64) - 2 * (32 + 32)), (4, 0)):
        shape = Shape.of(MistralConfig(**SHAPE, num_key_value_heads=heads, sliding_window=256), settings)
        assert kept_of_a_window(shape, 256) == 2 * 1.5 * 256 + copied


@pytest.mark.parametrize("again", [True, False])
def test_bytes_that_a_fused_layer_keeps(again):
    """Of each norm its input alone, once; the first one's is the checkpoint. Of the MLP not the activation."""
    plain, fused = (RunSettings(adapter=LongLoraConfig(), fused=it, gradient_checkpointing=again) for it in (0, 1))
    shape = Shape.of(LLAMA, plain)
    norms = 2 * 64
    saved = kept_outside_the_mlp(shape, plain) - kept_outside_the_mlp(shape, fused)
    assert saved == (4 + 2) * norms - 2 * (norms - 64 * again)
    assert (kept_of_the_mlp(shape, plain), kept_of_the_mlp(shape, fused)) == (3 * 2 * 512, 2 * 2 * 512)


def test_bytes_of_the_loss():
    """Where it is the peak: a tile of logits, and what the last norm keeps; of few tokens and entries no more."""
    small = {**SHAPE, "intermediate_size": 16, "num_key_value_heads": 2}
    narrow, wide = LlamaConfig(**small), LlamaConfig(**small | {"vocab_size": 10_000})
    changes = {"adapter": LORA_ONLY, "gradient_checkpointing": False}
    for config, length, tile in ((narrow, 1024, 1024 * 128), (narrow, 8192, 4096 * 128), (wide, 8192, 4096 * 8192)):
        for fused, norm in ((False, 20), (True, 14)):
            (row,) = plan_run(config, [length], fused=fused, **changes).lengths
            assert row.logits * GIB == 2 * tile + length * norm * 64


def card(**speeds):
    """One that is infinitely fast at all but what is given."""
    sheet = {"tflops": math.inf, "bandwidth": math.inf, "link": math.inf, "attention": {"flash": math.inf}}
    return Gpu(name="a card", memory_gib=math.inf, **sheet | speeds)


MATRICES = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 512 * 3)  # of LLAMA's layers; its head has 64 * 128
PLAIN = {"adapter": LORA_ONLY, "gpu": card(tflops=1.0)}


@pytest.mark.parametrize(
    ("changes", "entries"),
    [
        ({}, 3 * MATRICES + 3 * 64 * 128),  # forward, again, and backward to the inputs
        ({"gradient_checkpointing": False}, 2 * MATRICES + 3 * 64 * 128),
        ({"adapter": None}, 4 * MATRICES + 4 * 64 * 128),  # and to the weights
        ({"batch_size": 3}, 3 * (3 * MATRICES + 3 * 64 * 128)),
        ({"gradient_accumulation_steps": 3}, 3 * (3 * MATRICES + 3 * 64 * 128)),
        ({"sequence_parallel": 2, "sparse": "s2"}, (3 * MATRICES + 3 * 64 * 128) / 2),
    ],
)
def test_seconds_of_matrix_products(changes, entries):
    (row,) = plan_run(LLAMA, [1024], **PLAIN | changes).lengths
    assert row.seconds_dense == pytest.approx(2 * 1024 * entries / (MATMUL_SHARE * 1e12))


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"quantization": "4bit"}])
def test_seconds_of_what_is_moved(again, options):
    """Of a step that is two forwards: what a layer keeps, quantized weights unpacked; and the optimizer's, once."""
    changes = {"adapter": LORA_ONLY, "gpu": card(bandwidth=1.0), "gradient_checkpointing": again, **options}
    plan = plan_run(LLAMA, [1024], gradient_accumulation_steps=2, **changes)
    settings = RunSettings(adapter=LORA_ONLY, gradient_checkpointing=again, **options)
    shape = Shape.of(LLAMA, settings)
    kept = kept_outside_the_mlp(shape, settings) + kept_of_the_mlp(shape, settings)
    passes = 3 if again else 2
    forward = (TRAFFIC_FUSED if "fused" in options else TRAFFIC) * kept * 3 * 1024 * passes / 3
    forward += passes * 4 * MATRICES if "quantization" in options else 0
    assert plan.lengths[0].seconds_dense == pytest.approx((2 * forward + 40 * plan.trainable) / 1e9)


def test_seconds_of_what_is_offloaded():
    settings = {"gpu": card(link=1.0), "activation_offloading": True, "gradient_accumulation_steps": 3}
    (row,) = plan_run(EIGHT_LAYERS, [1024], **settings).lengths
    checkpoints = 5 * 1024 * 4096 * 2  # all but 3
    assert row.seconds_dense == row.seconds_sparse == pytest.approx(3 * 2 * checkpoints / 1e9)  # there and back


def triangles(*sizes):
    """Pairs of tokens in causal segments, each at the rate of its length."""
    return sum(size * (size + 1) / 2 * (1 + SHORT_SEGMENT / size) for size in sizes)


@pytest.mark.parametrize(
    ("config", "length", "changes", "pairs"),
    [
        (LLAMA, 1024, {}, 4 * triangles(1024)),
        (LLAMA, 1024, {"batch_size": 2}, 2 * 4 * triangles(1024)),
        (LLAMA, 1024, {"sequence_parallel": 2, "sparse": "s2"}, 2 * triangles(1024)),
        (LLAMA, 1024, {"attention": S2AttentionConfig(group_size=256, sink_tokens=0), "dense_every": 0}, None),
        (WINDOWED, 1024, {}, 4 * 1.5 * 256 * 1024 * (1 + SHORT_SEGMENT / 256)),
        (WINDOWED, 256, {}, 4 * triangles(256)),  # no token is beyond the window
        (WINDOWED, 100, {}, 4 * triangles(100)),
    ],
    ids=["dense", "batch", "shared", "groups", "sliding", "a window", "less than a window"],
)
@pytest.mark.parametrize(
    ("checkpoints", "passes"),
    [
        ({}, 4.5),
        ({"gradient_checkpointing": False}, 3.5),
        ({"selective_checkpointing": True}, 3.5),
    ],
)
def test_seconds_of_attention(config, length, changes, pairs, checkpoints, passes):
    """Two products of a head's width for each pair in the forward, five in the backward."""
    gpu = card(tflops=1e9, attention={"flash": 1e-9, "cudnn": 1e-10})
    (row,) = plan_run(config, [length], adapter=LORA_ONLY, gpu=gpu, **changes, **checkpoints).lengths
    seconds = row.seconds_dense
    if pairs is None:  # half of the heads in four groups, half in three and two halves
        seconds, pairs = row.seconds, 2 * triangles(*[256] * 4) + 2 * triangles(128, 256, 256, 256, 128)
    assert seconds == pytest.approx(passes * 3 * 2 * 2 * 16 * pairs / 1e12, rel=1e-6)


def test_seconds_follow_the_pattern():
    rows = {group: of(131072, **groups(group), dense_every=0) for group in (2048, 32768, 131072)}
    floor = 2 * rows[2048].seconds_sparse - rows[32768].seconds_sparse  # below any attention
    assert floor < rows[2048].seconds < rows[32768].seconds < rows[131072].seconds
    assert rows[131072].seconds == rows[131072].seconds_dense
    # Groups of a quarter have 0.2345 of the dense pairs: half of the heads 4 groups, the others 3 and 2 halves.
    base = 2 * of(131072, **groups(2048), dense_every=0).seconds - of(131072, **groups(4096), dense_every=0).seconds
    share = (rows[32768].seconds - base) / (rows[131072].seconds - base)
    assert share == pytest.approx(0.2345, abs=0.02)
    mixed = of(131072, **groups(2048), dense_every=4)
    assert mixed.seconds == pytest.approx((3 * mixed.seconds_sparse + mixed.seconds_dense) / 4)
    assert of(backend="flash").seconds_dense > of(backend="cudnn").seconds_dense


@pytest.mark.parametrize("sparse", ["windows", "pose"])
def test_windows_are_planned_one_at_a_time(sparse):
    config = copy.copy(EIGHT_LAYERS)
    config.max_position_embeddings = 8192  # the window

    def of(length, **changes):
        return plan_run(config, [length], gpu="H200", **changes).lengths[0]

    windows = {"sparse": sparse, "dense_every": 0}
    short, long, longer = (of(length, **windows) for length in (8192, 32768, 131072))
    assert short.activations == long.activations == longer.activations == of(8192).activations
    assert short.gradients == of(8192).gradients  # at the peak there are none yet; of a window before, there are
    assert long.gradients == longer.gradients == of(8192, gradient_accumulation_steps=4).gradients > short.gradients
    assert longer.total < of(131072, sparse="s2", dense_every=0).total / 2
    assert long.seconds == pytest.approx(4 * short.seconds, rel=0.03)
    assert longer.seconds == pytest.approx(16 * short.seconds, rel=0.03)
    assert of(32768, batch_size=2, **windows).seconds == pytest.approx(2 * long.seconds, rel=0.03)
    assert of(32768, batch_size=2, **windows).total == long.total
    mixed = of(131072, sparse=sparse, dense_every=4)
    assert mixed.total == of(131072, sparse="s2").total  # that of its dense steps
    assert mixed.seconds == pytest.approx((3 * longer.seconds + mixed.seconds_dense) / 4)
    assert mixed.seconds_dense == of(131072).seconds_dense
    assert of(131072, sparse=sparse, dense_every=1).seconds == mixed.seconds_dense
    offloaded = of(131072, activation_offloading=True, **windows)
    assert offloaded.host == pytest.approx(5 * 8192 * 4096 * 2 / GIB)

    assert plan_run(config, [8192], gpu="H200", **windows).longest is None
    mixed, plain = (plan_run(config, [8192], gpu="H200", sparse=kind).longest for kind in (sparse, "s2"))
    assert mixed == plain > 8192
    assert plan_run(LLAMA_8B, [8192], adapter=None, dtype="float32", **windows).longest == 0  # not even a window


def test_windows_that_run_at_once_take_a_whole_row():
    """With a balance of experts in the loss, and RoPE that goes by the longest position: as the trainer runs them."""
    experts = MixtralConfig(
        num_hidden_layers=2, max_position_embeddings=8192, sliding_window=None, router_aux_loss_coef=0.02
    )
    windows = {"sparse": "pose", "dense_every": 0}
    dynamic = copy.copy(LLAMA)
    dynamic.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for config in (experts, dynamic):
        whole, dense = (plan_run(config, [32768], **changes).lengths[0] for changes in (windows, {}))
        assert whole.total == dense.total and whole.seconds < dense.seconds_dense
    experts.router_aux_loss_coef = 0.0
    assert plan_run(experts, [32768], **windows).lengths[0].total < plan_run(experts, [32768]).lengths[0].total


def test_the_defaults_are_the_trainer_s():
    import argparse

    from hf_longlora import LongLoraSFTConfig
    from hf_longlora.cli import plan
    from hf_longlora.schedule import GROUPS

    commands = argparse.ArgumentParser().add_subparsers()
    plan.add(commands)
    options = commands.choices["plan"].parse_args(["model"])
    for name in ("sparse", "dense_every", *GROUPS):
        default = LongLoraSFTConfig.__dataclass_fields__[name].default
        own = RunSettings().attention if name in GROUPS else RunSettings()
        assert getattr(own, name) == getattr(options, name, default) == default, name


@pytest.mark.parametrize("gpu", GPUS)
def test_the_longest_is_the_last_that_fits(gpu):
    changes = {"quantization": "4bit", "gpu": gpu}
    longest = plan_run(EIGHT_LAYERS, [1024], **changes).longest
    assert longest >= 8192
    fitting, too_long = plan_run(EIGHT_LAYERS, [longest, longest + 1024], **changes).lengths
    assert fitting.fits and not too_long.fits
    all_weights = plan_run(EIGHT_LAYERS, [1024], gpu=gpu, adapter=None, dtype="float32").longest  # 42 GiB of states
    assert (all_weights > 0) == (GPUS[gpu].memory_gib > 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "H999"}, "known are H200, H100"),
        ({"lengths": []}, "at least 2"),
        ({"lengths": [1]}, "at least 2"),
        ({"quantization": "4bit", "adapter": None}, "give an adapter"),
        ({"quantization": "2bit"}, "'4bit', '8bit'"),
        ({"activation_offloading": True, "gradient_checkpointing": False}, "with gradient checkpointing only"),
        ({"offload_share": 0.5}, "with activation offloading only"),
        ({"activation_offloading": True, "offload_share": 0.0}, "offload_share"),
        ({"batch_size": 0}, "batch_size"),
        ({"mlp_tile": 0}, "mlp_tile"),
        ({"gpu": "A100-80GB", "backend": "cudnn"}, "no cudnn attention"),
        ({"dtype": "int8"}, "dtype"),
        ({"sparse": "s3"}, "`sparse` must be one of"),
    ],
)
def test_what_can_not_be_planned(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_run(LLAMA, **{"lengths": [1024], **arguments})


def test_the_plan_is_near_what_was_measured(monkeypatch):
    """All rows of our trainer: memory within 10%, time within 20%."""
    shapes = {}  # of two models, with quantized bases and without

    def of(config, settings, shape_of=Shape.of):
        key = config.hidden_size, config.num_hidden_layers, settings.quantization
        return shapes[key] if key in shapes else shapes.setdefault(key, shape_of(config, settings))

    monkeypatch.setattr(Shape, "of", of)
    lines = list(compared(read_rows(RESULTS / "train_step.csv")))
    lines += compared_shared(read_rows(RESULTS / "million.csv"))
    timed = [line for line in lines if line["s_error"] is not None]
    assert len({line["length"] for line in timed}) > 3
    assert all(abs(line["gib_error"]) < 0.1 for line in lines)
    assert all(abs(line["s_error"]) < 0.2 for line in timed)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA A10G", "A10G"),
    ],
)
def test_cards_are_known_by_torchs_names(name, found):
    assert gpu_called(name).name == found
    assert gpu_called("Tesla T4") is None


def test_a_plan_names_its_model():
    named = copy.copy(LLAMA)
    named.name_or_path = "user/model"
    assert [plan_run(config, [2], gpu="h200").model for config in (LLAMA, named)] == ["llama", "user/model"]


def test_cards_and_notes():
    assert find_gpu("h200") is GPUS["H200"] and find_gpu(GPUS["H100"]) is GPUS["H100"]
    window = LLAMA.max_position_embeddings
    assert plan_run(LLAMA, [64, window], gpu="H200").notes == ()
    (note,) = plan_run(LLAMA, [64, window + 1], gpu="H200").notes
    assert note.startswith(f"Steps that aren't dense are planned in windows of {window:,} tokens")
    assert "data sheet" in plan_run(LLAMA, [64], gpu="L40S").notes[0]
    gemma = Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=64)
    assert "gemma3_text" in plan_run(gemma, [64], gpu="H200").notes[0]
    (note,) = plan_run(LLAMA, [32, 64, 65], gpu="H200", **groups(64)).notes
    assert note.startswith("A group of 64 tokens holds all of a sequence of 64: attention is dense")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
            "AttentionInterface",
        ),
        (BertConfig(**SHAPE), "no causal attention"),
    ],
)
def test_what_training_would_refuse_is_not_planned(config, reason):
    (refused,) = check_model(config).refused
    with pytest.raises(ValueError, match=reason) as error:
        plan_run(config)
    assert str(error.value) == refused


def test_plan_says_where_to_train_densely(tmp_path, capsys):
    LLAMA_8B.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--gpu", "H200", "--lengths", "2048", "4096", "8192", "131072"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["lengths"]
    longer = {row["length"]: row["seconds_dense"] / row["seconds"] for row in rows}
    assert longer[2048] == 1 and 1 < longer[4096] < longer[8192] < 1.25 < longer[131072]
    assert main(arguments) == 0
    assert "Up to 8,192 tokens dense training takes at most 25% longer" in capsys.readouterr().out
    for others in (["--dense-every", "1"], ["--dense-every", "0"], ["--lengths", "2048", "131072"]):
        assert main([*arguments, *others]) == 0
        assert "longer" not in capsys.readouterr().out.replace("longest", "")


def test_plan_reads_nothing_but_the_config(tmp_path, capsys):
    LLAMA_8B.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--gpu", "H200", "--lengths", "8192", "131072"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "8.03 B parameters, 532.4 M trained" in printed and "131,072" in printed and "The longest that fits" in printed
    )
    assert main([*arguments, "--no-train-embeddings", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in plan["lengths"]] == [8192, 131072] and plan["trainable"] < 10_000_000
    assert main([*arguments, "--no-use-peft", "--batch-size", "64"]) == 0
    assert "Not even 1,024 tokens fit" in capsys.readouterr().out
    for wrong, message in ((["--gpu", "H999"], "unknown GPU"), (["--quantized", "4bit", "--no-use-peft"], "adapter")):
        assert main([*arguments, *wrong]) == 1
        assert message in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "nowhere")]) == 1
    assert "can't be had" in capsys.readouterr().err


def test_groups_are_the_trainer_s():
    """By default of the base's native window, at most a quarter of the length."""
    length = 16 * LLAMA.max_position_embeddings
    by_default = plan_run(LLAMA, [length], gpu="H200", sparse="s2").lengths
    assert by_default == plan_run(LLAMA, [length], gpu="H200", **groups(length // 16)).lengths
    assert by_default != plan_run(LLAMA, [length], gpu="H200", **groups(length // 4)).lengths
    known = LongLoraConfig(base_length=length // 32)
    assert (
        plan_run(LLAMA, [length], gpu="H200", adapter=known, sparse="s2").lengths
        == plan_run(LLAMA, [length], gpu="H200", **groups(length // 32)).lengths
    )


@pytest.mark.parametrize(
    "said", [{}, groups(32), groups(group_size_ratio=0.25), groups(sink_tokens=0), {"sequence_parallel": 2}]
)
def test_plain_text_is_planned_in_windows_unless_something_speaks_for_groups(said):
    def of(sparse):
        return plan_run(LLAMA, [1024], gpu="H200", sparse=sparse, **said).lengths

    assert of("auto") == of("s2" if said else "windows")
    assert said or of("auto") != of("s2")


@pytest.mark.parametrize("again", [True, False])
def test_a_window_that_holds_all_is_none(again):
    """Mistral's and Llama's layers are the same, but for the window."""
    windowed, whole = (
        plan_run(config, [200, 256, 257], gpu="H200", gradient_checkpointing=again, sparse="s2").lengths
        for config in (WINDOWED, LLAMA)
    )
    assert windowed[:2] == whole[:2]
    assert windowed[2].activations > whole[2].activations and windowed[2].seconds_dense > whole[2].seconds_dense


def test_sink_tokens_are_counted():
    """Pairs of them with each token of a later group, and nothing in a dense step."""
    few, many = (plan_run(LLAMA_8B, [131072], gpu="H200", **groups(sink_tokens=n)).lengths[0] for n in (0, 2048))
    assert 1.01 * few.seconds_sparse < many.seconds_sparse < 1.2 * few.seconds_sparse
    assert many.seconds_dense == few.seconds_dense and many.total == few.total


def test_a_native_window_that_is_not_known_is_said():
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=linear)
    (note,) = plan_run(config, [1024], gpu="H200").notes
    assert note.startswith("Groups without a size or a ratio are a quarter of the length: the config doesn't say")
    with pytest.raises(ValueError, match="Steps in windows can't be planned"):
        plan_run(config, [1024], gpu="H200", sparse="pose")
    known = LongLoraConfig(base_length=SHAPE["max_position_embeddings"] // 4)
    assert plan_run(config, [1024], gpu="H200", adapter=known).notes == ()
    (note,) = plan_run(config, [2 * SHAPE["max_position_embeddings"]], gpu="H200", adapter=known).notes
    assert note.startswith(f"Steps that aren't dense are planned in windows of {known.base_length:,} tokens")
    assert plan_run(config, [1024], gpu="H200", adapter=known, sparse="pose").lengths


def test_cards_that_share_a_sequence():
    """Two have half of the tokens each, and half of attention's work; weights and optimizer each has whole."""
    config = LLAMA_8B
    one, two = (plan_run(config, [65536], gpu="H100", sequence_parallel=n) for n in (1, 2))
    half = plan_run(config, [32768], gpu="H100")
    assert two.lengths[0].activations == half.lengths[0].activations
    assert two.lengths[0].weights == one.lengths[0].weights
    assert two.lengths[0].optimizer == half.lengths[0].optimizer / 2  # DeepSpeed's ZeRO
    assert half.lengths[0].seconds_dense < two.lengths[0].seconds_dense < one.lengths[0].seconds_dense
    assert two.longest >= 2 * one.longest - 2048
    assert any("2 cards share a sequence" in note for note in two.notes)
    with pytest.raises(ValueError, match="a window of 4,096 tokens"):
        plan_run(MistralConfig(sliding_window=4096), [65536], gpu="H100", sequence_parallel=2)
    with pytest.raises(ValueError, match="none is shared"):
        plan_run(config, [65536], gpu="H100", sequence_parallel=2, sparse="pose")
