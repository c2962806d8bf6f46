"""Mode "windows": documents whose positions skip, in models of transformers."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from hf_longlora import S2AttentionConfig, s2_attention_mode, set_s2_attention
from hf_longlora.attention import get_s2_attention, set_attention_mode
from hf_longlora.families import FAMILIES

from ..test_families import build

POSITIONS = [[*range(5, 20), *range(23, 28)], [*range(0, 7), *range(40, 53)], [*range(10, 16)]]
"""Of three documents: a skip of 3, which is less than the tiny families' windows of 16, one beyond them, and none."""
LENGTHS = [len(positions) for positions in POSITIONS]
SKIPS = [f.model_type for f in FAMILIES if f.rope_types]
STATEFUL = {"llama4_text", "qwen3_next", "qwen3_5_text", "granitemoehybrid", "bamba", "falcon_h1", "lfm2", "minimax"}
UNTOLD = {"stablelm", "nemotron"}
"""Their forwards pass their attention nothing of what they are passed."""


def packed(lengths: list[int], positions: list[list[int]]) -> dict[str, Any]:
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return {
        "input_ids": torch.randint(3, 128, (1, sum(lengths))),
        "position_ids": torch.tensor([[at for each in positions for at in each]]),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


def by_mask(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The same by masks written out and transformers' eager attention, for each document alone."""
    config, found = model.config.get_text_config(), []
    window = getattr(config, "sliding_window", None)
    for start, end in pairwise(inputs["cu_seq_lens_q"].tolist()):
        position = inputs["position_ids"][:, start:end]
        distance = position[0, :, None] - position[0, None, :]
        kinds = {"full_attention": distance >= 0, "sliding_attention": (distance >= 0) & (distance < (window or 1e9))}
        masks = {
            kind: torch.zeros(seen.shape).masked_fill(~seen, torch.finfo().min)[None, None]
            for kind, seen in kinds.items()
        }
        mask = (
            masks if set(getattr(config, "layer_types", None) or ()) > {"full_attention"} else masks["full_attention"]
        )
        out = model(
            input_ids=inputs["input_ids"][:, start:end], position_ids=position, attention_mask=mask, use_cache=False
        )
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", [name for name in SKIPS if name not in STATEFUL])
@pytest.mark.parametrize("documents", [[0, 1, 2], [0]], ids=["packed", "one"])
def test_a_skip_is_no_boundary(family, documents):
    """Logits and gradients of a training forward equal those by explicit masks."""
    model = build(family).train()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    set_s2_attention(model, S2AttentionConfig(group_size=8, kernel="reference"))
    set_attention_mode(model, "windows")
    inputs = packed([LENGTHS[i] for i in documents], [POSITIONS[i] for i in documents])
    if family in UNTOLD:
        with pytest.raises(ValueError, match="doesn't get `cu_seq_lens_q`"):
            model(**inputs)
        return
    got, expected = model(**inputs).logits, by_mask(eager, inputs)
    assert torch.allclose(got, expected, atol=2e-5)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-3), name


def test_a_family_by_itself_would_hide_what_is_before_a_skip(tiny_llama):
    """What the mode is for: without it, and without `cu_seq_lens`, a skip begins another document."""
    model = tiny_llama().train()
    set_s2_attention(model, S2AttentionConfig(group_size=8))
    inputs = packed(LENGTHS[:1], POSITIONS[:1])
    with s2_attention_mode(model, "windows"):
        expected = model(**inputs).logits
    lost = {key: value for key, value in inputs.items() if "cu_seq" not in key}
    with s2_attention_mode(model, "dense"):
        assert not torch.allclose(model(**lost).logits[:, 15:], expected[:, 15:], atol=1e-3)
    with (
        s2_attention_mode(model, "windows"),
        pytest.raises(ValueError, match="LlamaAttention doesn't get `cu_seq_lens_q`"),
    ):
        model(**lost)
    with torch.no_grad(), s2_attention_mode(model, "windows"):  # in evaluation it is the dense mode
        plain = {"input_ids": inputs["input_ids"], "use_cache": False}
        assert torch.equal(model.eval()(**plain).logits, get_dense(model, plain))


def get_dense(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    assert get_s2_attention(model).mode == "windows"
    with s2_attention_mode(model, "dense"):
        return model(**inputs).logits


def test_a_layer_with_a_window_needs_positions():
    model = build("gemma3_text").train()
    set_s2_attention(model, S2AttentionConfig(group_size=8))
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
    )
    with s2_attention_mode(model, "windows"), pytest.raises(ValueError, match="doesn't get `position_ids`"):
        model(**packed(LENGTHS, POSITIONS))
    hook.remove()
    with s2_attention_mode(model, "windows"), pytest.raises(ValueError, match="mask of its own"):
        mask = torch.zeros(1, 1, sum(LENGTHS), sum(LENGTHS))
        masks = {"full_attention": mask, "sliding_attention": mask}
        model(**packed(LENGTHS, POSITIONS) | {"attention_mask": masks})
    model.model.layers[0].self_attn.is_causal = False
    with s2_attention_mode(model, "windows"), pytest.raises(ValueError, match="is not causal"):
        model(**packed(LENGTHS, POSITIONS))


@pytest.mark.parametrize("family", sorted(STATEFUL))
def test_layers_that_can_not_tell_are_refused(family):
    model = build(family)
    set_s2_attention(model, S2AttentionConfig(group_size=8))
    with pytest.raises(ValueError, match="can't tell where positions skip"):
        set_attention_mode(model, "windows")
    assert get_s2_attention(model).mode == "auto"
