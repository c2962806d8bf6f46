"""PEFT's variants of LoRA and its ways with adapters, each with norms, embeddings and RoPE beside."""

import copy
import json
import logging
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload, disk_offload
from peft import (
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter as pefts_hotswap_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainingArguments

from hf_longlora import export_adapter, tuner
from hf_longlora.rope import ROPE_TYPES, current_rope
from hf_longlora.tuner import LongLoraConfig, hotswap_adapter
from hf_longlora.tuner.stored import fit_vocabulary, trained_vocabulary

from .helpers import LENGTH, TARGET, ids, llama, logits, nudge, perturbed, refused

VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "all-linear": {"target_modules": "all-linear"},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 16}, "alpha_pattern": {"q_proj": 32}},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "target_parameters": {"target_parameters": ["model.layers.0.mlp.gate_proj.weight"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 7, 9]},
    "embedding_rank": {"embedding_rank": 4},
    "embedding_rank, all-linear": {"embedding_rank": 4, "target_modules": "all-linear"},
    "embedding_rank, a pattern, rslora": {"embedding_rank": 4, "target_modules": r".*q_proj", "use_rslora": True},
    "embeddings targeted": {"target_modules": ["q_proj", "embed_tokens"]},
}
CHANGE_THE_BASE = ("pissa", "olora")


def adapted(variant, tied=False):
    return perturbed(
        llama(tied), LongLoraConfig(target_length=TARGET, rope_type="yarn", **copy.deepcopy(VARIANTS[variant]))
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_saved_loaded_disabled_merged_and_unloaded(variant, tied, tmp_path):
    plain = logits(llama(tied))
    model = adapted(variant, tied)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(tied), tmp_path).eval()
    assert (logits(loaded) - expected).abs().max() <= 1e-6
    assert loaded.peft_config["default"].target_modules == model.peft_config["default"].target_modules
    if variant not in CHANGE_THE_BASE:
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(copy.deepcopy(model).unload()), plain)
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() <= 5e-5
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().max() <= 5e-5
    merged.save_pretrained(tmp_path / "merged")
    assert (logits(type(merged).from_pretrained(tmp_path / "merged").eval()) - expected).abs().max() <= 5e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", ["trainable_token_indices", "embedding_rank", "rslora"])
def test_an_adapter_of_a_resized_base_is_loaded(variant, tied, tmp_path):
    def base():
        torch.manual_seed(0)
        model = llama(tied)
        model.resize_token_embeddings(130)
        return model.eval()

    options = VARIANTS[variant] | ({"trainable_token_indices": [128, 129]} if "indices" in variant else {})
    model = perturbed(base(), LongLoraConfig(target_length=TARGET, rope_type="yarn", **options))
    model.save_pretrained(tmp_path, save_embedding_layers=True)  # as PEFT does where it sees that it was resized
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    new = torch.full((1, 40), 129)
    assert torch.equal(logits(loaded, new), logits(model, new))


@pytest.mark.parametrize("options", [*({"init_lora_weights": name} for name in CHANGE_THE_BASE), {"kasa_config": {}}])
def test_a_start_that_changes_the_base_says_so(options):
    model = get_peft_model(llama(), LongLoraConfig(**options)).eval()
    with pytest.warns(UserWarning, match="is not the base"), model.disable_adapter():
        assert not torch.equal(logits(model), logits(llama()))
    with pytest.warns(UserWarning, match="is not the base"):
        model.unload()


def test_pissa_becomes_plain_lora_for_a_base_of_its_own(tmp_path):
    model = get_peft_model(llama(), LongLoraConfig(target_length=TARGET, rope_type="yarn", init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    nudge(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    assert loaded.peft_config["default"].r == 16  # the difference of two adapters of rank 8
    assert (logits(loaded) - expected).abs().max() <= 5e-5
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(llama()))


def test_lora_plus_trains_everything():
    model = get_peft_model(llama(), LongLoraConfig(target_length=TARGET, rope_type="yarn"))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # PEFT gives all vectors B's rate, norms among them; the README says so.
            fast = "lora_B" in name or parameter.ndim == 1
            assert rates[id(parameter)] == pytest.approx(1.6e-2 if fast else 1e-3), name
    model.train()
    for _ in range(2):  # B starts at zero, so A moves in the second step
        model(ids(32), labels=ids(32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still


# -- embeddings at a small cost ----


def test_embedding_rank_is_lora_on_the_embeddings_with_the_others_scaling(tmp_path):
    config = LongLoraConfig(r=8, lora_alpha=16, embedding_rank=2)
    model = get_peft_model(llama(), config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "embed" in n}
    assert sum(p.numel() for p in trained.values()) == 2 * (128 + 32)
    assert {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)} == {2.0}
    model.save_pretrained(tmp_path)
    shapes = {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "embed" in k}
    assert sorted(shapes.values()) == [(2, 128), (32, 2)]  # and not the base's weights


@pytest.mark.parametrize(
    ("targets", "layers"), [(None, 8), (["q_proj"], 2), (r".*q_proj", 2), ("all-linear", 14)], ids=str
)
def test_embedding_rank_comes_beside_every_kind_of_targets(targets, layers):
    model = get_peft_model(llama(), LongLoraConfig(embedding_rank=2, target_modules=targets))
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(names) == layers + 1 and "base_model.model.model.embed_tokens" in names


def test_embedding_rank_comes_beside_patterns_and_where_there_is_nothing_else():
    for q_proj in ({"q_proj": 4}, None):
        config = LongLoraConfig(embedding_rank=2, rank_pattern=q_proj, alpha_pattern=q_proj)
        get_peft_model(llama(), config)
        assert config.rank_pattern == {**(q_proj or {}), "model.embed_tokens": 2}
        assert config.alpha_pattern == {**(q_proj or {}), "model.embed_tokens": 4.0}
    config = LongLoraConfig(task_type=None, embedding_rank=2)
    get_peft_model(torch.nn.Sequential(torch.nn.Embedding(8, 8)), config)
    assert config.target_modules == {"0"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"embedding_rank": 0},
        {"embedding_rank": "8"},
        {"embedding_rank": 8, "train_embeddings": False},
        {"embedding_rank": 8, "trainable_token_indices": [1]},
    ],
)
def test_embedding_rank_refuses(kwargs):
    with pytest.raises(ValueError, match="embedding_rank"):
        LongLoraConfig(**kwargs)


def test_embedding_rank_that_reaches_no_embedding_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="can't reach"):
        get_peft_model(model, LongLoraConfig(embedding_rank=8, exclude_modules=["embed_tokens"]))
    assert not any(isinstance(m, LoraLayer) for m in model.modules())


def test_lora_on_a_head_through_weight_tying_is_refused():
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        get_peft_model(llama(True), LongLoraConfig(embedding_rank=8, ensure_weight_tying=True))


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_tied_to_trained_tokens_has_no_bias_only_where_the_base_has_none(bias):
    base = llama(True)
    base.lm_head = torch.nn.Linear(32, 128, bias=bias)
    base.tie_weights()
    model = get_peft_model(base, LongLoraConfig(trainable_token_indices=[5, 7]))
    assert ("bias" in vars(model.get_output_embeddings())) == (not bias)  # for losses that ask for weight and bias
    assert bias or model.get_output_embeddings().bias is None


def test_merging_into_a_tied_embedding_leaves_the_head(tmp_path):
    """PEFT 0.21 merges into the shared weight, and the head moves with it."""
    base = llama(True)
    head = base.lm_head.weight.detach().clone()
    model = perturbed(base, LongLoraConfig(target_length=TARGET, rope_type="yarn", embedding_rank=4))
    merged = model.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, head)
    assert not torch.equal(merged.model.embed_tokens.weight, head)
    assert merged.config.tie_word_embeddings is False


# -- added tokens ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_added_tokens_come_back_on_a_resized_base_only(tied, tmp_path):
    base = llama(tied)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(131)
    model = perturbed(base)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.cat([ids(20), torch.tensor([[128, 130]])], 1)
    expected = logits(model, tokens)
    plain = type(base).from_pretrained(tmp_path / "base").eval()
    with refused(plain, ValueError, r"resize_token_embeddings\(131\)"):
        PeftModel.from_pretrained(plain, tmp_path / "adapter")
    plain.resize_token_embeddings(131)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert (logits(loaded, tokens) - expected).abs().max() <= 1e-6
    assert loaded.merge_and_unload().config.vocab_size == 131


def test_a_padded_vocabulary_is_never_shrunk(tmp_path):
    """A model has more rows than its tokenizer has tokens; an adapter keeps them, and one of fewer rows is refused."""
    base = llama()
    model = perturbed(base)
    model.save_pretrained(tmp_path)
    assert model.get_input_embeddings().weight.shape[0] == 128
    padded = llama()
    padded.resize_token_embeddings(100, pad_to_multiple_of=64)
    assert padded.get_input_embeddings().weight.shape[0] == 128
    assert torch.equal(logits(PeftModel.from_pretrained(padded, tmp_path).eval()), logits(model))
    padded = llama()
    padded.resize_token_embeddings(130, pad_to_multiple_of=64)
    with pytest.raises(ValueError, match=r"and this model has 192: call model.resize_token_embeddings\(128\)"):
        PeftModel.from_pretrained(padded, tmp_path)
    assert padded.get_input_embeddings().weight.shape[0] == 192


# -- several adapters, and other weights for one ----


@pytest.fixture
def pair(tmp_path):
    """A model with adapters "a" (active) and "b", and what each answers by itself."""
    expected = {}
    for seed, name in enumerate("ab"):
        model = perturbed(llama())
        torch.manual_seed(seed)
        nudge(model)
        expected[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a").eval()
    model.load_adapter(tmp_path / "b", "b")
    return model, expected


def test_adapters_of_one_rope_switch_freely(pair):
    model, expected = pair
    for name in "baab":
        model.set_adapter(name)
        assert (logits(model) - expected[name]).abs().max() <= 1e-6
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(llama()))
    with pytest.raises(ValueError, match="adapter 'a' has another RoPE than 'b'"):
        model.base_model.set_rope(None, "a")  # which is not the active one


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("length", [TARGET, 2 * TARGET, None], ids=["equal RoPE", "another RoPE", "none"])
def test_hotswap(tied, length, tmp_path):
    new = perturbed(llama(tied), LongLoraConfig(target_length=length, rope_type="linear"))
    nudge(new)
    new.peft_config["default"].schedule = {"group_sizes": [16]}
    new.save_pretrained(tmp_path / "new")
    perturbed(llama(tied)).save_pretrained(tmp_path / "old")
    model = PeftModel.from_pretrained(llama(tied), tmp_path / "old").eval()
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    hotswap_adapter(model, str(tmp_path / "new"))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    assert (logits(model) - logits(new)).abs().max() <= 1e-6
    assert current_rope(model.config) == current_rope(new.config)
    assert model.peft_config["default"].schedule == {"group_sizes": [16]}
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(tied), tmp_path / "again").eval()), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(tied)))


@pytest.mark.parametrize("trainable", [False, True])
def test_a_hotswap_on_a_base_without_rope(tmp_path, trainable):
    """It stays trainable, or not."""

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=128, n_positions=4 * LENGTH, n_embd=32, n_layer=2, n_head=2)
        ).eval()

    for name in ("old", "new"):
        model = perturbed(gpt2(), LongLoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
        nudge(model) if name == "new" else None
        model.save_pretrained(tmp_path / name)
    assert LongLoraConfig.from_pretrained(tmp_path / "new").base_rope is None
    swapped = PeftModel.from_pretrained(gpt2(), tmp_path / "old", is_trainable=trainable).eval()
    assert not torch.equal(logits(swapped), logits(model))
    trained = {name: p.requires_grad for name, p in swapped.named_parameters()}
    hotswap_adapter(swapped.train(trainable), str(tmp_path / "new"))
    assert swapped.training == trainable
    assert torch.equal(logits(swapped.eval()), logits(model))
    assert {name: p.requires_grad for name, p in swapped.named_parameters()} == trained
    assert any(trained.values()) == trainable


def test_hotswap_refuses_what_differs(tmp_path):
    perturbed(llama(), LongLoraConfig(target_length=TARGET, rope_type="yarn", r=4)).save_pretrained(tmp_path / "rank")
    perturbed(llama(), LongLoraConfig(target_length=2 * TARGET, rope_type="yarn")).save_pretrained(tmp_path / "rope")
    perturbed(llama(max_seq_len=1)).save_pretrained(tmp_path / "same")
    perturbed(llama(), LongLoraConfig(target_length=TARGET, rope_type="yarn", train_norms=False)).save_pretrained(
        tmp_path / "norms"
    )
    model = perturbed(llama())
    model.add_adapter("second", LongLoraConfig(target_length=TARGET, rope_type="yarn"))
    before = logits(model)
    perturbed(llama(rope_theta=20_000.0)).save_pretrained(tmp_path / "base")
    for name, words in (
        *(("rank", "r 4 for 8"), ("rope", "another RoPE"), ("norms", "missing"), ("none", "find")),
        ("base", "trained on a base with another RoPE"),
    ):
        with pytest.raises(ValueError, match=words):
            hotswap_adapter(model, str(tmp_path / name))
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="no LONGLORA adapter 'third'"):
        hotswap_adapter(model, str(tmp_path / "same"), "third")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        hotswap_adapter(model, str(tmp_path / "same"))


def test_a_hotswap_of_damaged_weights_leaves_the_model_as_it_was(tmp_path):
    perturbed(llama(), LongLoraConfig(target_length=2 * TARGET, rope_type="yarn")).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[-1] = torch.inf
    save_file(weights, tmp_path / "adapter_model.safetensors")
    model = perturbed(llama())
    before, rope = logits(model), current_rope(model.config)
    with pytest.raises(ValueError, match="not finite"):
        hotswap_adapter(model, str(tmp_path))
    assert torch.equal(logits(model), before) and current_rope(model.config) == rope
    assert model.active_peft_config.scaling == rope


def test_pefts_own_hotswap_refuses(tmp_path):
    model = perturbed(llama())
    model.save_pretrained(tmp_path)
    before = logits(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        pefts_hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model), before)
    assert model.config.max_position_embeddings == TARGET != LENGTH


# -- one of several adapters is merged ----


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_named_adapter_is_merged_with_its_own_norms_and_embeddings(pair, merged_before):
    model, expected = pair
    if merged_before:
        model.merge_adapter()
    assert (logits(model.merge_and_unload(adapter_names=["b"])) - expected["b"]).abs().max() <= 5e-5


def test_a_named_adapter_without_norms_is_merged_under_the_bases(pair, tmp_path):
    model, _ = pair
    alone = perturbed(
        llama(), LongLoraConfig(target_length=TARGET, rope_type="yarn", train_norms=False, train_embeddings=False)
    )
    alone.save_pretrained(tmp_path / "c")
    model.load_adapter(tmp_path / "c", "c")
    assert (logits(model.merge_and_unload(adapter_names=["c"])) - logits(alone)).abs().max() <= 5e-5


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["c"], ValueError, "no adapter 'c' to merge; there are a, b"),
        (["a", "b"], ValueError, "have norms or embeddings of their own"),
        ([], ValueError, "names no adapter"),
        ("b", TypeError, "list of names"),
    ],
)
def test_a_merge_without_a_right_answer_is_refused(pair, names, error, words, in_place):
    model, expected = pair
    with pytest.raises(error, match=words):
        (model.merge_adapter if in_place else model.merge_and_unload)(adapter_names=names)
    assert torch.equal(logits(model), expected["a"])


def test_a_merge_in_place_is_of_the_active_adapter(pair):
    model, expected = pair
    with pytest.raises(ValueError, match="norms and embeddings of the active adapter, a"):
        model.merge_adapter(adapter_names=["b"])
    assert torch.equal(logits(model), expected["a"])
    model.set_adapter("b")
    model.merge_adapter(adapter_names=["b"])
    assert (logits(model) - expected["b"]).abs().max() <= 5e-5


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_weights_that_bitsandbytes_has_repacked_are_not_merged(merge):
    model = get_peft_model(llama(), LongLoraConfig())
    weight = model.base_model.model.model.layers[1].self_attn.o_proj.base_layer.weight
    weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(RuntimeError, match="without quantization"):
        getattr(model, merge)()


def test_adapters_of_lora_alone_are_merged_together_as_pefts():
    config = dict(target_length=TARGET, rope_type="yarn", train_norms=False, train_embeddings=False)
    model = perturbed(llama(), LongLoraConfig(**config))
    model.add_adapter("b", LongLoraConfig(**config))
    one = logits(model)
    for name, parameter in model.named_parameters():
        if ".b." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    assert (both - one).abs().max() > 0.1
    model.base_model.set_adapter("default")
    model.merge_adapter(adapter_names=["default", "b"])
    assert (logits(model) - both).abs().max() <= 5e-5


def test_unload_of_a_merged_adapter_gives_the_base(pair):
    model, _ = pair
    model.merge_adapter()
    assert (logits(model.unload()) - logits(llama())).abs().max() <= 5e-5


# -- bases whose weights are offloaded ----


def spread(folder, names):
    """A saved base, of which some modules wait on the disk."""
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.rotary_emb", "model.norm", "lm_head")
    places = {part: "disk" if part in names else "cpu" for part in parts}
    model = LlamaForCausalLM.from_pretrained(folder / "base", device_map=places, offload_folder=folder / "parked")
    # PEFT takes the same map, by its own names, and would make one on which all fits into the host's memory
    loading = {"device_map": {f"base_model.model.{part}": place for part, place in places.items()}}
    return model.eval(), loading | {"torch_device": "cpu", "offload_folder": str(folder / "parked anew")}


WHOLE = {"train_norms": True, "train_embeddings": True}
LORA_ALONE = {"train_norms": False, "train_embeddings": False}
TOKENS = {"train_norms": False, "trainable_token_indices": [3, 5]}


@pytest.mark.parametrize(
    ("trained", "parked", "name"),
    [
        (WHOLE, ["model.embed_tokens"], "model.embed_tokens"),
        (WHOLE, ["model.layers.1"], "model.layers.1.input_layernorm"),
        (TOKENS, ["model.embed_tokens"], "model.embed_tokens"),
        (LORA_ALONE, ["model.embed_tokens", "model.layers.1"], None),
    ],
)
def test_adapters_on_a_base_that_is_spread_are_right_or_refused(tmp_path, trained, parked, name):
    """PEFT offloads LoRA's weights anew, and no others: loading them did nothing, or ended in a KeyError of a hook."""
    llama().save_pretrained(tmp_path / "base")
    trained_model = perturbed(llama(), LongLoraConfig(target_length=TARGET, **trained))
    trained_model.save_pretrained(tmp_path / "adapter")
    base, loading = spread(tmp_path, parked)
    if name is None:
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", **loading).eval()
        assert torch.equal(logits(model), logits(trained_model.eval()))
        with pytest.raises(ValueError, match=r"the weights of model\.layers\.1.* are offloaded"):  # PEFT does it once
            model.load_adapter(tmp_path / "adapter", "second", **loading)
        assert torch.equal(logits(model), logits(trained_model))
        return
    with pytest.raises(ValueError, match=rf"the weights of {re.escape(name)} are offloaded.*accelerate\.cpu_offload"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", **loading)
    assert [n for n, _ in base.named_modules()] == [n for n, _ in llama().named_modules()]


@pytest.mark.parametrize("trained", [WHOLE, LORA_ALONE])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_an_adapter_is_offloaded_with_its_base_and_not_put_on_an_offloaded_one(
    tmp_path, trained, low_cpu_mem_usage, disk
):
    """Where accelerate offloads a model without a map, PEFT leaves the adapter's weights empty, with a warning."""

    def offloaded(model, folder):
        return disk_offload(model, tmp_path / folder, "cpu") if disk else cpu_offload(model, "cpu")

    trained_model = perturbed(llama(), LongLoraConfig(target_length=TARGET, **trained))
    trained_model.save_pretrained(tmp_path / "adapter")
    loading = {"low_cpu_mem_usage": low_cpu_mem_usage, "torch_device": "cpu"}
    base = offloaded(llama(), "base")
    for put_on in (
        lambda: PeftModel.from_pretrained(base, tmp_path / "adapter", **loading),
        lambda: get_peft_model(base, LongLoraConfig(**trained)),
    ):
        with pytest.raises(ValueError, match=r"the weights of model\..* are offloaded"):
            put_on()
        assert torch.equal(logits(base), logits(llama()))
    model = offloaded(PeftModel.from_pretrained(llama(), tmp_path / "adapter", **loading).eval(), "both")
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model), logits(trained_model.eval()))


# -- other weights under a name that is taken ----


def test_load_adapter_over_a_taken_name_with_other_parts_changes_nothing(tmp_path):
    """PEFT looks for the parts first, and misses one by a KeyError, of which docs/troubleshooting.md tells."""
    perturbed(llama()).save_pretrained(tmp_path / "old")
    perturbed(llama(), LongLoraConfig(target_length=TARGET, train_embeddings=False)).save_pretrained(tmp_path / "new")
    model = PeftModel.from_pretrained(llama(), tmp_path / "old").eval()
    before = logits(model)
    with pytest.raises(KeyError, match=r"base_model\.model\.model\.embed_tokens\.weight"):
        model.load_adapter(tmp_path / "new", "default")
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match=r"missing, such as .*embed_tokens"):
        hotswap_adapter(model, tmp_path / "new")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("trainable", [False, True])
def test_load_adapter_over_a_taken_name_keeps_no_wrong_rope(tmp_path, caplog, monkeypatch, trainable):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    perturbed(llama()).save_pretrained(tmp_path / "old")
    model = PeftModel.from_pretrained(llama(), tmp_path / "old", is_trainable=trainable).eval()
    before = logits(model)
    for name, words, options in (
        (
            "length",
            r"RoPE .*'factor': 8\.0.* for .*'factor': 4\.0",
            {"target_length": 2 * TARGET, "rope_type": "yarn"},
        ),
        ("type", "RoPE .*linear.* for .*yarn", {"target_length": TARGET, "rope_type": "linear"}),
        ("none", "RoPE .*default.* for .*yarn", {}),
        ("alpha", "lora_alpha 32 for 16", {"target_length": TARGET, "rope_type": "yarn", "lora_alpha": 32}),
    ):
        perturbed(llama(), LongLoraConfig(**options)).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"the name 'default' is taken.*settings: {words}.*hotswap_adapter"):
            model.load_adapter(tmp_path / name, "default", is_trainable=trainable)
        assert torch.equal(logits(model), before)
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="a LoraConfig adapter"):
        hotswap_adapter(model, tmp_path / "lora")
    hotswap_adapter(model, str(tmp_path / "length"))
    assert model.config.rope_parameters["factor"] == 8.0
    with pytest.raises(ValueError, match="is taken"):  # a swap sees to its own weights alone
        model.load_adapter(tmp_path / "type", "default", is_trainable=trainable)
    # The same RoPE is the same adapter, further on: nothing to say.
    other = perturbed(llama(), LongLoraConfig(target_length=2 * TARGET, rope_type="yarn", init_lora_weights=False))
    other.save_pretrained(tmp_path / "other")
    assert not torch.equal(logits(model), logits(other))
    model.load_adapter(tmp_path / "other", "default", is_trainable=trainable)
    assert torch.equal(logits(model.eval()), logits(other)) and not caplog.records
    # Of weights without a folder nothing is known.
    weights = get_peft_model_state_dict(other)
    if trainable:
        set_peft_model_state_dict(model, weights)
        assert "'default', whose RoPE stays as it is" in caplog.text
        with pytest.raises(ValueError, match=r"don't fit the adapter 'default': .* has shape"):
            set_peft_model_state_dict(model, {name: torch.cat([weight] * 2) for name, weight in weights.items()})
        assert torch.equal(logits(model), logits(other))
    else:
        with pytest.raises(ValueError, match=r"nothing says under which RoPE.*hotswap_adapter"):
            set_peft_model_state_dict(model, weights)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_an_adapter_loaded_over_itself_is_itself(tmp_path, rope_type):
    """What a file says of RoPE is what the config in memory says, to the last digit."""
    model = perturbed(llama(), LongLoraConfig(target_length=TARGET, rope_type=rope_type))
    before = logits(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model.eval()), before)


def test_an_adapter_of_another_method_is_not_loaded_over_ours(tmp_path):
    get_peft_model(llama(), VeraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = get_peft_model(llama(), LongLoraConfig(train_norms=False, train_embeddings=False))
    with pytest.raises(ValueError, match="a VeraConfig adapter, not a LONGLORA one"):
        model.load_adapter(tmp_path, "default")


def test_the_first_weights_for_a_config_of_a_file_are_its_own(tmp_path):
    """Whoever puts config and weights on a model by hand, once."""
    model = perturbed(llama())
    model.save_pretrained(tmp_path)
    loaded = get_peft_model(llama(), LongLoraConfig.from_pretrained(tmp_path)).eval()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    set_peft_model_state_dict(loaded, weights)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="has weights already"):
        set_peft_model_state_dict(loaded, weights)


def test_a_trainer_of_transformers_resumes_under_the_same_rope_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows = [{"input_ids": ids(16)[0], "labels": ids(16)[0]}] * 4

    def trainer(target, steps):
        args = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True
        )
        return Trainer(get_peft_model(llama(), LongLoraConfig(target_length=target)), args, train_dataset=rows)

    trainer(TARGET, 2).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"checkpoint-1 under .* RoPE"):
        trainer(2 * TARGET, 2).train(resume_from_checkpoint=checkpoint)
    assert trainer(TARGET, 2).train(resume_from_checkpoint=checkpoint).global_step == 2
    assert "RoPE" not in caplog.text


def test_other_weights_for_a_merged_adapter_are_refused(pair, tmp_path):
    model, _ = pair
    model.merge_adapter()
    before = logits(model)
    with pytest.raises(ValueError, match="is merged into the base"):
        model.load_adapter(tmp_path / "b", "a")
    assert torch.equal(logits(model), before)


def test_a_file_whose_ranks_are_not_its_weights_is_refused(tmp_path):
    perturbed(llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 100}))
    with pytest.raises(ValueError, match=r"does not fit this model: .* \(8, 32\) in its file and \(100, 32\) here"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("options", [{}, {"train_embeddings": False}])
def test_what_keeps_an_adapter_off_a_model_is_said(options, tmp_path):
    perturbed(llama(), LongLoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"does not fit this model.*, and \d+ more differ\. Load it on the model it was"
    ):
        PeftModel.from_pretrained(llama(hidden_size=64), tmp_path)
    larger = llama()
    larger.resize_token_embeddings(130)
    if options:
        PeftModel.from_pretrained(larger, tmp_path)  # has none of the base's rows
        return
    with pytest.raises(ValueError, match=r"trained with 128 tokens, and this model has 130: .*embeddings\(128\)"):
        PeftModel.from_pretrained(larger, tmp_path)


# -- a base is given the vocabulary that an adapter was trained with ----


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [5]}, {"train_embeddings": False}])
def test_the_vocabulary_of_training_is_read_off_an_adapters_file(options, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(131)
    perturbed(base, LongLoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    config = LongLoraConfig.from_pretrained(tmp_path / "adapter")
    assert trained_vocabulary(llama(), config) == (131, True)
    assert trained_vocabulary(base, config, tokens=140) is None
    smaller = llama()
    smaller.resize_token_embeddings(140)
    fit_vocabulary(smaller, config)
    assert smaller.get_input_embeddings().weight.shape[0] == smaller.get_output_embeddings().weight.shape[0] == 131


def test_a_vocabulary_that_nothing_speaks_of_stays():
    assert trained_vocabulary(llama(), LoraConfig()) is None
    with pytest.raises(ValueError, match="has token 128, and this model has 128 tokens"):
        get_peft_model(llama(), LongLoraConfig(trainable_token_indices=[128]))


def test_rows_that_an_adapter_does_not_hold_are_drawn_around_the_mean():
    model = llama()
    fit_vocabulary(model, LongLoraConfig(train_embeddings=False), tokens=131)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == 131 and (rows[128:] - rows[:128].mean(0)).abs().max() < 0.01


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_that_an_adapter_does_not_hold_are_told(tied, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    prefix, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head.weight"
    delta = "token_adapter.trainable_tokens_delta"
    # As PEFT saves them where it can't read the base's config, and so doesn't see that it was resized.
    for config, shapes, tokens, expected in (
        (LongLoraConfig(), {f"{prefix}.weight": (130, 32)}, 0, (130, tied)),
        (LongLoraConfig(), {f"{prefix}.weight": (130, 32), head: (130, 32)}, 0, (130, True)),
        (LongLoraConfig(embedding_rank=4), {f"{prefix}.lora_embedding_A": (4, 130)}, 0, (130, False)),
        (
            LongLoraConfig(embedding_rank=4, use_dora=True),
            {f"{prefix}.lora_magnitude_vector.weight": (32,), f"{prefix}.lora_embedding_A": (4, 130)},
            0,
            (130, False),
        ),
        (LongLoraConfig(trainable_token_indices=[128, 129]), {}, 129, (130, tied)),
        (LongLoraConfig(trainable_token_indices=[128, 129]), {f"{prefix}.{delta}": (2, 32)}, 0, (130, tied)),
        (LongLoraConfig(trainable_token_indices={"embed_tokens": [129]}), {}, 0, (130, False)),
        (LongLoraConfig(train_embeddings=False), {}, 131, (131, False)),
        (LongLoraConfig(), {f"{prefix}.weight": (100, 32)}, 0, (100, True)),
    ):
        caplog.clear()
        vars(config)["_stored_shapes"] = shapes
        assert trained_vocabulary(llama(tied), config, tokens) == expected
        assert ("holds no rows of" in caplog.text) == (not expected[1])
        assert ("and lm_head" in caplog.text) == (not tied and "embed_tokens and" in caplog.text)


def test_a_model_without_a_head_has_a_vocabulary_too():
    config = LongLoraConfig()
    assert trained_vocabulary(torch.nn.Linear(1, 1), config) is None
    vars(config)["_stored_shapes"] = {"base_model.model.embed_tokens.weight": (130, 32)}
    assert trained_vocabulary(llama().model, config) == (130, True)


@pytest.mark.parametrize("use", ["load", "merged", "lora"])
def test_the_weights_of_a_file_are_read_once(use, tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "base")
    perturbed(llama()).save_pretrained(tmp_path / "adapter")
    reads = Counter()

    class Opened:
        def __init__(self, path, *args, **kwargs):
            self.path, self.file = Path(path), safe_open(path, *args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            if name == "get_tensors" and self.path.parent.name == "adapter":
                reads.update(self.file.keys())
            return getattr(self.file, name)

        def get_tensor(self, key):
            reads[key] += self.path.parent.name == "adapter"
            return self.file.get_tensor(key)

    for module in (safetensors.torch, tuner.config):
        monkeypatch.setattr(module, "safe_open", Opened)
    if use == "load":
        PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    else:
        export_adapter(tmp_path / "adapter", tmp_path / "out", form=use, base=tmp_path / "base")
    assert len(reads) == 22 and set(reads.values()) == {1}


@pytest.mark.parametrize("indices", [[5, 130], {"embed_tokens": [130]}])
def test_tokens_beyond_the_base_are_no_damage(indices, tmp_path):
    config = LongLoraConfig(target_length=TARGET, rope_type="yarn", trainable_token_indices=indices)
    base = llama()
    with pytest.raises(ValueError, match=r"has token 130, .* 128 tokens: call model.resize_token_embeddings\(131\)"):
        get_peft_model(base, config)
    base.resize_token_embeddings(140)
    base.save_pretrained(tmp_path / "base")
    perturbed(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    plain = llama()
    with refused(plain, ValueError, r"has token 130, .* 128 tokens: call model.resize_token_embeddings\(140\)"):
        PeftModel.from_pretrained(plain, tmp_path / "adapter")
