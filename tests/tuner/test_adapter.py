"""A LongLoRA adapter's life: put on, saved, loaded by every path, switched, merged, taken off."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_longlora.modules import is_projection
from hf_longlora.rope import current_rope, native_window, scaled_rope
from hf_longlora.tuner import LongLoraConfig, LongLoraModel, base_rope, register

from .helpers import LENGTH, TARGET, ids, llama, logits, perturbed, refused

NORMS = {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")}
NORMS.add("model.norm")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.fixture
def saved(tied, tmp_path):
    """(base's folder, adapter's folder, what the adapted model answers, what the base answers)."""
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    llama(tied).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    plain = logits(model)
    model = perturbed(model)
    model.save_pretrained(adapter)
    return base, adapter, logits(model), plain


def load(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


# -- what is trained ----


def test_exactly_lora_norms_and_embeddings_are_trained(tied):
    model = get_peft_model(llama(tied), LongLoraConfig(target_length=TARGET, rope_type="yarn"))
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"]
    expected = {f"{name}.lora_{ab}.default.weight" for name in attention for ab in "AB"}
    expected |= {f"{name}.modules_to_save.default.weight" for name in NORMS | {"model.embed_tokens"}}
    assert trained == expected
    config = model.peft_config["default"]
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(config.modules_to_save) == NORMS | {"model.embed_tokens"}


def test_switches_and_the_users_own_modules():
    config = LongLoraConfig(train_embeddings=False, train_norms=False, modules_to_save=["lm_head"])
    model = get_peft_model(llama(), config)
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
    config = LongLoraConfig(train_norms=False, modules_to_save=["lm_head", "mlp"])
    saved = ["lm_head", "mlp", "model.embed_tokens"]
    assert get_peft_model(llama(), config).peft_config["default"].modules_to_save == saved
    # A head that is tied to the embeddings is trained with them, and not twice.
    model = get_peft_model(llama(tied=True), LongLoraConfig(train_norms=False, modules_to_save=["lm_head", "mlp"]))
    assert model.peft_config["default"].modules_to_save == saved[1:]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = LongLoraConfig(train_embeddings=False, train_norms=False)
    assert get_peft_model(llama(), config).peft_config["default"].modules_to_save is None
    # What stands in a module that the user has named is trained with it.
    config = LongLoraConfig(target_modules=["layers.0.mlp.up_proj"], modules_to_save=["layers.1", "embed_tokens"])
    saved = ["layers.1", "embed_tokens", *sorted(name for name in NORMS if "layers.1." not in name)]
    assert get_peft_model(llama(), config).peft_config["default"].modules_to_save == saved


def other(family):
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape)), {"query_key_value", "dense"}, 5, "embed_in"
    if family == "gpt_neox_tied":
        config = GPTNeoXConfig(**shape, tie_word_embeddings=True)
        return GPTNeoXForCausalLM(config), {"query_key_value", "dense"}, 5, "embed_in"
    if family == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**shape, num_key_value_heads=2))
        return model, {"qkv_proj", "o_proj"}, 5, "embed_tokens"
    if family == "qwen3":  # norms of queries and keys inside the attention
        model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=8))
        return model, {"q_proj", "k_proj", "v_proj", "o_proj"}, 9, "embed_tokens"
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), {"c_attn", "attn.c_proj"}, 5, "wte"


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox_tied", "phi3", "qwen3", "gpt2"])
def test_other_families(family, tmp_path):
    model, targets, norms, embedding = other(family)
    fresh = copy.deepcopy(model).eval()
    rope = {"target_length": 65536, "rope_type": "longrope" if family == "phi3" else "linear"}
    config = LongLoraConfig(**({} if family == "gpt2" else rope))
    model = perturbed(model, config)
    assert config.target_modules == targets
    assert sum("norm" in m or "ln_" in m for m in config.modules_to_save) == norms
    assert any(m.endswith(embedding) for m in config.modules_to_save)
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is inputs.weight) == (family in ("gpt_neox_tied", "gpt2"))
    input_ids = ids(40) % 64
    before = logits(model, input_ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert (logits(loaded, input_ids) - before).abs().max() <= 1e-6
    merged = loaded.merge_and_unload()
    assert (logits(merged, input_ids) - before).abs().max() <= 1e-5


def test_gpt2_refuses_rope_and_stays_as_it_was():
    model, *_ = other("gpt2")
    modules = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no RoPE"):
        get_peft_model(model, LongLoraConfig(target_length=4096))
    assert [n for n, _ in model.named_modules()] == modules


def test_plain_module_without_config():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.norm = nn.LayerNorm(8)
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(self.norm(self.embedding(x)))

    model = get_peft_model(Block(), LongLoraConfig(target_modules=["linear"], task_type=None))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len([n for n in trained if "lora_" in n]) == 2
    assert len([n for n in trained if "modules_to_save" in n]) == 3
    with pytest.raises(ValueError, match="no RoPE"):
        get_peft_model(Block(), LongLoraConfig(target_modules=["linear"], task_type=None, target_length=64))
    # What LoRA targets already is left to LoRA.
    model = get_peft_model(Block(), LongLoraConfig(target_modules=["linear", "embedding"], task_type=None))
    assert model.peft_config["default"].modules_to_save == ["norm"]
    # What a model doesn't have is not missing.
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LongLoraConfig(target_modules=["0"], task_type=None))
    assert model.base_model.frozen_parts() == []


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r"(.*\.)?(q_proj|lm_head)"])
def test_head_is_refused(targets):
    with pytest.raises(ValueError, match="lm_head"):
        LongLoraConfig(target_modules=targets)


def test_head_under_another_name_is_refused():
    model = llama()
    model.unembed = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.unembed
    with pytest.raises(ValueError, match=r"output head \('unembed'"):
        get_peft_model(model, LongLoraConfig(target_modules=["q_proj", "unembed"]))


def test_targets_are_asked_for_where_none_are_found():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Embedding(8, 8), nn.LayerNorm(8)), LongLoraConfig(task_type=None))


def test_parameters_are_targeted_as_by_lora():
    """With PEFT's own choice of modules beside them, and without the others."""
    trained = []
    for config in (LongLoraConfig, LoraConfig):
        model = get_peft_model(llama(), config(target_parameters=["model.layers.0.mlp.gate_proj.weight"]))
        trained.append({n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n})
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_length", 1),
        ("target_length", "8k"),
        ("base_length", 1),
        ("rope_type", "ntk"),
        ("rope_parameters", "linear"),
        ("modules_to_save", "lm_head"),
        ("lora_alpha", True),
        ("lora_alpha", "16"),
        ("lora_alpha", float("inf")),
        ("alora_invocation_tokens", 5),
        ("megatron_config", {}),
        ("alora_invocation_tokens", [5, "a"]),
    ],
)
def test_config_refusals(key, value):
    with pytest.raises(ValueError, match=key):
        LongLoraConfig(**{key: value})


def test_the_least_that_a_config_takes():
    least = {"target_length": 2, "base_length": 2, "embedding_rank": 1, "lora_alpha": 0.5}
    config = LongLoraConfig(**least, alora_invocation_tokens=[5])
    assert {key: getattr(config, key) for key in least} == least and config.alora_invocation_tokens == [5]


# -- save and load ----


def by_peft(base, adapter):
    return PeftModel.from_pretrained(load(base), adapter)


def by_peft_low_memory(base, adapter):
    return PeftModel.from_pretrained(load(base), adapter, low_cpu_mem_usage=True)


def by_auto(base, adapter):
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def by_load_adapter(base, adapter):
    model = load(base)
    model.load_adapter(adapter)
    return model


def by_transformers(base, adapter):
    return AutoModelForCausalLM.from_pretrained(adapter)


def by_trainable(base, adapter):
    return PeftModel.from_pretrained(load(base), adapter, is_trainable=True)


# Before 5.18, transformers' own adapter methods lose norms and embeddings: they are refused there.
keeps_all = pytest.mark.skipif(not base_rope._TRANSFORMERS_KEEPS_ALL, reason="refused on this transformers")
# transformers 5.24 wants PEFT 0.22 for its own methods, which is not released yet.
accepts_peft = pytest.mark.skipif(
    Version(MIN_PEFT_VERSION) > Version(peft.__version__), reason="this transformers refuses this PEFT"
)
by_transformers_own = [pytest.param(loader, marks=keeps_all) for loader in (by_load_adapter, by_transformers)]
LOADERS = [by_peft, by_peft_low_memory, by_auto, by_trainable, *by_transformers_own]


@pytest.mark.parametrize("loader", LOADERS)
def test_every_path_gives_the_same_answers(saved, tied, loader):
    base, adapter, adapted, plain = saved
    assert (adapted - plain).abs().max() > 0.1
    model = loader(base, adapter).eval()
    assert (logits(model) - adapted).abs().max() <= 1e-6
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert inner.config.rope_parameters["factor"] == TARGET / LENGTH
    assert (inner.get_output_embeddings().weight is inner.get_input_embeddings().weight) == tied


@keeps_all
@accepts_peft
def test_saved_through_transformers(saved, tmp_path):
    base, adapter, adapted, _ = saved
    model = by_load_adapter(base, adapter)
    model.save_pretrained(tmp_path / "again")
    for loader in (by_peft, by_load_adapter):
        assert (logits(loader(base, str(tmp_path / "again")).eval()) - adapted).abs().max() <= 1e-6


@keeps_all
@pytest.mark.parametrize("target", [None, TARGET])
def test_what_transformers_forgets_when_it_enables_adapters_is_enabled(tmp_path, tied, target, monkeypatch):
    """It speaks to LoRA's layers, and norms and embeddings would stay the base's."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    llama(tied).save_pretrained(tmp_path / "base")
    model = perturbed(load(tmp_path / "base"), LongLoraConfig(target_length=target))
    model.save_pretrained(tmp_path / "adapter")
    adapted, plain = logits(model), logits(load(tmp_path / "base"))
    model = by_load_adapter(tmp_path / "base", str(tmp_path / "adapter")).eval()
    for _ in range(2):
        model.disable_adapters()
        assert torch.equal(logits(model), plain)
        model.enable_adapters()
        assert (logits(model) - adapted).abs().max() <= 1e-6


@keeps_all
@pytest.mark.parametrize("target", [None, TARGET])
def test_dora_is_not_loaded_by_transformers_which_drops_its_magnitudes(tmp_path, target):
    """Of PEFT's own LoRA, too: when this fails, it doesn't any more, and there is nothing to refuse."""
    llama().save_pretrained(tmp_path / "base")
    for config in (LoraConfig(use_dora=True, target_modules=["q_proj"]), LongLoraConfig(use_dora=True)):
        if isinstance(config, LongLoraConfig):
            config.target_length = target
        model = perturbed(load(tmp_path / "base"), config)
        expected = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        assert (logits(by_peft(tmp_path / "base", tmp_path / "adapter").eval()) - expected).abs().max() <= 1e-6
        loaded = by_load_adapter(tmp_path / "base", str(tmp_path / "adapter")).eval()
        if not isinstance(config, LongLoraConfig):
            assert (logits(loaded) - expected).abs().max() > 0.01
            continue
        for each in (loaded, by_transformers(tmp_path / "base", str(tmp_path / "adapter"))):
            with pytest.raises(RuntimeError, match=r"drops DoRA's magnitudes \(of adapter 'default'\)"):
                logits(each)
    # Without weights to be loaded there are none to be lost, and PEFT loads beside what is there.
    logits(inject_adapter_in_model(LongLoraConfig(use_dora=True, target_length=target), load(tmp_path / "base")))
    twice = by_peft(tmp_path / "base", tmp_path / "adapter").eval()
    twice.load_adapter(tmp_path / "adapter", "second")
    twice.set_adapter("second")
    assert (logits(twice) - expected).abs().max() <= 1e-6


def test_a_config_that_holds_another_models_names_is_refused():
    """It would train the norms that the two have in common, and say nothing of the rest."""
    config = LongLoraConfig()
    get_peft_model(llama(), config)
    for reused in (config, copy.deepcopy(config)):
        model = get_peft_model(llama(), reused)  # on another of the same kind
        assert sum(p.requires_grad for n, p in model.named_parameters() if "norm" in n) == 5
        with pytest.raises(
            ValueError, match=r"^model\.layers\.2\.input_layernorm would not be trained: the config has"
        ):
            get_peft_model(llama(num_hidden_layers=4), reused)
    get_peft_model(llama(num_hidden_layers=1), config)


def test_no_adapter_is_put_on_one_by_get_peft_model():
    """PEFT warns, writes over the first one's LoRA, and what is saved loads on no model."""
    model = perturbed(llama())
    before, config = logits(model), model.peft_config["default"]
    for second in (LongLoraConfig(), LongLoraConfig(target_length=2 * TARGET)):
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="has an adapter already"):
            get_peft_model(model, second)
        assert torch.equal(logits(model), before) and model.peft_config == {"default": config}


def test_a_transformers_that_loses_weights_is_refused(saved, monkeypatch):
    monkeypatch.setattr(base_rope, "_TRANSFORMERS_KEEPS_ALL", False)
    base, adapter, adapted, _ = saved
    model = load(base)
    model.load_adapter(adapter)
    without_rope = inject_adapter_in_model(LongLoraConfig(), load(base))
    for each in (model, without_rope):
        with pytest.raises(RuntimeError, match="drops an adapter's norms and embeddings"):
            logits(each)
    assert (logits(by_peft(base, adapter).eval()) - adapted).abs().max() <= 1e-6


def test_tied_weight_is_saved_once(saved):
    keys = load_file(f"{saved[1]}/adapter_model.safetensors")
    assert not any("lm_head" in key for key in keys)


def test_weights_can_be_tied_again(saved):
    """As lm-eval does with each model that it gets."""
    base, adapter, adapted, _ = saved
    model = by_peft(base, adapter).eval()
    model.tie_weights()
    assert (logits(model) - adapted).abs().max() <= 1e-6
    plain = get_peft_model(load(base), LongLoraConfig(target_length=TARGET, rope_type="yarn", train_embeddings=False))
    inner = plain.get_base_model()
    tied = inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
    inner.lm_head.weight = torch.nn.Parameter(inner.lm_head.weight.detach().clone())
    plain.tie_weights()
    assert (inner.get_output_embeddings().weight is inner.get_input_embeddings().weight) == tied


def test_adapter_config_is_complete_json(saved):
    stored = json.loads(Path(saved[1], "adapter_config.json").read_text())
    assert stored["peft_type"] == "LONGLORA" and stored["resolved"] is True
    assert stored["rope"]["rope_parameters"]["factor"] == 4.0
    assert stored["base_rope"]["rope_parameters"]["rope_type"] == "default"
    assert set(stored["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    config = PeftConfig.from_pretrained(saved[1])
    assert type(config) is LongLoraConfig
    assert config.to_dict() | {"target_modules": 0} == LongLoraConfig(**stored).to_dict() | {"target_modules": 0}


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "llama3", "longrope", "abf"])
def test_every_rope_type_survives(rope_type, tmp_path):
    model = perturbed(llama(), LongLoraConfig(target_length=TARGET, rope_type=rope_type))
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    assert (logits(PeftModel.from_pretrained(llama(), tmp_path).eval()) - adapted).abs().max() <= 1e-6


def test_explicit_rope_parameters_and_none(tmp_path):
    explicit = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}
    model = perturbed(llama(), LongLoraConfig(rope_parameters=explicit))
    assert model.config.rope_parameters["beta_fast"] == 16.0
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    assert (logits(again) - logits(model)).abs().max() <= 1e-6
    base = llama()
    before = current_rope(base.config)
    model = perturbed(base, LongLoraConfig(rope_parameters=dict(base.config.rope_parameters)))
    model.add_adapter("second", LongLoraConfig())  # of the same RoPE
    assert model.peft_config["default"].rope is None
    assert current_rope(model.config) == before
    model.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    assert (logits(again) - logits(model)).abs().max() <= 1e-6


def test_base_with_another_rope_is_refused(saved):
    base, adapter, _, _ = saved
    merged = by_peft(base, adapter).merge_and_unload()
    with refused(merged, ValueError, "another RoPE"):
        PeftModel.from_pretrained(merged, adapter)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"nothing of the kind")


def remove(folder):
    (folder / "adapter_model.safetensors").unlink()


def pickled(folder):
    state = load_file(folder / "adapter_model.safetensors")
    remove(folder)
    torch.save(state, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "error"),
    [(truncate, ValueError), (garble, ValueError), (remove, FileNotFoundError), (pickled, ValueError)],
)
def test_damaged_files_leave_the_model_alone(damage, error, tmp_path):
    perturbed(llama()).save_pretrained(tmp_path)
    damage(tmp_path)
    model = llama()
    with refused(model, error, "adapter_model"):
        PeftModel.from_pretrained(model, tmp_path)
    # The same through an adapter that is there already.
    model = perturbed(llama())
    with refused(model, error, "adapter_model"):
        model.load_adapter(tmp_path, "second")


def test_config_alone_loads(tmp_path):
    LongLoraConfig(r=4).save_pretrained(tmp_path)
    assert LongLoraConfig.from_pretrained(tmp_path).r == 4


def test_merged_model_needs_no_package(saved, tied, tmp_path):
    base, adapter, adapted, _ = saved
    merged = by_peft(base, adapter).merge_and_unload()
    assert type(merged) is type(load(base))
    assert merged.config.tie_word_embeddings is tied
    same = merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert same == tied
    assert not [n for n, m in merged.named_modules() if type(m).__module__.startswith(("hf_longlora", "peft"))]
    merged.save_pretrained(tmp_path / "merged")
    # In a process without the package: tests/hub/test_export.py.
    assert (logits(load(tmp_path / "merged")) - adapted).abs().max() < 1e-5


def test_without_the_package_loading_fails_loudly(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    perturbed(llama()).save_pretrained(tmp_path / "adapter")
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "from peft import PeftModel\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "PeftModel.from_pretrained(base, sys.argv[2])\n"
    )
    arguments = [code, str(tmp_path / "base"), str(tmp_path / "adapter")]
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "KeyError: 'LONGLORA'" in done.stderr


# -- switching ----


def test_disabling_gives_the_base(tied):
    base = llama(tied)
    plain, rope = logits(base), current_rope(base.config)
    model = perturbed(base)
    adapted, scaled = logits(model), current_rope(model.config)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        assert current_rope(model.config) == rope
    assert torch.equal(logits(model), adapted)
    assert current_rope(model.config) == scaled
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), plain)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), adapted)


def test_unload_gives_the_base(tied):
    base = llama(tied)
    plain = logits(base)
    bare = perturbed(base).unload()
    assert torch.equal(logits(bare), plain)
    assert bare.config.rope_parameters["rope_type"] == "default"
    assert bare.config.max_position_embeddings == LENGTH
    assert not hasattr(bare, "_longlora_base_rope")
    assert (bare.lm_head.weight is bare.model.embed_tokens.weight) == tied
    # ... which takes another adapter with another RoPE.
    again = get_peft_model(bare, LongLoraConfig(target_length=2 * TARGET, rope_type="yarn"))
    assert again.config.rope_parameters["factor"] == 8.0


def test_with_no_adapter_active_it_is_the_base():
    config = LongLoraConfig(target_length=TARGET, rope_type="yarn", train_norms=False, train_embeddings=False)
    model = perturbed(llama(), config)
    adapted = logits(model)
    model.base_model.set_adapter([])
    assert torch.equal(logits(model), logits(llama()))
    model.base_model.set_adapter("default")
    assert torch.equal(logits(model), adapted)


def test_delete_the_last_adapter():
    base = llama()
    plain = logits(base)
    model = perturbed(base)
    model.delete_adapter("default")
    model = model.base_model.model  # PEFT's own forward looks for an active adapter
    assert torch.equal(logits(model), plain)
    assert model.config.rope_parameters["rope_type"] == "default"


def test_second_adapter(tied, tmp_path):
    model = perturbed(llama(tied))
    first = logits(model)
    model.save_pretrained(tmp_path)
    modules = {n for n, _ in model.named_modules()}
    for wrong in (LongLoraConfig(target_length=2 * TARGET, rope_type="yarn"), LongLoraConfig()):
        with pytest.raises(ValueError, match="another RoPE"):
            model.add_adapter("second", wrong)
        assert {n for n, _ in model.named_modules()} == modules
        assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), first)
    model.add_adapter("second", LongLoraConfig(target_length=TARGET, rope_type="yarn"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    # At its start a second adapter is the base under the scaled RoPE.
    bare = llama(tied)
    scaled = get_peft_model(bare, LongLoraConfig(target_length=TARGET, rope_type="yarn")).eval()
    assert (logits(model) - logits(scaled)).abs().max() <= 1e-6
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is inputs.weight) == tied
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.load_adapter(tmp_path, "third")
    model.set_adapter("third")
    assert (logits(model) - first).abs().max() <= 1e-6
    model.delete_adapter("third")
    model.delete_adapter("second")
    model.set_adapter("default")
    assert (logits(model) - first).abs().max() <= 1e-6


@keeps_all
def test_second_adapter_through_transformers(tmp_path):
    perturbed(llama()).save_pretrained(tmp_path / "a")
    perturbed(llama(), LongLoraConfig(target_length=2 * TARGET, rope_type="yarn")).save_pretrained(tmp_path / "b")
    model = llama()
    model.load_adapter(tmp_path / "a", "a")
    first = logits(model)
    with pytest.raises(ValueError, match="another RoPE"):
        model.load_adapter(tmp_path / "b", "b")
    assert torch.equal(logits(model), first)
    assert model.config.rope_parameters["factor"] == 4.0
    assert list(model.peft_config) == ["a"]


def test_a_config_of_another_method_is_refused():
    with pytest.raises(TypeError, match="needs a LongLoraConfig, got LoraConfig"):
        LongLoraModel(llama(), {"default": LoraConfig(target_modules=["q_proj"])}, "default")


def test_failed_injection_leaves_the_model_alone():
    model = llama()
    before, modules = logits(model), [n for n, _ in model.named_modules()]
    rope, trainable = current_rope(model.config), [p.requires_grad for p in model.parameters()]
    for broken in (
        LongLoraConfig(target_length=TARGET, rope_type="yarn", target_modules=["nothing_of_the_kind"]),
        # PEFT finds out about the second target after it has replaced the first.
        LongLoraConfig(target_length=TARGET, rope_type="yarn", target_modules=["q_proj", "rotary_emb"]),
        # And has taken a part out of the first one's weights.
        LongLoraConfig(target_modules=["q_proj", "rotary_emb"], init_lora_weights="pissa"),
        LongLoraConfig(target_length=LENGTH),
    ):
        stored = broken.to_dict()
        with pytest.raises(ValueError):
            get_peft_model(model, broken)
        assert [n for n, _ in model.named_modules()] == modules
        assert torch.equal(logits(model), before)
        assert current_rope(model.config) == rope
        assert [p.requires_grad for p in model.parameters()] == trainable
        ignored = {"base_model_name_or_path": None, "revision": None}
        assert broken.to_dict() | ignored == stored | ignored


def test_a_failure_at_the_last_moment_leaves_no_trace(monkeypatch):
    """After the layers are in and the base's RoPE is written down; beside another adapter that stays as it is."""

    def fail(model, scaling):
        raise ValueError("no room")

    model = llama()
    attributes, before = set(vars(model)), logits(model)
    with monkeypatch.context() as patch:
        patch.setattr("hf_longlora.rope.apply_rope", fail)
        with pytest.raises(ValueError, match="no room"):
            get_peft_model(model, LongLoraConfig(target_length=TARGET, rope_type="yarn", base_length=LENGTH // 2))
    assert set(vars(model)) == attributes and not model._forward_pre_hooks
    assert torch.equal(logits(model), before)
    adapted = perturbed(model)
    expected = logits(adapted)
    with pytest.raises(ValueError):
        adapted.add_adapter(
            "second", LongLoraConfig(target_length=TARGET, rope_type="yarn", target_modules=["q_proj", "rotary_emb"])
        )
    assert torch.equal(logits(adapted), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)


@keeps_all
def test_rope_goes_with_layers_that_are_switched_by_themselves():
    """transformers' own methods throw the tuner away and speak to the layers alone."""
    model = inject_adapter_in_model(LongLoraConfig(target_length=TARGET, rope_type="yarn"), llama()).eval()
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    adapted, plain = logits(model), logits(llama())
    assert not torch.allclose(adapted, plain, atol=0.1)
    for enabled, expected, length in ((False, plain, LENGTH), (True, adapted, TARGET)):
        for layer in layers:
            layer.enable_adapters(enabled)
        assert torch.equal(logits(model), expected)
        assert model.config.max_position_embeddings == length
    hooks = len(model._forward_pre_hooks)
    again = inject_adapter_in_model(
        LongLoraConfig(target_length=TARGET, rope_type="yarn"), model, adapter_name="second"
    )
    assert len(again._forward_pre_hooks) == hooks == 1
    for name, layer in list(again.named_modules()):
        if isinstance(layer, LoraLayer):
            again.set_submodule(name, layer.get_base_layer())
    logits(again)
    assert again.config.max_position_embeddings == LENGTH


def test_who_is_told_that_a_reference_is_the_base_without_its_extension():
    def told(*configs, **changes):
        model = get_peft_model(llama(), configs[0])
        for name, config in enumerate(configs[1:]):
            model.add_adapter(str(name), config)
        for name, value in changes.items():
            setattr(model.peft_config["default"], name, value)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.base_model.disable_adapter_layers()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.base_model.enable_adapter_layers()
        return [str(w.message) for w in caught if "Without its adapter" in str(w.message)]

    extended = LongLoraConfig(target_length=TARGET, rope_type="yarn")
    (message,) = told(extended, LongLoraConfig(target_length=TARGET, rope_type="yarn"))  # once
    assert f"for {LENGTH} tokens" in message and f"of {TARGET}." in message
    assert not told(LongLoraConfig())
    assert not told(LongLoraConfig(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))  # the base's own
    assert not told(LongLoraConfig(target_length=TARGET, rope_type="yarn"), inference_mode=True)
    # One that is not trained hides none that is.
    assert told(
        LongLoraConfig(target_length=TARGET, rope_type="yarn"),
        LongLoraConfig(target_length=TARGET, rope_type="yarn"),
        inference_mode=True,
    )


def test_what_is_kept_of_a_base_while_it_carries_an_adapter_and_no_longer():
    model = llama()
    tuner = LongLoraModel(model, {"default": LongLoraConfig(target_length=TARGET, rope_type="abf")}, "default")
    assert native_window(model) == native_window(llama()) == LENGTH and len(model._forward_pre_hooks) == 1
    tuner.set_rope(stretched(tuner, 2 * TARGET, "abf"))
    assert native_window(model) == LENGTH and current_rope(model.config).max_position_embeddings == 2 * TARGET
    assert tuner.train() is tuner
    base = tuner.unload()
    assert not base._forward_pre_hooks and not [name for name in vars(base) if "longlora" in name]
    adapted = get_peft_model(base, LongLoraConfig(target_length=TARGET, rope_type="yarn"))
    assert not base._forward_pre_hooks  # its tuner is told of every switch
    adapted.base_model.set_rope()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapted.disable_adapter():
            assert current_rope(base.config) == current_rope(llama().config)
    adapted.add_adapter("second", LongLoraConfig())
    adapted.delete_adapter("second")
    assert [name for name in vars(base) if "longlora" in name]
    adapted.base_model.delete_adapter("default")
    assert not [name for name in vars(base) if "longlora" in name]
    del base.model.rotary_emb
    with pytest.raises(ValueError, match="has no rotary module"):
        get_peft_model(base, LongLoraConfig(target_length=TARGET, rope_type="yarn"))


def test_an_adapter_that_does_not_fit_leaves_frozen_what_was_and_trained_what_was(tmp_path):
    """PEFT has frozen the base by the time that the weights are looked at."""
    perturbed(llama()).save_pretrained(tmp_path)
    model = llama()
    model.resize_token_embeddings(140)
    model.lm_head.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert set(before.values()) == {True, False}
    with pytest.raises(ValueError, match="does not fit"):
        PeftModel.from_pretrained(model, tmp_path)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("which", ["rope", "base_rope"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", float("inf")),
        ("factor", float("nan")),
        ("factor", 0),
        ("factor", True),
        ("rope_theta", -10000.0),
        ("attention_factor", float("nan")),
        ("long_factor", [1.0, float("inf")]),
        ("rope_type", None),
    ],
)
def test_a_stored_rope_without_finite_numbers_is_refused(which, key, value, tmp_path):
    perturbed(llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    stored[which]["rope_parameters"][key] = value
    file.write_text(json.dumps(stored))
    model = llama()
    before = logits(model)
    with pytest.raises(ValueError, match=rf"{which} is no stored RoPE"):
        PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_position_embeddings": 0},
        {"max_position_embeddings": 64.0},
        {"original_max_position_embeddings": -1},
        {"a": 1},
    ],
)
def test_a_stored_rope_of_no_length_is_refused(fields):
    stored = perturbed(llama()).peft_config["default"].rope
    LongLoraConfig(rope=stored)
    LongLoraConfig(rope=stored | {"max_position_embeddings": 1})
    LongLoraConfig(rope=stored | {"rope_parameters": stored["rope_parameters"] | {"factor": 1.0}})
    with pytest.raises(ValueError, match="rope is no stored RoPE"):
        LongLoraConfig(rope=stored | fields)


def test_a_stored_rope_goes_before_what_is_asked_for_and_needs_no_bases():
    stored = perturbed(llama()).peft_config["default"].rope
    model = get_peft_model(llama(), LongLoraConfig(rope=stored, target_length=2 * TARGET))
    assert model.peft_config["default"].rope == current_rope(model.config).to_dict() == stored


# -- stages ----


def stretched(tuner, length, rope_type="auto"):
    return scaled_rope(tuner.model.config, length, rope_type, base=tuner.base_rope)


def test_set_rope_follows_stages(tmp_path):
    model = perturbed(llama())
    tuner = model.base_model
    assert isinstance(tuner, LongLoraModel)
    base = tuner.base_rope
    scaling = stretched(tuner, 1024, "linear")
    tuner.set_rope(scaling)
    assert current_rope(model.config) == scaling
    config = model.peft_config["default"]
    assert (config.rope, config.target_length, config.rope_type) == (scaling.to_dict(), 1024, "linear")
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    assert (logits(PeftModel.from_pretrained(llama(), tmp_path).eval()) - adapted).abs().max() <= 1e-6
    buffer = model.get_submodule("base_model.model.model.rotary_emb").inv_freq
    tuner.set_rope(scaling)  # unchanged: nothing is built
    assert model.get_submodule("base_model.model.model.rotary_emb").inv_freq is buffer
    tuner.set_rope()
    assert config.rope is config.target_length is None
    assert tuner.base_rope == current_rope(model.config) == base
    tuner.set_rope(scaling.to_dict())
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert current_rope(model.config) == base
    before = copy.deepcopy(vars(config))
    with pytest.raises(ValueError, match="can't be put on LlamaForCausalLM"):
        tuner.set_rope(replace(scaling, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}))
    assert current_rope(model.config) == scaling and vars(config) == before


def test_set_rope_makes_dynamic_forget():
    model = perturbed(llama(), LongLoraConfig(target_length=TARGET, rope_type="dynamic"))
    short = ids(LENGTH + 20)
    first = logits(model, short)
    logits(model)  # longer: the frequencies grow and stay grown for what is shorter but beyond the original
    assert not torch.equal(logits(model, short), first)
    model.base_model.set_rope(stretched(model.base_model, TARGET, "dynamic"))
    assert torch.equal(logits(model, short), first)


def test_set_rope_starts_from_an_adapter_without():
    base = llama()
    plain = logits(base)
    model = perturbed(base, LongLoraConfig())
    model.base_model.set_rope(stretched(model.base_model, TARGET, "yarn"))
    assert model.config.rope_parameters["factor"] == 4.0
    assert torch.equal(logits(model.unload()), plain)


def test_generation_stops_where_the_model_ends_and_no_sooner(tmp_path):
    """Published models say their length in generation_config.json, too: at 64 an extended one would stop."""
    base = llama()
    base.generation_config.max_length = LENGTH
    model = perturbed(base)
    model.base_model.set_rope(stretched(model.base_model, 2 * TARGET))
    assert model.generation_config.max_length == 2 * TARGET
    model.base_model.set_rope(stretched(model.base_model, TARGET))
    out = model.generate(ids(LENGTH + 20), do_sample=False, eos_token_id=None, max_new_tokens=4)
    assert out.shape == (1, LENGTH + 24)
    with model.disable_adapter():
        assert base.generation_config.max_length == LENGTH
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.max_length == TARGET
    assert model.unload().generation_config.max_length == LENGTH
    # Another number is no length of the model's, but a choice.
    chosen = llama()
    chosen.generation_config.max_length = 20
    assert perturbed(chosen).generation_config.max_length == 20


# -- the enum ----


def test_peft_type_is_an_ordinary_member():
    register()
    member = PeftType.LONGLORA
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.loads(json.dumps(member)) == "LONGLORA"
    assert PeftType("LONGLORA") is member
    assert member == "LONGLORA"
    assert member in list(PeftType)
    config = LongLoraConfig(target_length=TARGET, rope_type="yarn")
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    # LoRA's own entry is as it was.
    assert type(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).base_model).__name__ == "LoraModel"


def test_adapted_model_can_be_copied(tied):
    model = perturbed(llama(tied))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    with torch.no_grad():
        twin.get_input_embeddings().weight.add_(1.0)
    assert not torch.equal(logits(twin), logits(model))
    assert (twin.get_output_embeddings().weight is twin.get_input_embeddings().weight) == tied


@keeps_all
@accepts_peft
def test_added_through_transformers(tied, tmp_path):
    """transformers saves one of two shared weights; with plain LoRA, PEFT then misses the head's (a KeyError)."""
    model = llama(tied)
    model.add_adapter(LongLoraConfig(target_length=TARGET, rope_type="yarn"))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    loaded = llama(tied)
    loaded.load_adapter(tmp_path)
    assert (logits(loaded) - adapted).abs().max() <= 1e-6
    loaded = PeftModel.from_pretrained(llama(tied), tmp_path).eval()
    assert (logits(loaded) - adapted).abs().max() <= 1e-6


def test_checkpointing_and_generation(tied):
    model = get_peft_model(llama(tied), LongLoraConfig(target_length=TARGET, rope_type="yarn"))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model(ids(32), labels=ids(32)).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    assert grads["base_model.model.model.norm.modules_to_save.default.weight"].abs().max() > 0
    out = model.eval().generate(ids(80), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 84)


@keeps_all
@accepts_peft
def test_switching_through_transformers(saved):
    base, adapter, adapted, plain = saved
    model = by_load_adapter(base, adapter).eval()
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    for module in model.modules():  # transformers' enable_adapters forgets modules_to_save
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.enable_adapters(True)
    assert (logits(model) - adapted).abs().max() <= 1e-6
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain)
    assert model.config.rope_parameters["rope_type"] == "default"


def test_hub_id_is_checked_before_the_model(tmp_path):
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / ("0" * 40)
    perturbed(llama()).save_pretrained(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    loaded = PeftModel.from_pretrained(llama(), "someone/adapter", cache_dir=str(tmp_path)).eval()
    assert loaded.config.rope_parameters["factor"] == 4.0
    remove(snapshot)
    model = llama()
    modules = [n for n, _ in model.named_modules()]
    with pytest.raises(FileNotFoundError, match="someone/adapter"):
        PeftModel.from_pretrained(model, "someone/adapter", cache_dir=str(tmp_path))
    assert [n for n, _ in model.named_modules()] == modules


def test_only_the_language_model_of_a_multimodal_model(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=8, patch_size=4),
        text_config=LlamaConfig(**shape, vocab_size=128, max_position_embeddings=LENGTH, pad_token_id=0),
        image_token_id=127,
    )
    model = LlavaForConditionalGeneration(config).eval()
    fresh = copy.deepcopy(model)
    model = perturbed(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("language_model" in n for n in trained)
    assert model.config.text_config.rope_parameters["factor"] == 4.0
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    assert (logits(PeftModel.from_pretrained(fresh, tmp_path).eval()) - adapted).abs().max() <= 1e-6


def test_a_stage_on_the_bases_rope_is_what_a_checkpoint_of_it_holds(tmp_path):
    """The config still says what was asked for at first; what was resolved last counts."""
    base = llama()
    plain = current_rope(base.config)
    model = perturbed(base)
    model.base_model.set_rope()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert current_rope(loaded.config) == plain
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_without_rope_knows_its_base_too(tmp_path):
    perturbed(llama(), LongLoraConfig()).save_pretrained(tmp_path)
    merged = perturbed(llama()).merge_and_unload()
    with pytest.raises(ValueError, match="another RoPE"):
        PeftModel.from_pretrained(merged, tmp_path)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, {"LoRA": 16, "norms": 5, "embeddings": 1}),
        ({"train_norms": False}, {"LoRA": 16, "norms": 0, "embeddings": 1}),
        ({"embedding_rank": 4}, {"LoRA": 16, "norms": 5, "embeddings": 2}),
        ({"trainable_token_indices": [5]}, {"LoRA": 16, "norms": 5, "embeddings": 1}),
        (
            {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
            {"LoRA": 16, "norms": 5, "embeddings": 2},
        ),
        ({"train_embeddings": False, "modules_to_save": ["lm_head"]}, {"LoRA": 16, "norms": 5, "embeddings": 0}),
    ],
)
def test_the_parts_of_an_adapter(options, counts):
    model = get_peft_model(llama(), LongLoraConfig(**options))
    model.add_adapter("second", LongLoraConfig(r=2, train_embeddings=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = model.base_model.parts()
    assert {part: len(parameters) for part, parameters in parts.items()} == counts
    assert all("default" in names[id(p)] and p.requires_grad for found in parts.values() for p in found)
    second = model.base_model.parts("second")
    assert {part: len(found) for part, found in second.items()} == {"LoRA": 16, "norms": 5, "embeddings": 0}
    assert all(".second" in names[id(p)] for found in second.values() for p in found)
    model.set_adapter("second")
    assert model.base_model.parts().keys() == second.keys()
    assert [p.shape for p in model.base_model.parts()["LoRA"]] == [p.shape for p in second["LoRA"]]


def test_a_tie_that_is_kept_is_no_warning_and_one_that_comes_apart_is():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(llama(True), LongLoraConfig())
        get_peft_model(llama(True), LongLoraConfig(embedding_rank=2))
    assert not [str(each.message) for each in said if "tie" in str(each.message)]
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        get_peft_model(llama(True), LongLoraConfig(train_embeddings=False, modules_to_save=["lm_head"]))


@pytest.mark.parametrize("options", [{}, {"embedding_rank": 2}], ids=str)
def test_a_tie_that_is_asked_for_where_none_is(options):
    with pytest.warns(UserWarning, match="requested `ensure_weight_tying`, but no tied modules were found"):
        get_peft_model(llama(), LongLoraConfig(ensure_weight_tying=True, **options))


def test_a_head_with_weights_of_its_own_keeps_them_whatever_the_config_says():
    base = llama(tied=True)
    base.lm_head = head = torch.nn.Linear(32, 128, bias=False)
    assert get_peft_model(base, LongLoraConfig()).get_output_embeddings() is head


def test_projections_of_quantized_models_are_found_by_name():
    """GPTQ's and AWQ's layers are no subclasses of nn.Linear."""

    class WQLinear_GEMM(nn.Module):
        in_features = 8

    class Rotation(nn.Module):
        in_features = 8

    class LinearSchedule(nn.Module):
        pass

    found = [is_projection(each()) for each in (WQLinear_GEMM, Rotation, LinearSchedule)]
    assert found == [True, False, False]
    assert is_projection(nn.Linear(1, 1)) and not is_projection(nn.Embedding(1, 1))
