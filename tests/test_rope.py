"""RoPE scaling: what is written, what transformers and vLLM derive from it, and what it does to a live model."""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_longlora import rope
from hf_longlora.rope import (
    ROPE_TYPES,
    RopeScaling,
    apply_rope,
    current_rope,
    forget_lengths,
    reach,
    rope_factor,
    scaled_rope,
    vllm_overrides,
    write_length,
    write_rope,
)

from . import vllm_rules

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
    "phi3": (Phi3ForCausalLM, lambda: Phi3Config(**SHAPE, num_key_value_heads=2), ("longrope", "abf")),
    "gemma3": (Gemma3ForCausalLM, gemma3, ("linear", "yarn", "llama3", "longrope", "abf")),  # nested by layer type
}
CASES = [(name, rope_type) for name, (_, _, types) in MODELS.items() for rope_type in types]


def frequencies(rope_type, config, length, layer_type=None):
    """What transformers computes from a config at a length, and its attention factor."""
    if rope_type == "abf":
        parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        dim = rope.scale._rotary_dim(config, parameters)
        return parameters["rope_theta"] ** -(torch.arange(0, dim, 2) / dim), 1.0
    layer = {} if layer_type is None else {"layer_type": layer_type}
    return ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=length, **layer)


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
    assert rope_factor(scaling, base) == 4.0
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


# -- what readers of the saved files derive --------------------------------------------------------------------------

THETA = {"rope_theta": 10000.0}
SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "beta_fast": 16.0, "attention_factor": 1.25, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i / 4 for i in range(8)],
        "attention_factor": 1.5,
        "original_max_position_embeddings": 64,
    },
}


def scaled_llama(kind):
    """A base that reaches 128 tokens by a RoPE type of its own, as its publisher would have written it."""
    longest = 64 if kind in ("linear", "dynamic") else 128
    said = {"original_max_position_embeddings": 64} if kind == "linear" else {}
    return llama(max_position_embeddings=longest, rope_parameters={**THETA, "rope_type": kind, **SCALED[kind]}, **said)


def cohere():
    from transformers import CohereConfig

    return CohereConfig(**SHAPE, num_key_value_heads=2, model_max_length=128)


def deepseek():
    yarn = {**THETA, "rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    return DeepseekV3Config(
        **{**SHAPE, "max_position_embeddings": 128},
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        rope_parameters={**yarn, "original_max_position_embeddings": 64},
    )


def olmo3():
    from transformers import Olmo3Config

    layers = ["sliding_attention", "full_attention"]
    return Olmo3Config(**SHAPE, num_key_value_heads=2, sliding_window=16, layer_types=layers)


def phi3(longest, original=None, **rope):
    lengths = {**SHAPE, "max_position_embeddings": longest}
    if original is not None:
        lengths["original_max_position_embeddings"] = original
    if rope:
        lengths["rope_parameters"] = {**THETA, **rope}
    return Phi3Config(**lengths, num_key_value_heads=2)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i / 4 for i in range(8)]}
MINI = {"partial_rotary_factor": 0.75, "short_factor": [1.0] * 6, "long_factor": [1.0 + i / 4 for i in range(6)]}
STRETCHED = {  # as published
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# name: config, original length, types
READ: dict[str, tuple] = {
    "llama": (llama, 64, ROPE_TYPES),
    "gpt_neox": (lambda: GPTNeoXConfig(**SHAPE | {"hidden_size": 128}), 64, ROPE_TYPES),  # a quarter of the head
    "gemma3": (gemma3, 64, ("linear", "yarn", "llama3", "longrope", "abf")),  # nested, counts its factor
    "gemma3 scaled": (lambda: gemma3(max_position_embeddings=256, rope_parameters=STRETCHED), 32, ("linear",)),
    "olmo3": (olmo3, 64, ("yarn", "llama3", "longrope", "abf")),  # nested
    "cohere": (cohere, 128, ROPE_TYPES),  # vLLM reads its model_max_length first
    "deepseek_v3": (deepseek, 64, ("yarn",)),
    # The class's default original length is 4,096, whatever the model's: a model that is not scaled has its own.
    "phi3": (lambda: phi3(64), 64, ("longrope", "abf")),
    "phi3 scaled": (lambda: phi3(128, 64, **LONG), 64, ("longrope",)),
    "phi4 mini": (lambda: phi3(128, 64, **LONG | MINI), 64, ("longrope",)),  # three quarters of the head
    **{f"llama with {kind}": (lambda kind=kind: scaled_llama(kind), 64, (kind,)) for kind in SCALED},
}


def assert_served_alike(served, rope_type, target, inv_freq, attention_factor, rtol):
    alike = torch.allclose(inv_freq, served.inv_freq, rtol=rtol) and served.positions >= target
    assert alike == (rope_type != "dynamic")  # which vLLM takes the length of, and doesn't scale
    assert attention_factor == pytest.approx(served.attention_factor)


@pytest.mark.parametrize(("name", "rope_type"), [(n, t) for n, (_, _, types) in READ.items() for t in types])
@pytest.mark.parametrize("in_steps", [False, True])
def test_transformers_and_vllm_derive_the_same_from_the_saved_file(name, rope_type, in_steps, tmp_path):
    make, original, _ = READ[name]
    config, target = make(), 1000
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    base = current_rope(config)
    assert reach(base)[0] == original
    if in_steps:
        apply_rope(model, scaled_rope(model.config, 512, rope_type))
    scaling = scaled_rope(model.config, target, rope_type)
    apply_rope(model, scaling)
    # What a larger theta has reached is all that it says; beside its base it says its factor.
    assert reach(scaling) == (target if rope_type == "abf" else original, target)
    assert rope_factor(scaling, base) == pytest.approx(target / original)
    model.config.save_pretrained(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)
    served = vllm_rules.served(config)
    assert served.longest == target
    assert served.default_length == (original if rope_type == "longrope" and name.startswith("phi") else target)
    parameters = vllm_rules.is_nested(config.rope_parameters)
    layer = {"layer_type": "full_attention"} if parameters else {}
    inv_freq, attention_factor = frequencies(rope_type, config, target, **layer)
    assert_served_alike(served, rope_type, target, inv_freq, attention_factor, rtol=1e-5)
    # the live model, at the length it was made for, is what the file says
    rotary = rope.rotary_modules(model)[0]
    cos, _ = rotary(torch.zeros(1, 1), torch.arange(target)[None], **layer)
    half = inv_freq * torch.arange(target)[:, None]
    first = cos[0, :, ::2] if name == "cohere" else cos[0, :, : half.shape[1]]  # interleaved there
    assert torch.allclose(first, half.cos() * attention_factor, atol=1e-3)
    if parameters:
        sliding = vllm_rules.served(config, "sliding_attention")
        assert sliding.positions >= target
        assert config.rope_parameters["sliding_attention"] == base.rope_parameters["sliding_attention"]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere", "llama with dynamic"])
def test_vllm_has_the_frequencies_of_dynamic_rope_by_overrides(name, tmp_path):
    config, target = READ[name][0](), 1000
    scaling = scaled_rope(config, target, "dynamic")
    rope.write_rope(config, scaling)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=target)
    overrides = vllm_overrides(config, scaling)
    assert current_rope(config) == scaling
    config.update(overrides)
    served = vllm_rules.served(config)
    assert served.default_length == served.longest == target
    assert_served_alike(served, "default", target, inv_freq, attention_factor, rtol=1e-5)
    assert vllm_overrides(config, current_rope(config)) is None


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_readers_agree_at_any_length_width_and_base(rope_type, tmp_path):
    """Also where a factor is no round number: not a token short, in vLLM's whole numbers."""
    draw = random.Random(0)
    for case in range(40):
        original = draw.choice([64, 100, 2048, 3000, 4096, 8191, 8192])
        target = draw.randint(original + 1, 64 * original)
        if case == 0:
            original, target = 100, 113  # 100 * (113 / 100) is 112.999...
        theta = draw.choice([1e4, 5e5, 1e6])
        part = draw.choice([0.25, 0.5, 1.0])
        config = llama(
            head_dim=draw.choice([32, 64, 128]),
            max_position_embeddings=original,
            rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": part},
        )
        scaling = scaled_rope(config, target, rope_type)
        config.rope_parameters = scaling.rope_parameters
        config.max_position_embeddings = scaling.max_position_embeddings
        config.save_pretrained(tmp_path / str(case))
        config = AutoConfig.from_pretrained(tmp_path / str(case))
        served = vllm_rules.served(config)
        assert served.longest == target, (original, target)
        inv_freq, attention_factor = frequencies(rope_type, config, target)
        assert_served_alike(served, rope_type, target, inv_freq, attention_factor, rtol=1e-4)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_frequencies_are_those_of_the_formula(rope_type):
    """Against the closed forms, at the two ends: the fastest pair of dimensions and the slowest."""
    config = llama(head_dim=32)
    factor, half = 16.0, 16
    model = LlamaForCausalLM(config)
    apply_rope(model, scaled_rope(config, int(64 * factor), rope_type))
    inv_freq, _ = frequencies(rope_type, model.config, 1024)
    if rope_type not in rope.WITH_HISTORY:
        assert torch.allclose(model.model.rotary_emb.inv_freq, inv_freq)
    fast, slow = 1.0, 10000.0 ** (-2 * (half - 1) / 32)
    expected = {
        "linear": (fast / factor, slow / factor),
        # NTK: the slowest dimension is what it would be interpolated by factor^2 - factor + 1
        "dynamic": (fast, (10000.0 * (factor * factor - (factor - 1)) ** (32 / 30)) ** (-2 * (half - 1) / 32)),
        "abf": (fast, (10000.0 * factor**1.5) ** (-2 * (half - 1) / 32)),
    }
    for value, wanted in zip((inv_freq[0], inv_freq[-1]), expected.get(rope_type, (fast, slow / factor)), strict=True):
        assert value.item() == pytest.approx(wanted, rel=1e-4)


def test_a_softmax_scale_made_of_rope_follows_it(tmp_path):
    """DeepSeek folds mscale_all_dim into its attention when it is built."""
    model = build(DeepseekV3ForCausalLM, deepseek())
    attention = model.model.layers[0].self_attn
    base, before = current_rope(model.config), attention.scaling
    ids = torch.randint(3, 128, (1, 100))
    with torch.no_grad():
        plain = model(ids).logits
        apply_rope(model, scaled_rope(model.config, 1024))
        assert attention.scaling == pytest.approx(24**-0.5 * (0.1 * math.log(16) + 1) ** 2)
        extended = model(ids).logits
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(reloaded(ids).logits, extended)
        apply_rope(model, base)
        assert attention.scaling == before
        assert torch.equal(model(ids).logits, plain)


def test_what_vllm_would_serve_as_another_type_is_refused():
    with pytest.raises(ValueError, match="latent attention"):
        config = deepseek()
        config.rope_parameters = {**THETA, "rope_type": "default"}
        scaled_rope(config, 1024, "llama3")
    axes = llama(rope_parameters={**THETA, "rope_type": "default", "mrope_section": [2, 3, 3]})
    for kind in ROPE_TYPES:
        if kind not in ("yarn", "abf"):
            with pytest.raises(ValueError, match="mrope_section"):
                scaled_rope(axes, 256, kind)
    assert scaled_rope(axes, 256).parameters["mrope_section"] == [2, 3, 3]
    assert scaled_rope(axes, 256, "abf").parameters["mrope_section"] == [2, 3, 3]
    explicit = scaled_rope(axes, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert explicit.parameters["mrope_section"] == [2, 3, 3]
    for kind in ("linear", "dynamic"):
        with pytest.raises(ValueError, match="sliding layers"):
            scaled_rope(olmo3(), 1024, kind)
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    with pytest.raises(ValueError, match="attention_factor"):
        scaled_rope(llama(), 256, rope_parameters={**long, "attention_factor": 1.1})
    with pytest.raises(ValueError, match="longrope's factor"):
        scaled_rope(llama(), 256, rope_parameters={**long, "factor": 8.0})


def test_bases_that_no_factor_extends_are_refused():
    with pytest.raises(ValueError, match="proportional"):
        scaled_rope(llama(rope_parameters={**THETA, "rope_type": "proportional", "partial_rotary_factor": 0.5}), 256)
    fixed = {**THETA, "rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}
    with pytest.raises(ValueError, match="alpha"):
        scaled_rope(llama(rope_parameters=fixed), 256, "dynamic")


def test_another_type_over_a_scaled_base_is_said(caplog):
    with caplog.at_level("WARNING", logger=rope.scale.logger.name):
        scaled_rope(scaled_llama("llama3"), 512, rope_parameters={"rope_type": "linear", "factor": 8.0})
    assert "in the place of the base's 'llama3'" in caplog.text


def test_old_attention_factors_do_not_outlive_their_length():
    for kind in ("yarn", "longrope"):
        assert "attention_factor" not in scaled_rope(scaled_llama(kind), 512).parameters


def test_command_r_is_as_long_as_it_says():
    config = cohere()
    assert reach(current_rope(config)) == (128, 128)
    model = build(CohereForCausalLM, config)
    base = current_rope(model.config)
    apply_rope(model, scaled_rope(model.config, 512, "llama3"))
    assert (model.config.max_position_embeddings, model.config.model_max_length) == (512, 512)
    apply_rope(model, base)
    assert (model.config.max_position_embeddings, model.config.model_max_length) == (64, 128)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("length", [4096, 8192])
def test_stages_compose_exactly(rope_type, length):
    config = llama(max_position_embeddings=length)
    at_once = scaled_rope(config, length * 16, rope_type)
    model = LlamaForCausalLM(config)
    apply_rope(model, scaled_rope(config, length * 8, rope_type))
    in_steps = scaled_rope(model.config, length * 16, rope_type)
    assert rope_factor(in_steps, current_rope(llama(max_position_embeddings=length))) == 16.0
    if rope_type in ("longrope", "abf"):  # to rounding
        assert in_steps.max_position_embeddings == at_once.max_position_embeddings
        assert in_steps.parameters.keys() == at_once.parameters.keys()
        for key, value in at_once.parameters.items():
            assert in_steps.parameters[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12))
    else:
        assert in_steps == at_once


def test_cumulative_factor_of_a_scaled_base():
    theta = {"rope_theta": 10000.0}
    config = llama(max_position_embeddings=4096, rope_parameters={**theta, "rope_type": "linear", "factor": 8.0})
    assert reach(current_rope(config)) == (4096, 32768)
    scaling = scaled_rope(config, 65536, base_length=4096)
    assert scaling.parameters["factor"] == 16.0
    assert scaling.max_position_embeddings == 4096


# name: what the config says beside a factor of 4 and 16,384 positions, original length, reached
EVIDENCE = {
    "of the original": ({"original_max_position_embeddings": 16384}, 16384, 65536),
    "of the extended": ({"original_max_position_embeddings": 4096}, 4096, 16384),
    "among the parameters": ({"rope_parameters": {"original_max_position_embeddings": 4096}}, 4096, 16384),
    "as Vicuna": ({"max_sequence_length": 65536}, 16384, 65536),
}


def linear16k(**said):
    parameters = {**THETA, "rope_type": "linear", "factor": 4.0, **said.pop("rope_parameters", {})}
    return llama(max_position_embeddings=16384, rope_parameters=parameters, **said)


@pytest.mark.parametrize(("said", "original", "reached"), EVIDENCE.values(), ids=EVIDENCE)
def test_whether_a_linear_config_counts_its_factor_is_read_where_it_is_said(said, original, reached, tmp_path):
    config = linear16k(**said)
    assert rope.readings(config) == [(original, reached)]
    assert rope.native_window(config) == original
    scaling = scaled_rope(config, 131072)
    assert scaling.parameters["factor"] == 131072 / original
    assert scaling.max_position_embeddings == original  # as vLLM takes it
    rope.write_rope(config, scaling)
    config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert rope.readings(config) == [(original, 131072)]  # what is written here is said, too
    assert vllm_rules.served(config).longest == 131072


def test_whether_a_linear_config_counts_its_factor_is_asked_where_it_is_not_said():
    config = linear16k()
    assert rope.readings(config) == [(16384, 65536), (4096, 16384)]
    assert rope.native_window(config) is None
    both = (
        r"65,536 tokens, from originally 16,384, or 16,384 tokens, from originally 4,096.*base_length=16384 or .*4096"
    )
    for asked in ({}, {"rope_type": "linear"}, {"rope_parameters": {"rope_type": "linear", "factor": 32.0}}):
        with pytest.raises(ValueError, match=both):
            scaled_rope(config, 131072, **asked)
    assert scaled_rope(config, 131072, base_length=4096).parameters["factor"] == 32.0
    assert scaled_rope(config, 131072, base_length=16384).parameters["factor"] == 8.0
    with pytest.raises(ValueError, match="reaches 65536 tokens already"):
        scaled_rope(config, 65536, base_length=16384)
    assert scaled_rope(config, 65536, base_length=4096).parameters["factor"] == 16.0
    explicit = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
    assert scaled_rope(config, 131072, rope_parameters=explicit).parameters["factor"] == 32.0


def test_the_original_length_that_is_written_goes_with_the_rope():
    model = build(LlamaForCausalLM, llama())
    base = current_rope(model.config)
    apply_rope(model, scaled_rope(model.config, 256, "linear"))
    assert model.config.original_max_position_embeddings == 64
    apply_rope(model, base)
    assert not hasattr(model.config, "original_max_position_embeddings")
    assert current_rope(model.config) == base


def test_longrope_s_end_depends_on_the_target_alone():
    """Direct, by steps, and from divisors of the base's own, which are kept in proportion."""
    config = llama(head_dim=8)

    def divisors(*targets):
        scaling = None
        for target in targets:
            scaling = scaled_rope(config, target, "longrope", base=scaling)
        return scaling.parameters["long_factor"]

    assert divisors(512) == pytest.approx([1.0, 16 / 9, 8.0, 8.0])
    assert divisors(256, 512) == pytest.approx(divisors(512), rel=1e-12)
    assert divisors(100, 200, 300, 512) == pytest.approx(divisors(512), rel=1e-12)
    own = RopeScaling({**THETA, "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64,
                       "short_factor": [1.0] * 4, "long_factor": [1.0, 1.1, 1.5, 2.5]}, 128)  # fmt: skip
    at_once = scaled_rope(config, 1024, base=own).parameters["long_factor"]
    in_steps = scaled_rope(config, 1024, base=scaled_rope(config, 256, base=own)).parameters["long_factor"]
    assert in_steps == pytest.approx(at_once, rel=1e-12)
    assert at_once[0] == 1.0 and at_once[-1] == pytest.approx(2.5 * 8)


def test_a_larger_theta():
    scaling = scaled_rope(llama(), 512, "abf")
    assert scaling.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(10000.0 * 8**1.5)}
    assert scaling.max_position_embeddings == 512 and scaling.original_max_position_embeddings is None
    assert rope.type_over(scaling, current_rope(llama())) == "abf"
    assert rope.type_over(current_rope(llama()), current_rope(llama())) == "default"
    # A base that was trained at less than its config says: in steps, too, each of which starts at what is reached.
    half = scaled_rope(llama(), 256, "abf", base_length=32)
    assert half.parameters["rope_theta"] == pytest.approx(10000.0 * 8**1.5)
    assert reach(half) == (256, 256)
    config = llama()
    rope.write_rope(config, half)
    again = scaled_rope(config, 512, "abf")
    direct = scaled_rope(llama(), 512, "abf", base_length=32)
    assert again.parameters["rope_theta"] == pytest.approx(direct.parameters["rope_theta"], rel=1e-12)
    assert rope_factor(direct, current_rope(llama()), 32) == 16.0
    with pytest.raises(ValueError, match="reaches 64 tokens already"):
        scaled_rope(llama(), 64, "abf")


def test_a_larger_theta_of_one_s_own():
    own = {"rope_type": "default", "rope_theta": 5e5}
    scaling = scaled_rope(llama(), 512, rope_parameters=own)
    assert scaling.parameters == own and reach(scaling) == (512, 512)
    assert rope.type_over(scaling, current_rope(llama())) == "abf"
    with pytest.raises(ValueError, match=r'pass rope_type=.abf. alone.*"rope_type": "default"'):
        scaled_rope(llama(), 512, rope_parameters={"rope_type": "abf"})


@pytest.mark.parametrize("kind", SCALED)
def test_a_larger_theta_is_for_bases_that_are_not_scaled(kind):
    with pytest.raises(ValueError, match=f'Pass rope_type="{kind}"'):
        scaled_rope(scaled_llama(kind), 512, "abf")


def test_a_larger_theta_is_that_of_the_global_layers_and_of_the_part_that_turns():
    scaling = scaled_rope(gemma3(), 256, "abf")
    assert scaling.rope_parameters["sliding_attention"] == gemma3().rope_parameters["sliding_attention"]
    before = gemma3().rope_parameters["full_attention"]["rope_theta"]
    assert scaling.parameters["rope_theta"] == pytest.approx(before * 8)
    part = scaled_rope(GPTNeoXConfig(**SHAPE), 256, "abf")
    assert part.parameters["partial_rotary_factor"] == 0.25
    # Latent attention takes the default type as it is, and so do its readers.
    latent = deepseek()
    latent.rope_parameters = {**THETA, "rope_type": "default"}
    rope.write_rope(latent, scaled_rope(latent, 1024, "abf"))
    served = vllm_rules.served(latent)
    assert served.positions == served.longest == 1024
    inv_freq = (10000.0 * 8**1.5) ** -(torch.arange(0, 16, 2) / 16)
    assert_served_alike(served, "abf", 1024, inv_freq, 1.0, rtol=1e-5)


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
    scaling = scaled_rope(config, 256, "yarn")
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


def test_auto_is_a_larger_theta_or_the_type_the_base_has():
    assert scaled_rope(llama(), 256) == scaled_rope(llama(), 256, "abf")
    assert rope.type_over(scaled_rope(llama(), 256), current_rope(llama())) == "abf"
    for kind in SCALED:
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


def test_apply_that_fails_late_gives_back_what_it_has_changed(monkeypatch):
    model = build(DeepseekV3ForCausalLM, deepseek())
    base, before = current_rope(model.config), buffers(model)
    attention = [layer.self_attn for layer in model.model.layers]
    scales, rescale, calls = [module.scaling for module in attention], rope.live._rescale_softmax, []

    def fails_at_the_second(module):
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        rescale(module)

    monkeypatch.setattr(rope.live, "_rescale_softmax", fails_at_the_second)
    scaling = scaled_rope(model.config, 1024)
    with pytest.raises(ValueError, match="can't be put on DeepseekV3ForCausalLM: no memory"):
        apply_rope(model, scaling)
    assert current_rope(model.config) == base and [module.scaling for module in attention] == scales
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())
    apply_rope(model, scaling)
    assert all(module.scaling != scale for module, scale in zip(attention, scales, strict=True))
    assert not torch.equal(buffers(model)["model.rotary_emb.inv_freq"], before["model.rotary_emb.inv_freq"])


def test_apply_keeps_hooks_and_device_and_shared_config():
    model = build(LlamaForCausalLM, llama())
    rotary, calls = model.model.rotary_emb, []
    rotary.register_forward_hook(lambda *_: calls.append(1))
    apply_rope(model, scaled_rope(model.config, 256))
    assert model.model.rotary_emb is rotary
    assert rotary.config is model.config
    model(torch.ones(1, 4, dtype=torch.long))
    assert calls


def test_a_tokenizer_takes_texts_as_long_as_the_model_and_no_shorter_ones_than_before():
    scaling = scaled_rope(llama(), 256)
    for own, expected in ((64, 256), (256, 256), (10**9, 10**9)):
        tokenizer = SimpleNamespace(model_max_length=own)
        write_length(tokenizer, scaling)
        assert tokenizer.model_max_length == expected
        processor = SimpleNamespace(tokenizer=SimpleNamespace(model_max_length=own))
        write_length(processor, scaling)
        assert processor.tokenizer.model_max_length == expected
    write_length(None, scaling)  # a trainer without one


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "yarn"])
def test_lengths_that_were_seen_are_forgotten(rope_type):
    model = build(LlamaForCausalLM, llama())
    apply_rope(model, scaled_rope(model.config, 256, rope_type))
    before = buffers(model)
    model(torch.ones(1, 200, dtype=torch.long))
    assert any(not torch.equal(x, before[key]) for key, x in buffers(model).items()) == (
        rope_type in rope.WITH_HISTORY
    )
    forget_lengths(model)
    assert buffers(model).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())
    forget_lengths(torch.nn.Linear(1, 1))  # nothing that has a RoPE


def test_generation_goes_as_far_as_the_model():
    for own, expected in ((64, 256), (63, 63), (None, None)):
        model = build(LlamaForCausalLM, llama())
        model.generation_config.max_length = own
        base = current_rope(model.config)
        apply_rope(model, scaled_rope(model.config, 256))
        assert model.generation_config.max_length == expected
        apply_rope(model, base)
        assert model.generation_config.max_length == own


@pytest.mark.parametrize(("theta", "original"), [(10_000.0, 4096), (500_000.0, 8192)])
def test_longrope_s_long_factors_are_yarn_s_ramp(theta, original):
    """At widths that people train; where few dimensions are kept, the ramp begins at the first."""
    shape = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": original}
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": theta})
    longrope, yarn = scaled_rope(config, 8 * original, "longrope"), scaled_rope(config, 8 * original, "yarn")
    plain = 1.0 / theta ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    write_rope(config, yarn)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    factors = torch.tensor(longrope.parameters["long_factor"], dtype=torch.float64)
    assert factors[0] == 1.0 and factors[-1] == 8.0 and ((factors > 1) & (factors < 8)).sum() > 5
    torch.testing.assert_close(plain / factors, expected.double(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("theta", "original"), [(10.0, 700), (10_000.0, 6), (10_000.0, 40)])
def test_longrope_s_ramp_at_its_edges_is_yarn_s(theta, original):
    """Where the slowest dimension turns more than once, and where the fastest turns less."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": original}
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": theta})
    longrope = scaled_rope(config, 8 * original, "longrope")
    plain = 1.0 / theta ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    write_rope(config, scaled_rope(config, 8 * original, "yarn"))
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    factors = torch.tensor(longrope.parameters["long_factor"], dtype=torch.float64)
    torch.testing.assert_close(plain / factors, expected.double(), rtol=1e-5, atol=0.0)


def test_settings_that_a_type_needs_and_a_base_has_not():
    assert scaled_rope(llama(), 256, "llama3").parameters == {
        **THETA,
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert scaled_rope(llama(), 256, "longrope").parameters["short_factor"] == [1.0] * 8
    nothing = llama(rope_parameters={**THETA, "rope_type": "default", "attention_factor": None})
    assert "attention_factor" not in scaled_rope(nothing, 256, "yarn").parameters


def test_where_the_original_length_is_written_beside():
    """It is evidence for a linear RoPE; dynamic RoPE's readers, and Gemma 3's, take it from elsewhere."""
    for config, kind, original in ((llama(), "linear", 64), (llama(), "dynamic", None), (gemma3(), "linear", None)):
        assert scaled_rope(config, 256, kind).original_max_position_embeddings == original


def test_explicit_parameters_of_layers_that_are_not_scaled_are_refused():
    config = gemma3()
    sliding, linear = config.rope_parameters["sliding_attention"], {"rope_type": "linear", "factor": 4.0}
    given = {"full_attention": linear, "sliding_attention": sliding}
    assert scaled_rope(config, rope_parameters=given) == scaled_rope(config, rope_parameters=linear)
    assert scaled_rope(config, rope_parameters={"full_attention": linear}) == scaled_rope(
        config, rope_parameters=linear
    )
    for wrong in ({**given, "sliding_attention": linear}, {"sliding_attention": sliding}, {**given, "more": linear}):
        with pytest.raises(ValueError, match="only 'full_attention' layers can be scaled"):
            scaled_rope(config, rope_parameters=wrong)


def test_explicit_parameters_are_held_to_what_a_base_takes():
    fixed = llama(rope_parameters={**THETA, "rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0})
    with pytest.raises(ValueError, match="alpha"):
        scaled_rope(fixed, 256, rope_parameters={"rope_type": "linear"})
    own = {"rope_type": "default", "rope_theta": 5e5}
    assert scaled_rope(fixed, 256, rope_parameters=own).parameters == own  # no scaling at all
    assert reach(scaled_rope(llama(), rope_parameters=own)) == (64, 64)
    short = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7}
    with pytest.raises(ValueError, match="longrope needs long_factor with 8 numbers, got 7"):
        scaled_rope(llama(), 256, rope_parameters=short)


def test_what_vllm_is_told_of_dynamic_rope_and_no_more():
    told = vllm_overrides(llama(), scaled_rope(llama(), 256, "dynamic"))
    assert sorted(told) == ["max_position_embeddings", "rope_parameters"] and told["max_position_embeddings"] == 256
    assert sorted(told["rope_parameters"]) == ["rope_theta", "rope_type"]


def test_what_a_config_must_say_of_its_rope():
    def config(parameters, **fields):
        return SimpleNamespace(
            **{"model_type": "other", "max_position_embeddings": 64, **fields}, rope_parameters=parameters
        )

    with pytest.raises(ValueError, match="'other' has RoPE and no `max_position_embeddings`"):
        current_rope(config({**THETA, "rope_type": "default"}, max_position_embeddings=None))
    with pytest.raises(ValueError, match="without a 'full_attention' entry"):
        current_rope(config({"sliding_attention": {**THETA, "rope_type": "default"}}))
    with pytest.raises(ValueError, match="no rope_theta"):  # a layer type without RoPE hides none behind it
        current_rope(config({"sliding_attention": None, "full_attention": {"rope_type": "default"}}))
    assert current_rope(config({**THETA, "type": "linear", "factor": 2.0})).rope_type == "linear"  # of before


def test_how_far_a_rope_reaches_where_little_is_said():
    def of(longest, **parameters):
        return RopeScaling({**THETA, **parameters}, longest)

    assert reach(of(128, rope_type="yarn", factor=4.0)) == (128, 512)
    assert reach(of(128, rope_type="yarn", factor=4.0, original_max_position_embeddings=64)) == (64, 256)
    assert reach(of(128, rope_type="yarn", original_max_position_embeddings=64)) == (64, 128)
    assert reach(of(128, rope_type="llama3", factor=4.0)) == (128, 128)
    assert reach(of(128, rope_type="llama3", factor=4.0, original_max_position_embeddings=64), 32) == (32, 128)
    for parameters in ({"factor": 1.0}, {"factor": None}, {}):  # a factor of 1 leaves nothing open
        scaling = of(128, rope_type="linear", **parameters)
        assert rope.readings(llama(), scaling) == [(128, 128)]


def test_factors_for_logs():
    base = current_rope(llama())
    assert rope_factor(base) == rope_factor(base, base) == 1.0
    larger = scaled_rope(llama(), 256, "abf")
    assert rope_factor(larger) == 1.0 and rope_factor(larger, base) == 4.0
    ramp = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    assert rope_factor(RopeScaling({**THETA, "rope_type": "longrope", **ramp}, 512)) == 8.0
    assert rope.type_over(RopeScaling({"rope_theta": 5e5, "rope_type": "yarn", "factor": 2.0}, 128), base) == "yarn"


def test_the_native_window_is_what_is_known_best():
    model = build(LlamaForCausalLM, llama())
    assert rope.native_window(model) == 64 and rope.native_window(model, 32) == 32
    setattr(model, rope.NATIVE_WINDOW, 48)
    assert rope.native_window(model) == 48 and rope.native_window(model, 32) == 32


def test_which_rotary_modules_are_the_language_model_s():
    """Those with its config or one of the same RoPE; towers for pictures and sound have others, or none."""
    model = build(LlamaForCausalLM, llama())
    rotary = model.model.rotary_emb
    rotary.config = copy.deepcopy(model.config)
    model.tower = type(rotary)(config=llama(rope_parameters={"rope_type": "default", "rope_theta": 777.0}))
    model.patches = torch.nn.Module()
    model.patches.register_buffer("inv_freq", torch.ones(4))
    assert rope.rotary_modules(model) == [rotary]
    rotary.config = model.config
    assert rope.rotary_modules(model) == [rotary]
    before = model.tower.inv_freq.clone()
    apply_rope(model, scaled_rope(model.config, 256))
    assert torch.equal(model.tower.inv_freq, before)
    del model.model.rotary_emb
    with pytest.raises(ValueError, match="LlamaForCausalLM has no rotary module"):
        apply_rope(model, scaled_rope(llama(), 256))


def test_a_model_that_generates_nothing_is_extended_too():
    model = LlamaModel(llama())
    assert getattr(model, "generation_config", None) is None
    apply_rope(model, scaled_rope(model.config, 256))
    assert current_rope(model.config).max_position_embeddings == 256


def test_head_widths_that_are_left_open_are_written_where_transformers_multiplies_by_them():
    for kind, written in (("yarn", 16), ("dynamic", 16), ("linear", None)):
        config = llama()
        config.head_dim = None
        write_rope(config, scaled_rope(config, 256, kind))
        assert config.head_dim == written
