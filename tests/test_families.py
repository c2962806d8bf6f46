"""Every family of `hf_longlora.families`, as a tiny random model: attention, generation, RoPE, adapter and merge."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from hf_longlora import LongLoraConfig, S2AttentionConfig, s2_attention_mode, set_s2_attention
from hf_longlora.attention import eager, interface, switch
from hf_longlora.families import FAMILIES, find_family
from hf_longlora.rope import ROPE_TYPES, apply_rope, current_rope, reach, scaled_rope, type_over

from .attention.oracle import oracle
from .tuner.helpers import nudge

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
HALF_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {  # multi-head latent attention: values are narrower than queries and keys
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
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4}
SHARED = {  # one block of attention and MLP, used after every other layer
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "mamba_d_state": 4,
    "mamba_d_conv": 2,
}
GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0}
# What is special in the configuration of a family, and how many of its layers are sparse.
TINY: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({}, 2),
    "llama4_text": (
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 0],
        },
        1,
    ),
    "mistral": ({"sliding_window": None}, 2),
    "ministral": ({"head_dim": 8, **HALF_SLIDING}, 1),
    "ministral3": (
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
            },
        },
        2,
    ),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, 2),
    "qwen2": ({}, 2),
    "qwen2_moe": ({**MIXTURE, "shared_expert_intermediate_size": 32}, 2),
    "qwen3": ({"head_dim": 8}, 2),
    "qwen3_moe": ({"head_dim": 8, **MIXTURE}, 2),
    "qwen3_next": ({"head_dim": 16, **MIXTURE, "shared_expert_intermediate_size": 32, **HALF_LINEAR}, 1),
    "qwen3_5_text": (
        {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
            **HALF_LINEAR,
        },
        1,
    ),
    "gemma": ({"head_dim": 8}, 2),
    "gemma2": ({"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, **HALF_SLIDING}, 1),
    "gemma3_text": ({"head_dim": 8, "query_pre_attn_scalar": 8, **HALF_SLIDING}, 1),
    "phi": ({}, 2),
    "phi3": ({}, 2),
    "olmo": ({}, 2),
    "olmo2": ({}, 2),
    "olmo3": (HALF_SLIDING, 1),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, 2),
    "granite": ({}, 2),
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 2),
    "granitemoehybrid": (
        {
            **MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
        },
        1,
    ),
    "smollm3": (
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "no_rope_layers": [1, 0]},
        2,
    ),
    "gpt_neox": ({"hidden_size": 64}, 2),  # rotates a quarter of the head
    "starcoder2": ({"sliding_window": None}, 2),
    "stablelm": ({"hidden_size": 64}, 2),
    "cohere": ({}, 2),
    "cohere2": (HALF_SLIDING, 1),
    "glm": ({"head_dim": 8}, 2),
    "glm4": ({"head_dim": 8}, 2),
    "glm4_moe": (
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
        2,
    ),
    "nemotron": ({}, 2),
    "persimmon": ({}, 2),
    "helium": ({"head_dim": 8}, 2),
    "exaone4": (HALF_SLIDING, 1),
    "seed_oss": ({"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0}, 2),
    "ernie4_5": ({"head_dim": 8}, 2),
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}, 2),
    "arcee": ({}, 2),
    "apertus": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 12e6,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        2,
    ),
    "deepseek_v3": (LATENT, 2),
    "gpt_oss": (
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
            **HALF_SLIDING,
        },
        1,
    ),
    "bamba": ({**MAMBA, "attn_layer_indices": [1], "mamba_chunk_size": 16}, 1),
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8}, 2),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, 1),
    "minimax": (
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 16,
        },
        1,
    ),
    "gpt2": (GPT_LIKE, 2),
    "gpt_bigcode": (GPT_LIKE, 2),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}, 2),
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
        1,
    ),
    "nemotron_h": (
        {
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 4,
            "n_groups": 1,
        },
        1,
    ),
}
GPT_NAMES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
# Families with softcap or sinks, which sdpa has not.
OWN_ATTENTION = {"gemma2", "gpt_oss"}
# Families of which a layer has a sliding window or chunks of 16 tokens, and does its attention block by block.
WINDOWED = [name for name, (special, _) in TINY.items() if "sliding_attention" in special.get("layer_types", ())]
CHUNKED = [name for name, (special, _) in TINY.items() if "attention_chunk_size" in special]
GROUP = 8

EVERY = [family.model_type for family in FAMILIES]
WITH_ROPE = [(family.model_type, kind) for family in FAMILIES for kind in family.rope_types]
# RoPE as most families have it: by an adapter's file each of them in one type, all types between them.
PLAIN = [family.model_type for family in FAMILIES if family.rope_types == ROPE_TYPES and family.model_type != "cohere"]
STORED = [(name, kind) for name, kind in WITH_ROPE if name not in PLAIN]
STORED += [(name, ROPE_TYPES[number % len(ROPE_TYPES)]) for number, name in enumerate(PLAIN)]
REFUSED = [(f.model_type, kind) for f in FAMILIES if f.rope_types for kind in ROPE_TYPES if kind not in f.rope_types]


def build(family):
    """The same random model at each call."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    special, _ = TINY[family]
    common = COMMON
    if "n_embd" in special:
        common = {k: v for k, v in COMMON.items() if k not in GPT_NAMES} | {"attn_pdrop": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **copy.deepcopy(common | special))).eval()


def logits(model, input_ids, **kwargs):
    return model(input_ids=input_ids, use_cache=False, **kwargs).logits


def config_of(family, **options):
    kernel = "reference" if family in OWN_ATTENTION else "auto"
    return S2AttentionConfig(group_size=GROUP, kernel=kernel, **options)


@pytest.mark.parametrize("family", EVERY)
def test_inference(family):
    """Evaluation and generation equal sdpa's, or the family's own where that has not what it needs."""
    stock = build(family)
    s2 = copy.deepcopy(stock)
    if family in OWN_ATTENTION:
        stock.set_attn_implementation("eager")
    set_s2_attention(s2, config_of(family))
    x = torch.randint(3, 128, (2, 40))
    mask = torch.ones_like(x)
    mask[1, :7] = 0
    real = mask.bool()
    same = partial(torch.allclose, atol=1e-6) if family in (*WINDOWED, *CHUNKED) else torch.equal
    with torch.no_grad():
        expected = logits(stock, x, attention_mask=mask)
        assert same(logits(s2, x, attention_mask=mask)[real], expected[real])
        assert same(logits(s2, x), logits(stock, x))
        for length in (16, 2, 1):
            assert torch.equal(logits(s2, x[:, :length]), logits(stock, x[:, :length]))
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False)
    expected = stock.generate(x, **options)
    assert torch.equal(s2.generate(x, **options), expected)
    assert torch.equal(s2.train().generate(x, **options), stock.train().generate(x, **options))


@pytest.mark.parametrize("family", EVERY)
def test_generation_in_training_mode_of_a_model_that_was_only_loaded_with_s2attn(family):
    """It is dense, to the logits, or refused; the same without a cache is sparse, or refused where that isn't told."""
    stock = build(family)
    s2 = copy.deepcopy(stock)
    s2.set_attn_implementation("s2attn")
    if family in OWN_ATTENTION:
        stock.set_attn_implementation("eager")
    x = torch.randint(3, 128, (1, 40))
    options = dict(max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
    stock, s2 = stock.train(), s2.train()
    if not find_family(s2.config).tells_cache:
        with pytest.raises(ValueError, match=r"set_s2_attention\(model\) first"):
            s2.generate(x, **options)
        return
    expected = torch.stack(stock.generate(x, **options).logits)
    assert torch.allclose(torch.stack(s2.generate(x, **options).logits), expected, atol=1e-5)
    if family not in OWN_ATTENTION:  # no kernel on a CPU
        with torch.no_grad():
            scores = logits(s2, x)
            assert not torch.allclose(scores, logits(stock, x), atol=1e-4)
        assert torch.allclose(scores, logits(s2, x), atol=1e-5)  # with gradients


@pytest.mark.parametrize("family", EVERY)
def test_training(family, monkeypatch):
    """Each layer and each gradient equal the dense mask's, on those layers that are sparse and on no others."""
    s2 = build(family)
    by_reference, stock = copy.deepcopy(s2), copy.deepcopy(s2)
    set_s2_attention(s2, config_of(family))
    set_s2_attention(by_reference, S2AttentionConfig(group_size=GROUP, kernel="reference"))
    x = torch.randint(3, 128, (2, 40))
    mask = torch.ones_like(x)
    mask[1, :7] = 0
    real = mask.bool()
    spans = [[(0, 40)], [(7, 40)]]
    select, calls = interface.select_kernel, []

    def compared(query, key, value, parts, *, kernel, **options):
        own = {name: options[name] for name in ("scale", "softcap", "learned_sinks") if name in options}
        leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
        out = kernel(*leaves, parts, **options)
        expected = oracle(*leaves, spans, GROUP, **own, sink_tokens=4).transpose(1, 2)
        assert torch.allclose(out, expected.float(), atol=1e-5)
        weights = torch.randn_like(out) * real[:, :, None, None]
        ours, theirs = (torch.autograd.grad((o * weights).sum(), leaves, retain_graph=True) for o in (out, expected))
        for mine, reference in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, reference, atol=1e-4)
        calls.append(query.shape)
        return kernel(query, key, value, parts, **options)

    monkeypatch.setattr(interface, "select_kernel", lambda *a, **k: partial(compared, kernel=select(*a, **k)))
    trained = logits(s2.train(), x, attention_mask=mask)
    assert len(calls) == TINY[family][1]
    monkeypatch.setattr(interface, "select_kernel", select)
    reference = logits(by_reference.train(), x, attention_mask=mask)
    assert torch.allclose(trained[real], reference[real], atol=1e-5)
    weights = torch.randn_like(trained) * real[:, :, None]
    for out in (trained, reference):
        (out * weights).sum().backward()
    for (name, ours), theirs in zip(s2.named_parameters(), by_reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3), name

    if family in OWN_ATTENTION:
        stock.set_attn_implementation("eager")
    dense_logits = logits(stock.train(), x, attention_mask=mask)[real]
    assert not torch.allclose(trained[real], dense_logits, atol=1e-3)
    with s2_attention_mode(s2, "dense"):
        assert torch.allclose(logits(s2, x, attention_mask=mask)[real], dense_logits, atol=1e-5)


@pytest.mark.parametrize(("family", "rope_type"), [case for case in WITH_ROPE if case not in STORED])
def test_rope_types(family, rope_type, tmp_path):
    """A longer RoPE on a model is what a model of its config has."""
    model, x = build(family), torch.randint(3, 128, (1, 100))
    before = current_rope(model.config)
    with torch.no_grad():
        for parameter in model.parameters():  # attention of small random weights sees no positions
            parameter.add_(torch.randn_like(parameter) * 0.2)
        plain = logits(model, x)
        apply_rope(model, scaled_rope(model.config, 4 * reach(model.config)[1], rope_type))
        assert type_over(current_rope(model.config), before) == rope_type
        expected = logits(model, x)
        assert not torch.allclose(expected, plain, atol=1e-3)
        model.config.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
        again.load_state_dict(model.state_dict())
        assert torch.allclose(logits(again, x), expected, atol=1e-6)


@pytest.mark.parametrize(("family", "rope_type"), STORED)
def test_extension(family, rope_type, tmp_path):
    """An adapter with longer RoPE comes back from its file, and merged from a plain model's."""
    base = build(family)
    target = 4 * reach(base.config)[1]
    before = current_rope(base.config)
    model = get_peft_model(base, LongLoraConfig(r=4, target_length=target, rope_type=rope_type))
    nudge(model, 0.05)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    norms = any("norm" in name for name, _ in build(family).named_parameters())  # OLMo's have no weights
    for part in ("lora_A", "embed", *["norm"] * norms):
        assert any(part in name for name in trained), part
    assert type_over(current_rope(model.config), before) == rope_type
    x = torch.randint(3, 128, (1, 100))
    with torch.no_grad():
        expected = logits(model.eval(), x)
        with model.disable_adapter():
            assert current_rope(model.config) == before
            assert torch.allclose(logits(model, x), logits(build(family), x), atol=1e-6)
        assert not torch.allclose(expected, logits(build(family), x), atol=1e-2)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(build(family), str(tmp_path / "adapter")).eval()
        assert torch.allclose(logits(loaded, x), expected, atol=1e-6)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(logits(merged, x), expected, atol=5e-6)


@pytest.mark.parametrize(("family", "rope_type"), REFUSED)
def test_rope_types_that_a_family_can_not_carry_are_refused(family, rope_type):
    model = build(family)
    target = 4 * reach(model.config)[1]
    with pytest.raises(ValueError, match=rope_type):
        get_peft_model(model, LongLoraConfig(r=4, target_length=target, rope_type=rope_type))


@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES if not family.rope_types])
def test_no_rope_to_scale(family, tmp_path):
    with pytest.raises(ValueError, match="has no RoPE"):
        get_peft_model(build(family), LongLoraConfig(r=4, target_length=512))
    model = get_peft_model(build(family), LongLoraConfig(r=4))
    nudge(model, 0.05)
    with torch.no_grad():
        x = torch.randint(3, 128, (1, 40))
        expected = logits(model.eval(), x)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(build(family), str(tmp_path / "adapter")).eval()
        assert torch.allclose(logits(loaded, x), expected, atol=1e-6)
        assert torch.allclose(logits(model.merge_and_unload(), x), expected, atol=5e-6)


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_readme_lists_the_table():
    readme = (Path(__file__).parent.parent / "README.md").read_text()

    def listed(start):
        row = next(line for line in readme.splitlines() if line.startswith(start))
        return {name.strip() for name in re.sub(r"\..*", "", row.split("|")[2]).replace("`", "").split(",")}

    # "ERNIE 4.5" and the like have a full stop inside
    readme = re.sub(r"(\d)\.(\d)", r"\1·\2", readme)
    names = {family.name.replace(".", "·"): family for family in FAMILIES}
    assert listed("| families:") == {name for name, family in names.items() if family.rope_types}
    assert listed("| families without RoPE") == {name for name, family in names.items() if not family.rope_types}


def test_each_family_of_the_table_is_tested_and_once():
    assert sorted(EVERY) == sorted(TINY)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


# -- special cases of a family -------------------------------------------------------------------------------------


def sparse_layers(model, monkeypatch, x, **kwargs):
    """How many layers of a training forward are sparse."""
    calls, select = [], interface.select_kernel
    monkeypatch.setattr(interface, "select_kernel", lambda *a, **k: calls.append(1) or select(*a, **k))
    logits(model.train(), x, **kwargs)
    monkeypatch.undo()
    return len(calls)


def test_a_window_in_every_layer_is_kept_and_said(monkeypatch, caplog):
    """Mistral 7B v0.1: nothing is left to be sparse. A window that no text fills (Phi-3's 128k models) is none."""
    x = torch.randint(3, 128, (1, 40))
    for window, sparse in ((16, 0), (64, 2)):
        config = AutoConfig.for_model("mistral", **COMMON | {"sliding_window": window})
        model = AutoModelForCausalLM.from_config(config)
        stock = copy.deepcopy(model)
        caplog.clear()
        with caplog.at_level("WARNING", logger=switch.logger.name):
            for size in (2 * GROUP, GROUP):
                set_s2_attention(model, S2AttentionConfig(group_size=size))
        assert caplog.text.count("every layer") == (sparse == 0)  # once, and not at each step of a run
        assert sparse_layers(model, monkeypatch, x) == sparse
        if not sparse:
            assert torch.allclose(logits(model, x), logits(stock.train(), x), atol=1e-6)


def test_own_attention_runs_in_blocks(monkeypatch):
    """Softcap and sinks over blocks of queries: the same numbers and gradients, one row of scores at a time."""
    for family in sorted(OWN_ATTENTION):
        whole, blocks = build(family).train(), build(family).train()
        x = torch.randint(3, 128, (2, 40))
        mask = torch.ones_like(x)
        mask[1, :7] = 0
        results = []
        for model, size in ((whole, 2**27), (blocks, 2 * 4 * 40 * 6)):
            monkeypatch.setattr(eager, "BLOCK_SCORES", size)
            set_s2_attention(model, config_of(family))
            with s2_attention_mode(model, "dense"):
                out = logits(model, x, attention_mask=mask)
            (out * mask[:, :, None]).square().sum().backward()
            results.append((out[mask.bool()], [p.grad for p in model.parameters()]))
        assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
        for ours, theirs in zip(results[0][1], results[1][1], strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(("size", "pieces"), [(3000, 15), (1280, 25), (12_800, 3), (32_000, 1)])
def test_scores_that_own_attention_holds(monkeypatch, size, pieces):
    """Pieces are whole rows, or queries of one row; where they are several, none keeps its scores for backward."""
    module, held, find = build("gemma2").model.layers[0].self_attn, [], eager.eager_function
    query, key, value = (torch.randn(5, heads, 40, 8, requires_grad=True) for heads in (4, 2, 2))

    def found(*args, **options):
        def function(module, query, key, *args, **options):
            held.append(query.shape[:3].numel() * key.shape[2])
            return find(module, softcap=True, sinks=False)(module, query, key, *args, **options)

        return function

    monkeypatch.setattr(eager, "eager_function", found)
    monkeypatch.setattr(eager, "BLOCK_SCORES", size)
    out = eager.eager_attention(module, query, key, value, None, causal=True, softcap=2.0)
    assert len(held) == pieces and max(held) <= size and out.shape == (5, 40, 4, 8)
    out.sum().backward()
    assert len(held) == pieces * (2 if pieces > 1 else 1)


@pytest.mark.parametrize("family", sorted(OWN_ATTENTION))
def test_own_attention_takes_a_mask_that_is_added(family):
    """A 4-D mask of one's own: of numbers to add to the scores, as of where keys are seen."""
    model, x = build(family), torch.randint(3, 128, (1, 12))
    set_s2_attention(model, config_of(family))
    seen = torch.ones(12, 12).tril().bool()
    seen[5:, 2] = False
    added = torch.zeros(12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)
    found = [
        logits(model, x, attention_mask=dict.fromkeys(("full_attention", "sliding_attention"), mask[None, None]))
        for mask in (seen, added)
    ]
    assert torch.allclose(*found, atol=1e-5) and not torch.allclose(found[0], logits(model, x), atol=1e-3)


def test_own_attention_that_is_not_causal_sees_both_ways():
    module = build("gemma2").model.layers[1].self_attn.eval()
    query, key = (torch.randn(1, heads, 12, 8) for heads in (4, 2))
    seen = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    found = [
        interface.s2_attention_forward(module, query, key, key, mask, is_causal=False, softcap=2.0)[0]
        for mask in (None, seen)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("family", sorted(OWN_ATTENTION))
def test_training_without_a_kernel_for_it_says_so(family):
    model = build(family).train()
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP, kernel="sdpa"))
    with pytest.raises(ValueError, match=r"'sdpa' lacks (softcap|learned attention sinks).*reference"):
        logits(model, torch.randint(3, 128, (1, 40)))


# -- what is refused, and before training starts where that can be known --------------------------------------------

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


def test_encoders_are_refused():
    from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertLMHeadModel(BertConfig(**shape, intermediate_size=32))
    with pytest.raises(ValueError, match="no causal attention"):
        set_s2_attention(bert)
    set_s2_attention(BertLMHeadModel(BertConfig(**shape, intermediate_size=32, is_decoder=True)))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32))
    with pytest.raises(ValueError, match="encoder-decoder"):
        set_s2_attention(t5)


def test_models_with_a_prefix_are_refused():
    """PaliGemma's picture and prompt see themselves both ways."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        text_config={**COMMON, "head_dim": 8, "model_type": "gemma"},
        vision_config={**vision, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"},
        image_token_id=5,
        projection_dim=32,
    )
    with pytest.raises(ValueError, match="both ways"):
        set_s2_attention(PaliGemmaForConditionalGeneration(config))


def test_families_that_work_on_the_mask_are_refused_in_the_first_step():
    if "doge" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no doge")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **COMMON)).train()
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    with pytest.raises((AttributeError, ValueError), match="works on the attention mask itself"):
        logits(model, torch.randint(3, 128, (1, 40)))


def test_masks_with_a_prefix_are_refused_in_the_first_step():
    """Of a causal model, only the batch tells."""
    model = build("llama").train()
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., :10, :10] = True
    with pytest.raises(ValueError, match=r'a prefix.*attn_implementation="sdpa"'):
        logits(model, torch.randint(3, 128, (1, 40)), attention_mask=mask)


# -- vision-language models: the text decoder works, whole ----------------------------------------------------------


def vision_language(name):
    """A tiny model, and a text with a picture in it."""
    import transformers

    text = {**COMMON, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    x = torch.randint(10, 128, (1, 40))
    inputs: dict[str, Any] = {"input_ids": x}
    if name == "LlavaForConditionalGeneration":
        config: Any = transformers.LlavaConfig(
            text_config={**text, "model_type": "llama"},
            vision_config={**vision, "model_type": "clip_vision_model", "projection_dim": 16},
            image_token_id=5,
            vision_feature_layer=-1,
        )
        x[0, 4:8] = 5
        inputs["pixel_values"] = torch.randn(1, 3, 8, 8)
    elif name == "Qwen2VLForConditionalGeneration":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        shape = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
        config = transformers.Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={**shape, "spatial_merge_size": 2, "temporal_patch_size": 1},
            image_token_id=5,
            video_token_id=6,
            vision_start_token_id=7,
        )
        x[0, 4] = 5
        inputs["pixel_values"] = torch.randn(4, 48)
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]])
        inputs["mm_token_type_ids"] = (x == 5).int()
    else:
        config = transformers.Gemma3Config(
            text_config={**text, "query_pre_attn_scalar": 8, **HALF_SLIDING},
            vision_config={**vision, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=5,
            boi_token_index=6,
            eoi_token_index=7,
        )
        x[0, 4:8] = 5
        inputs["pixel_values"] = torch.randn(1, 3, 8, 8)
        inputs["token_type_ids"] = (x == 5).long()
    torch.manual_seed(0)
    return getattr(transformers, name)(config), inputs


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_a_causal_vision_language_model_trains_on_text_and_pictures(name, monkeypatch, tmp_path):
    model, inputs = vision_language(name)
    stock = copy.deepcopy(model).eval()
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    layers, select = [], interface.select_kernel
    monkeypatch.setattr(interface, "select_kernel", lambda *a, **k: layers.append(a[1].shape[2]) or select(*a, **k))
    loss = model.train()(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    assert layers == [40, 40]  # the language model's; the tower's stay as they are
    loss.backward()
    with torch.no_grad():
        expected = stock(**inputs, use_cache=False).logits
        assert torch.allclose(model.eval()(**inputs, use_cache=False).logits, expected, atol=1e-6)

    model = get_peft_model(model, LongLoraConfig(r=4, target_length=256))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and not [n for n in trained if "vis" in n]
    assert current_rope(model.config) == scaled_rope(stock.config, 256)
    with torch.no_grad():
        before = model.eval()(**inputs, use_cache=False).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(vision_language(name)[0], str(tmp_path)).eval()
        assert torch.allclose(again(**inputs, use_cache=False).logits, before, atol=1e-6)


def test_pictures_that_see_both_ways_are_refused(monkeypatch):
    """Gemma 3's tokens of a picture see each other; its text alone is causal."""
    model, inputs = vision_language("Gemma3ForConditionalGeneration")
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    with pytest.raises(ValueError, match="bidirectional blocks"):
        model.train()(**inputs, use_cache=False)
    assert sparse_layers(model, monkeypatch, torch.randint(10, 128, (1, 40))) == 1
