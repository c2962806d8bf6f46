"""RoPE scaling: what is written, what transformers and vLLM derive from it, and what it does to a live model."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from hf_longlora.rope import ROPE_TYPES, RopeScaling, apply_rope, current_rope, reach, rope_factor, scaled_rope

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**kwargs):
    return LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, **kwargs})


def gemma3(**kwargs):
    layers = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(
        **{**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "layer_types": layers, **kwargs}
    )


def build(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():  # large enough for positions to matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


MODELS = {
    "llama": (LlamaForCausalLM, llama, ROPE_TYPES),
    "gpt_neox": (GPTNeoXForCausalLM, lambda: GPTNeoXConfig(**SHAPE), ROPE_TYPES),  # rotates a quarter of the head
    "phi3": (Phi3ForCausalLM, lambda: Phi3Config(**SHAPE, num_key_value_heads=2), ("longrope",)),
    "gemma3": (Gemma3ForCausalLM, gemma3, ("linear", "yarn", "llama3", "longrope")),  # nested by layer type
}
CASES = [(name, rope_type) for name, (_, _, types) in MODELS.items() for rope_type in types]


def buffers(model):
    return {n: b.clone() for n, b in model.named_buffers() if "inv_freq" in n}


@torch.no_grad()
@pytest.mark.parametrize(("name", "rope_type"), CASES)
def test_apply_equals_reload_and_undo_equals_the_original(name, rope_type, tmp_path):
    cls, make, _ = MODELS[name]
    model = build(cls, make())
    ids = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(0))
    base, before, base_buffers = current_rope(model.config), model(ids).logits, buffers(model)

    scaling = scaled_rope(model.config, 256, rope_type)
    assert rope_factor(scaling) == 4.0
    apply_rope(model, scaling)
    fresh = buffers(model)
    after = model(ids).logits
    if rope_type != "dynamic":  # dynamic grows by itself: only short text tells base and target apart, not at all
        assert (after - before).abs().max() > 1e-3

    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert current_rope(reloaded.config) == scaling
    for key, value in buffers(reloaded).items():
        assert torch.equal(value, fresh[key]), key
    assert torch.equal(reloaded(ids).logits, after)

    apply_rope(model, base)
    assert current_rope(model.config) == base
    for key, value in buffers(model).items():
        assert torch.equal(value, base_buffers[key]), key
    assert torch.equal(model(ids).logits, before)
    leftovers = [n for m in model.modules() for n in vars(m) if n.endswith("long_inv_freq")]
    assert not leftovers


def vllm_max_model_len(config) -> int:
    """vLLM's rule, from what it reads in config.json."""
    length, factor = config.max_position_embeddings, 1.0
    parameters = config.rope_parameters
    entries = parameters.values() if "rope_type" not in parameters else [parameters]
    if "gemma3" not in config.model_type:
        for entry in entries:
            if entry["rope_type"] not in ("su", "longrope", "llama3"):
                factor = entry.get("factor", factor)
                if entry["rope_type"] == "yarn":
                    length = entry["original_max_position_embeddings"]
    return int(length * factor)


@pytest.mark.parametrize(("name", "rope_type"), CASES)
def test_vllm_derives_the_target_length(name, rope_type, tmp_path):
    cls, make, _ = MODELS[name]
    model = build(cls, make())
    for target in (192, 256, 1000):
        scaling = scaled_rope(model.config, target, rope_type)
        other = copy.deepcopy(model)
        apply_rope(other, scaling)
        other.config.save_pretrained(tmp_path)
        assert vllm_max_model_len(AutoConfig.from_pretrained(tmp_path)) == target
        assert reach(scaling) == (64, target)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("length", [4096, 8192])
def test_stages_compose_exactly(rope_type, length):
    config = llama(max_position_embeddings=length)
    at_once = scaled_rope(config, length * 16, rope_type)
    model = LlamaForCausalLM(config)
    apply_rope(model, scaled_rope(config, length * 8, rope_type))
    in_steps = scaled_rope(model.config, length * 16, rope_type)
    assert rope_factor(in_steps) == 16.0
    if rope_type == "longrope":  # its ramp is applied twice: equal at both ends, close between
        assert in_steps.parameters["long_factor"][0] == 1.0
        assert in_steps.parameters["long_factor"][-1] == pytest.approx(16.0)
    else:
        assert in_steps == at_once


def test_cumulative_factor_of_a_scaled_base():
    theta = {"rope_theta": 10000.0}
    config = llama(max_position_embeddings=4096, rope_parameters={**theta, "rope_type": "linear", "factor": 8.0})
    assert reach(current_rope(config)) == (4096, 32768)
    scaling = scaled_rope(config, 65536)
    assert scaling.parameters["factor"] == 16.0
    assert scaling.max_position_embeddings == 4096


def test_native_llama3_is_extended_in_its_own_type():
    native = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = llama(max_position_embeddings=131072, rope_parameters=native)
    assert reach(current_rope(config)) == (8192, 131072)
    with pytest.raises(ValueError, match='rope_type="llama3"'):
        scaled_rope(config, 262144, "linear")
    with pytest.raises(ValueError, match="131072"):
        scaled_rope(config, 131072, "llama3")
    scaling = scaled_rope(config, 262144, "llama3")
    assert scaling.parameters["factor"] == 32.0
    assert scaling.parameters["original_max_position_embeddings"] == 8192
    assert scaling.max_position_embeddings == 262144
    forced = scaled_rope(config, 262144, rope_parameters={"rope_type": "linear", "factor": 32.0})
    assert forced.parameters == {"rope_type": "linear", "factor": 32.0, "rope_theta": 500000.0}
    assert forced.max_position_embeddings == 8192


def test_yarn_keeps_the_bases_settings_and_derives_a_new_attention_factor():
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 2.0,
        "beta_fast": 16.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 1024,
    }
    scaling = scaled_rope(llama(max_position_embeddings=2048, rope_parameters=parameters), 8192, "yarn")
    assert scaling.parameters["factor"] == 8.0
    assert scaling.parameters["beta_fast"] == 16.0
    assert "attention_factor" not in scaling.parameters


def test_longrope_extends_a_longrope_base():
    half = 8
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [1.0 + i for i in range(half)],
    }
    config = Phi3Config(
        **{**SHAPE, "max_position_embeddings": 512},
        original_max_position_embeddings=64,
        num_key_value_heads=2,
        rope_parameters=parameters,
    )
    assert reach(current_rope(config)) == (64, 512)
    scaling = scaled_rope(config, 2048, "longrope")
    assert scaling.parameters["factor"] == 32.0
    assert scaling.parameters["short_factor"] == [1.0] * half
    assert scaling.parameters["long_factor"][0] == 1.0
    assert scaling.parameters["long_factor"][-1] == pytest.approx(8.0 * 4)
    assert scaling.original_max_position_embeddings == 64


def test_gemma3_scales_only_the_global_layers_and_counts_its_factor():
    config = gemma3()
    scaling = scaled_rope(config, 256)
    assert scaling.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    assert scaling.max_position_embeddings == 256
    model = build(Gemma3ForCausalLM, config)
    apply_rope(model, scaling)
    assert reach(current_rope(model.config)) == (64, 256)
    assert scaled_rope(model.config, 512).parameters["factor"] == 8.0
    with pytest.raises(ValueError, match="dynamic"):
        scaled_rope(gemma3(), 256, "dynamic")


def test_base_length_overrides_the_guess():
    config = llama(max_position_embeddings=128)
    scaling = scaled_rope(config, 512, "linear", base_length=32)
    assert scaling.parameters["factor"] == 16.0
    assert scaling.max_position_embeddings == 32


def test_auto_is_yarn_or_the_type_the_base_has():
    assert scaled_rope(llama(), 256).rope_type == "yarn"
    for kind in ROPE_TYPES:
        model = LlamaForCausalLM(llama())
        apply_rope(model, scaled_rope(model.config, 256, kind))
        assert scaled_rope(model.config, 512) == scaled_rope(model.config, 512, kind)
    assert scaled_rope(MODELS["phi3"][1](), 256).rope_type == "longrope"  # its config takes no other


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"target_length": 64}, "reaches 64 tokens"),
        ({"target_length": 128, "rope_type": "cubic"}, "unknown rope_type"),
        ({}, "target_length"),
        ({"target_length": 128, "rope_parameters": {"factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"target_length": 512, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "less than"),
        ({"target_length": 128, "rope_parameters": {"rope_type": "llama3"}}, "not valid"),
        ({"target_length": 128, "rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "short_factor"),
    ],
)
def test_refusals(kwargs, match):
    with pytest.raises(ValueError, match=match):
        scaled_rope(llama(), **kwargs)


def test_explicit_parameters():
    scaling = scaled_rope(llama(), rope_parameters={"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0})
    assert scaling.parameters["rope_theta"] == 10000.0
    assert scaling.parameters["original_max_position_embeddings"] == 64
    assert scaling.max_position_embeddings == 256
    assert scaled_rope(llama(), 256, rope_parameters={"rope_type": "linear"}).parameters["factor"] == 4.0


def test_models_without_rope_say_so():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match="no RoPE"):
        current_rope(config)
    with pytest.raises(ValueError, match="no RoPE"):
        apply_rope(GPT2LMHeadModel(config), current_rope(llama()))


def test_missing_theta_is_not_guessed():
    config = llama()
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_theta"):
        current_rope(config)


def test_snapshots_are_json_and_independent():
    import json

    config = llama()
    scaling = scaled_rope(config, 256, "longrope")
    assert RopeScaling.from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling
    snapshot = current_rope(config)
    config.rope_parameters["rope_theta"] = 1.0
    assert snapshot.parameters["rope_theta"] == 10000.0


def test_failed_apply_leaves_the_model_alone():
    model = build(LlamaForCausalLM, llama())
    base, before = current_rope(model.config), buffers(model)
    broken = RopeScaling({"rope_type": "nonsense", "rope_theta": 1.0}, 128)
    with pytest.raises(ValueError, match="can't be put on"):
        apply_rope(model, broken)
    assert current_rope(model.config) == base
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())


def test_apply_keeps_hooks_and_device_and_shared_config():
    model = build(LlamaForCausalLM, llama())
    rotary, calls = model.model.rotary_emb, []
    rotary.register_forward_hook(lambda *_: calls.append(1))
    apply_rope(model, scaled_rope(model.config, 256))
    assert model.model.rotary_emb is rotary
    assert rotary.config is model.config
    model(torch.ones(1, 4, dtype=torch.long))
    assert calls
