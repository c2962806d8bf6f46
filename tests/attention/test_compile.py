"""`torch.compile` of a model: the same numbers, one graph break a forward, nothing compiled twice for one shape."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from hf_longlora import S2AttentionConfig, set_s2_attention
from hf_longlora.attention import Documents, set_attention_mode
from hf_longlora.attention.kernels import select_kernel

from ..test_families import build
from .test_kernels import RUNS


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_training_is_the_same(tiny_llama, fresh_dynamo):
    model = tiny_llama().train()
    set_s2_attention(model, S2AttentionConfig(group_size=16))
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend)
    frames = None
    for _ in range(3):
        x = torch.randint(3, 128, (2, 40))
        results = []
        for each in (model, compiled):
            model.zero_grad()
            loss = each(input_ids=x, labels=x, use_cache=False).loss
            loss.backward()
            results.append([loss, *(p.grad.clone() for p in model.parameters())])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))
        assert frames in (None, backend.frame_count), "compiled again for a batch of the same shape"
        frames = backend.frame_count
    # What documents there are is read off the device outside of the graphs; attention itself breaks none.
    assert all("Documents.find" in reason for reason in counters["graph_break"])


def test_a_model_that_was_only_loaded_with_s2attn_compiles_as_well(tiny_llama, fresh_dynamo):
    """Its native window, by which its groups go, is read off the config in the graph."""
    config = tiny_llama(max_position_embeddings=16).config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="s2attn").train()
    x = torch.randint(3, 128, (2, 80))
    compiled = torch.compile(model, backend=CompileCounterWithBackend("eager"))
    expected = model(input_ids=x, use_cache=False).logits
    assert torch.allclose(compiled(input_ids=x, use_cache=False).logits, expected, atol=1e-6)
    assert all("Documents.find" in reason for reason in counters["graph_break"])


UNTRIED = {"flex"}
"""The kernels that `torch.compile` has not been tried on."""


@pytest.mark.parametrize(("name", "device", "dtype"), [run for run in RUNS if run[0] not in UNTRIED], ids=str)
def test_a_kernel_is_one_graph(name, device, dtype, fresh_dynamo):
    one_graph(name, device, dtype)


def one_graph(name, device, dtype):
    """Where the documents are known, nothing of a kernel breaks a graph, its choice included."""
    tensors = [torch.randn(1, heads, 40, 16, requires_grad=True, device=device, dtype=dtype) for heads in (4, 2, 2)]
    parts = Documents.find(1, 40).parts(4, 2, 16, sink_tokens=4)

    def attend(query, key, value):
        return select_kernel(name, query, value)(query, key, value, parts)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    expected, got = attend(*tensors), compiled(*tensors)
    close = partial(torch.allclose, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert close(expected, got)
    wanted, found = (torch.autograd.grad(out.square().sum(), tensors) for out in (expected, got))
    assert all(close(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "windows"])
def test_a_layer_with_a_window_compiles_to_the_same(mode, fresh_dynamo):
    model = build("gemma3_text").train()
    set_s2_attention(model, S2AttentionConfig(group_size=16))
    set_attention_mode(model, mode)
    backend, frames = CompileCounterWithBackend("eager"), []
    compiled = torch.compile(model, backend=backend)
    ends, positions = torch.tensor([0, 15, 40], dtype=torch.int32), torch.tensor([[*range(15), *range(25)]])
    told = {"cu_seq_lens_q": ends, "position_ids": positions} if mode == "windows" else {}
    for _ in range(3):
        x = torch.randint(3, 128, (1, 40))
        expected, got = (each(input_ids=x, use_cache=False, **told).logits for each in (model, compiled))
        assert torch.allclose(got, expected, atol=1e-5)
        frames.append(backend.frame_count)
    assert frames[1] == frames[2], "compiled again for a batch of the same shape"
    assert all("Documents.find" in reason for reason in counters["graph_break"])
