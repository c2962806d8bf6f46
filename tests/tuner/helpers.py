"""Tiny models for the tuner's tests."""

from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longlora.tuner import LongLoraConfig, register

register()

LENGTH, TARGET = 64, 256
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(tied=False, dtype=torch.float32, **kwargs):
    """Two layers, grouped keys and values, weights large enough for positions to matter."""
    config = LlamaConfig(
        vocab_size=128,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **SHAPE | kwargs,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    for module in model.modules():  # as from_pretrained does: rotary buffers stay fp32
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def ids(length=3 * LENGTH):
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(0))


def perturbed(model, config=None):
    """The model with an adapter whose every trainable weight is away from its start."""
    config = config if config is not None else LongLoraConfig(target_length=TARGET, rope_type="yarn")
    peft_model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return peft_model


@torch.no_grad()
def nudge(model, by=0.1):
    """Move every weight that is trained away from where it is."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(by * torch.randn_like(parameter))


@torch.no_grad()
def logits(model, input_ids=None):
    return model(ids() if input_ids is None else input_ids).logits


@contextmanager
def refused(model, error, match):
    """That what is done inside raises an error, and leaves the model's modules and answers as they were."""
    before, modules = logits(model), [n for n, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        yield
    assert [n for n, _ in model.named_modules()] == modules
    assert torch.equal(logits(model), before)
