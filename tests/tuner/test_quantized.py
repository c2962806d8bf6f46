"""QLoRA: norms, embeddings and RoPE on bitsandbytes' 4-bit and 8-bit bases, on the CPU where the library can."""

import os

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer

from .helpers import TARGET, ids, llama, logits, perturbed

bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    8: {"load_in_8bit": True},
}


@pytest.fixture
def path(tmp_path):
    # bitsandbytes' 4-bit CPU kernels take widths that its blocks of 64 and 32 divide.
    llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantized(path, bits, device):
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=BitsAndBytesConfig(**BITS[bits]), dtype=torch.bfloat16, device_map={"": device}
    ).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("prepared", [False, True], ids=["as loaded", "prepare_model_for_kbit_training"])
def test_a_quantized_base_trains_in_fp32_and_saves_in_its_dtype(bits, device, prepared, path, tmp_path):
    base = quantized(path, bits, device)
    if prepared:  # casts norms and embeddings of the base to fp32 too
        base = prepare_model_for_kbit_training(base)
    model = get_peft_model(base, LongLoraConfig(target_length=TARGET))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum("norm" in n for n in trained) == 5
    assert sum("embed_tokens" in n for n in trained) == 1
    assert not any("base_layer" in n for n in trained)
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    model.train()
    tokens = ids(32).to(device)
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16):
            model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [n for n, p in trained.items() if torch.equal(p, before[n])]
    here = logits(model.eval(), tokens).float()
    model.save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {v.dtype for k, v in state.items() if "lora_" not in k} == {torch.float32 if prepared else torch.bfloat16}
    there = PeftModel.from_pretrained(quantized(path, bits, device), tmp_path / "adapter").eval()
    assert there.config.max_position_embeddings == TARGET
    assert (logits(there, tokens).float() - here).abs().mean() < 0.05 * here.abs().mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_base_gives_itself_back_and_merges(bits, device, path):
    tokens = ids(32).to(device)
    base = quantized(path, bits, device)
    plain = logits(base, tokens)
    model = perturbed(base, LongLoraConfig(target_length=TARGET))
    expected = logits(model, tokens).float()
    assert not torch.equal(expected, plain.float())
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in base.parameters()):
        with pytest.raises(RuntimeError, match="without quantization"):
            model.merge_and_unload()
        model = perturbed(quantized(path, bits, device), LongLoraConfig(target_length=TARGET))
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    wanted = {
        n: dequantize_module_weight(m.get_base_layer()).float() + m.get_delta_weight("default").float()
        for n, m in layers.items()
    }
    assert len(wanted) == 8
    merged = model.merge_and_unload()  # quantized again
    for name, weight in wanted.items():
        found = dequantize_module_weight(merged.get_submodule(name)).float()
        assert (found - weight).abs().mean() < (0.12 if bits == 4 else 0.01) * weight.abs().mean()
    assert merged.config.max_position_embeddings == TARGET


@pytest.mark.parametrize("device", DEVICES)
def test_the_trainer_keeps_masters_in_fp32_on_a_quantized_base(device, path, tmp_path, tiny_tokenizer):
    """TRL casts what a quantized model trains to bf16."""
    args = LongLoraSFTConfig(
        output_dir=str(tmp_path / "out"),
        stages=[ContextStage(128, 2), ContextStage(256, 2)],
        use_cpu=device == "cpu",
        bf16=True,
        report_to="none",
        report=False,
        save_strategy="no",
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    rows = [[3 + (i * 7 + j * j) % 100 for j in range(256)] for i in range(8)]
    trainer = LongLoraSFTTrainer(
        quantized(path, 4, device),
        args,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tiny_tokenizer,
        peft_config=LongLoraConfig(r=4),
    )
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for n, p in trained.items() if "modules_to_save" in n} == {torch.float32}
    before = {n: p.detach().clone() for n, p in trained.items()}
    trainer.train()
    assert [log["stage"] for log in trainer.state.log_history if "stage" in log][-1] == 2
    still = [n for n, p in trained.items() if torch.equal(p, before[n])]
    assert not still
    trainer.save_model()
    assert os.path.getsize(tmp_path / "out" / "adapter_model.safetensors") > 0
    loaded = PeftModel.from_pretrained(quantized(path, 4, device), tmp_path / "out").eval()
    assert loaded.config.max_position_embeddings == 256
