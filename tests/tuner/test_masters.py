"""fp32 masters: bf16 norms that move, forwards that agree on dtypes, files in the base's dtype."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_longlora.tuner import LongLoraConfig
from hf_longlora.tuner.masters import full_precision, promote

from .helpers import TARGET, ids, llama, logits, perturbed

NORM = "base_model.model.model.norm.modules_to_save.default.weight"


def train(model, steps=5, lr=2e-5, autocast=True):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    for _ in range(steps):
        with context:
            model(ids(32), labels=ids(32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("masters", [True, False])
def test_a_bf16_norm_moves_only_with_a_master(masters):
    model = get_peft_model(
        llama(dtype=torch.bfloat16), LongLoraConfig(target_length=TARGET), autocast_adapter_dtype=masters
    )
    before = model.get_parameter(NORM).detach().clone()
    assert before.dtype == (torch.float32 if masters else torch.bfloat16)
    train(model)
    after = model.get_parameter(NORM)
    moved = (after != before).float().mean()
    assert moved > 0.9 if masters else moved == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_and_backward_agree_on_dtypes(tied, autocast):
    model = get_peft_model(llama(tied, dtype=torch.bfloat16), LongLoraConfig(target_length=TARGET))
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    train(model, steps=2, lr=1e-2, autocast=autocast)
    for name, parameter in model.named_parameters():
        if name in trained:
            assert not torch.equal(parameter, trained[name]), name
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_training_computes_what_the_saved_adapter_will(tied, tmp_path):
    model = train(get_peft_model(llama(tied, dtype=torch.bfloat16), LongLoraConfig(target_length=TARGET)), lr=1e-3)
    here = logits(model).float()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.dtype for k, v in state.items() if "lora_" not in k} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(llama(tied, dtype=torch.bfloat16), tmp_path).eval()
    there = logits(loaded).float()
    assert {p.dtype for n, p in loaded.named_parameters() if "modules_to_save" in n} == {torch.bfloat16}
    assert (here - there).abs().mean() < 0.03 * there.abs().mean()
    merged = loaded.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [False, True])
def test_full_precision_state_resumes_bitwise(tied, tmp_path):
    model = train(get_peft_model(llama(tied, dtype=torch.bfloat16), LongLoraConfig(target_length=TARGET)), lr=1e-3)
    with full_precision():
        model.save_pretrained(tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "adapter")
    assert {v.dtype for v in load_file(tmp_path / "checkpoint/adapter_model.safetensors").values()} == {torch.float32}
    base = llama(tied, dtype=torch.bfloat16)
    resumed = PeftModel.from_pretrained(base, tmp_path / "checkpoint", is_trainable=True)
    for (name, here), (_, there) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(here, there), name
    # ... and so does the way Trainer takes: weights into a model that has the adapter.
    fresh = get_peft_model(llama(tied, dtype=torch.bfloat16), LongLoraConfig(target_length=TARGET))
    fresh.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    for (name, here), (_, there) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(here, there), name
    assert torch.equal(logits(train(fresh)), logits(train(model)))
    # For inference all is of the base's dtype, also where PEFT puts the file's tensors in the place of the model's.
    for low in (False, True):
        base = llama(tied, dtype=torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path / "checkpoint", low_cpu_mem_usage=low)
        assert {p.dtype for _, _, copy in loaded.base_model._copies() for p in copy.parameters()} == {torch.bfloat16}


class OwnNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, hidden):
        return self.weight * hidden


class OwnLayerNorm(torch.nn.LayerNorm):
    pass


class OwnRouter(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "module", "seen"),
    [
        (lambda: torch.nn.LayerNorm(8), None, torch.float32),  # which takes no other on a GPU
        (lambda: torch.nn.RMSNorm(8), None, torch.float32),
        (lambda: LlamaRMSNorm(8), None, torch.bfloat16),  # a wider input would be kept for the backward
        (OwnNorm, "liger_kernel.transformers.rms_norm", torch.bfloat16),
        (OwnNorm, "remote_code", torch.float32),
        (partial(OwnLayerNorm, 8), "transformers.models.own", torch.float32),
        (partial(OwnRouter, 8, 8), "transformers.models.own", torch.float32),
    ],
)
def test_a_copy_takes_what_it_computes_in_and_hands_on_the_base_s_dtype(make, module, seen, monkeypatch):
    original = make().to(torch.bfloat16)
    if module is not None:
        monkeypatch.setattr(type(original), "__module__", module)
    promoted, taken = copy.deepcopy(original), []
    forward = promoted.forward
    promoted.forward = lambda *args: taken.append(args[0].dtype) or forward(*args)
    promote(promoted, original)
    hidden = torch.randn(2, 8, dtype=torch.bfloat16)
    out = promoted(hidden)
    assert promoted.weight.dtype == torch.float32 and taken == [seen] and out.dtype == torch.bfloat16
    assert torch.allclose(out, original(hidden), atol=2**-7, rtol=2**-7)


def test_what_is_no_number_of_the_network_is_handed_on_as_it_is():
    """A router, trained whole, gives scores and which experts, and may be told more than its input."""

    class Router(torch.nn.Linear):
        def forward(self, hidden, mask, scale):
            return super().forward(hidden) * scale, mask

    class Ids(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).argmax(-1)

    originals = Router(4, 3).to(torch.bfloat16), Ids(4, 3).to(torch.bfloat16)
    router, ids_of = (copy.deepcopy(module) for module in originals)
    promote(router, originals[0])
    promote(ids_of, originals[1])
    hidden, mask = torch.randn(2, 4, dtype=torch.bfloat16), torch.tensor([True, False])
    assert router(hidden, mask, 2)[1] is mask
    assert ids_of(hidden).dtype == torch.int64


def cast_down(model):
    """As TRL's trainers do on a quantized base."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def dtypes(model):
    return {p.dtype for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_mode_brings_the_masters_back(dtype):
    model = get_peft_model(llama(dtype=dtype), LongLoraConfig(target_length=TARGET))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    cast_down(model)
    model.eval()
    assert dtypes(model) == {torch.bfloat16}
    model.train()
    assert dtypes(model) == {torch.float32}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    train(model, steps=1)


def test_masters_under_ddp_are_brought_back_in_time_or_not_at_all(monkeypatch):
    """DDP's hook is on a parameter of the dtype it had."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    model = get_peft_model(llama(dtype=torch.bfloat16), LongLoraConfig(target_length=TARGET)).train()
    cast_down(model)
    assert dtypes(model.train()) == {torch.float32}  # one process, as DeepSpeed starts a group of
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    cast_down(model)
    with pytest.raises(RuntimeError, match=r"cast to torch.bfloat16.*upcast_masters\(\) before trainer.train"):
        model.train()
    assert dtypes(model) == {torch.bfloat16}
    model.base_model.upcast_masters()
    assert dtypes(model.train()) == {torch.float32}


def test_what_deepspeed_keeps_is_left_to_it():
    model = get_peft_model(llama(dtype=torch.bfloat16), LongLoraConfig(target_length=TARGET))
    cast_down(model)
    for parameter in model.parameters():
        parameter._hp_mapping = None
    assert dtypes(model.train()) == {torch.bfloat16}


CASTS = {
    "float": lambda model: model.float(),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half, float": lambda model: model.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["norms of torch", "untied", "tied"])
def test_a_model_that_is_cast_computes_and_trains(kind, dtype, cast):
    base = llama(kind == "tied", dtype=dtype)
    if kind == "norms of torch":  # which take no mixed dtypes
        base.model.norm = torch.nn.LayerNorm(32, dtype=dtype)
    config = LongLoraConfig(target_length=TARGET, modules_to_save=["lm_head"] if kind == "untied" else None)
    model = get_peft_model(base, config).eval()
    here, frequencies = logits(model).float(), model.model.model.rotary_emb.inv_freq.clone()
    model = CASTS[cast](model)
    there = logits(model)
    assert there.dtype == model.get_base_model().dtype
    assert (here - there.float()).abs().mean() < 0.05 * here.abs().mean()
    rotary = model.model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32 and torch.equal(rotary, frequencies)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, steps=3)
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.dtype == torch.float32, name
            moved = (parameter != trained[name].float()).float().mean()
            assert moved > (0.2 if "embed" in name else 0.9), name
    assert logits(model).dtype == there.dtype
    train(model, steps=1, autocast=False)


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_model_merges_and_unloads(tied):
    base = llama(tied, dtype=torch.bfloat16)
    plain = logits(base)
    model = train(get_peft_model(base, LongLoraConfig(target_length=TARGET)), lr=1e-3)
    twin = copy.deepcopy(model)
    here = logits(model).float()
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged).float() - here).abs().mean() < 0.05 * here.abs().mean()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._state_dict_hooks for m in merged.modules())
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert type(merged.lm_head) is torch.nn.Linear
    assert torch.equal(logits(twin.unload()), plain)


def test_head_the_user_trains_has_a_master_too():
    config = LongLoraConfig(target_length=TARGET, modules_to_save=["lm_head"])
    model = get_peft_model(llama(dtype=torch.bfloat16), config)
    assert model.get_output_embeddings().weight.dtype == torch.float32
    train(model, steps=2, autocast=False)
    assert type(model.merge_and_unload().lm_head).__name__ == "Linear"


def test_fp32_bases_are_left_alone():
    model = perturbed(llama())
    assert not any("_master" in vars(m) for m in model.modules())
    assert model.base_model.float() is model.base_model


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_bf16_base_are_not_trained_in_vain(bias):
    base = llama(dtype=torch.bfloat16, attention_bias=True)
    with pytest.raises(ValueError, match=r"bias='\w+' would train model.layers.0.*float32"):
        get_peft_model(base, LongLoraConfig(bias=bias))
    assert not hasattr(base, "peft_config") and type(base.model.norm).__name__ == "LlamaRMSNorm"
    get_peft_model(base, LongLoraConfig())
    get_peft_model(llama(attention_bias=True), LongLoraConfig(bias=bias))
