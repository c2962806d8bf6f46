"""Every family that the README lists, as a tiny random model: attention, generation, RoPE, adapter and merge."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longlora import LongLoraConfig, S2AttentionConfig, s2_attention_mode, set_s2_attention
from hf_longlora.attention import Documents

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# what is special in a family's configuration, and the RoPE type that it is extended with
FAMILIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": ({}, "llama3"),
    "mistral": ({"sliding_window": None}, "yarn"),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, "yarn"),
    "qwen2": ({}, "yarn"),
    "qwen3": ({"head_dim": 8}, "yarn"),
    "qwen3_moe": ({"head_dim": 8, **MIXTURE}, "yarn"),
    "gemma": ({"head_dim": 8}, "linear"),
    "gemma3_text": ({"head_dim": 8, "query_pre_attn_scalar": 8, **HALF_SLIDING}, "linear"),
    "phi": ({}, "linear"),
    "phi3": ({}, "longrope"),
    "olmo2": ({}, "linear"),
    "olmo3": (HALF_SLIDING, "yarn"),
    "granite": ({}, "dynamic"),
    "smollm3": (
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "no_rope_layers": [1, 0]},
        "yarn",
    ),
    "gpt_neox": ({}, "linear"),
    "starcoder2": ({"sliding_window": None}, "linear"),
    "stablelm": ({}, "linear"),
    "cohere": ({}, "linear"),
    "cohere2": (HALF_SLIDING, "linear"),
    "glm": ({"head_dim": 8}, "linear"),
    "glm4": ({"head_dim": 8}, "linear"),
    "nemotron": ({}, "linear"),
    "persimmon": ({}, "linear"),
    "helium": ({"head_dim": 8}, "linear"),
    "llama4_text": (
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 0],
        },
        "llama3",
    ),
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
        "linear",
    ),
    "qwen3_next": (
        {
            "head_dim": 8,
            **MIXTURE,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "yarn",
    ),
    "jamba": (
        {
            "num_experts": 2,
            "expert_layer_period": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "use_mamba_kernels": False,
        },
        None,
    ),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}, None),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0}, None),
}
GPT2_NAMES = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
}
GROUP = 8


def build(family):
    """The same random model at each call."""
    special, _ = FAMILIES[family]
    common = dict(COMMON)
    if family == "gpt2":
        common = {k: v for k, v in COMMON.items() if k not in GPT2_NAMES} | {"attn_pdrop": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common | special)).eval()


def logits(model, input_ids, **kwargs):
    return model(input_ids=input_ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_attention(family, monkeypatch):
    """Evaluation and generation equal sdpa's; training equals the dense-mask reference; dense training sdpa's."""
    sdpa = build(family)
    s2, reference = copy.deepcopy(sdpa), copy.deepcopy(sdpa)
    set_s2_attention(s2, S2AttentionConfig(group_size=GROUP))
    set_s2_attention(reference, S2AttentionConfig(group_size=GROUP, kernel="reference"))
    x = torch.randint(3, 128, (2, 40))
    mask = torch.ones_like(x)
    mask[1, :7] = 0
    real = mask.bool()
    with torch.no_grad():
        expected = logits(sdpa, x, attention_mask=mask)
        assert torch.equal(logits(s2, x, attention_mask=mask)[real], expected[real])
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(s2.generate(x, **options), sdpa.generate(x, **options))

    sparse_layers = []
    parts = Documents.parts

    def record(documents, heads, kv_heads, group_size, *args):
        sparse_layers.append(group_size)
        return parts(documents, heads, kv_heads, group_size, *args)

    monkeypatch.setattr(Documents, "parts", record)
    trained, by_reference = (logits(model.train(), x, attention_mask=mask) for model in (s2, reference))
    full = [kind for kind in getattr(sdpa.config, "layer_types", None) or [] if kind == "full_attention"]
    hybrid = 1 if family == "jamba" else 2
    assert sparse_layers == [GROUP] * 2 * (len(full) or hybrid)
    assert torch.allclose(trained[real], by_reference[real], atol=1e-6)
    assert not torch.allclose(trained[real], expected[real], atol=1e-3)
    trained.sum().backward()
    assert all(p.grad.isfinite().all() for p in s2.parameters() if p.grad is not None)
    with s2_attention_mode(s2, "dense"):
        dense = logits(s2, x, attention_mask=mask)[real]
    assert torch.allclose(dense, logits(sdpa.train(), x, attention_mask=mask)[real], atol=1e-6)


@pytest.mark.parametrize("family", [family for family, (_, rope) in FAMILIES.items() if rope])
def test_extension(family, tmp_path):
    """An adapter with longer RoPE comes back from its file, and merged from a plain model's."""
    model = get_peft_model(build(family), LongLoraConfig(r=4, target_length=512, rope_type=FAMILIES[family][1]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ("lora_A", "norm", "embed"):
        assert any(part in name for name in trained), part
    x = torch.randint(3, 128, (1, 100))
    with torch.no_grad():
        expected = logits(model.eval(), x)
        assert not torch.allclose(expected, logits(build(family), x), atol=1e-2)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(build(family), str(tmp_path / "adapter")).eval()
        assert torch.allclose(logits(loaded, x), expected, atol=1e-6)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(logits(merged, x), expected, atol=2e-6)


@pytest.mark.parametrize("family", [family for family, (_, rope) in FAMILIES.items() if rope is None])
def test_no_rope_to_scale(family):
    with pytest.raises(ValueError, match="has no RoPE"):
        get_peft_model(build(family), LongLoraConfig(r=4, target_length=512))
    get_peft_model(build(family), LongLoraConfig(r=4))


GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OUTSIDE: dict[str, dict[str, Any]] = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gptj": {**GPT_LIKE, "rotary_dim": 4},
    "codegen": {**GPT_LIKE, "rotary_dim": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
}


@pytest.mark.parametrize("family", OUTSIDE)
def test_families_outside_the_interface_are_refused(family):
    config = AutoConfig.for_model(family, vocab_size=128, bos_token_id=1, eos_token_id=2, **OUTSIDE[family])
    model = AutoModelForCausalLM.from_config(config)
    if family in ("gptj", "codegen") and type(model)._can_set_attn_implementation():
        pytest.skip("since transformers 5.24 it goes through the interface")
    with pytest.raises(ValueError, match="does not call its attention through"):
        set_s2_attention(model)


@pytest.mark.parametrize(
    ("family", "special", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 8}, "softcap"),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "sinks"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_dense_sdpa_would_drop_is_refused(family, special, message, training):
    config = AutoConfig.for_model(family, **COMMON | {"head_dim": 8} | HALF_SLIDING | special)
    model = AutoModelForCausalLM.from_config(config).train(training)
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.randint(3, 128, (1, 40)))
