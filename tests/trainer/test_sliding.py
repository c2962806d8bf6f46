"""Models with a sliding window in the trainer: block by block, as by the whole mask."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from hf_longlora import ContextStage
from hf_longlora.attention import interface

from ..attention.test_blocks import by_whole_mask
from ..test_families import COMMON, OWN_ATTENTION, build
from .helpers import weights

WINDOW = 16


def model_of(family):
    if family != "mistral":
        return build(family)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **COMMON, sliding_window=WINDOW))


@pytest.fixture
def run(make, monkeypatch):
    """Trains a family: its weights, graphs that there were by the end of each step, and the shapes of its blocks."""
    compile, attend = nn.Module.compile, interface.attend_in_blocks
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile(self, backend="aot_eager"))

    def trained(family, by=attend, **options):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        seen, graphs = [], []

        class Count(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        monkeypatch.setattr(interface, "attend_in_blocks", lambda *a: seen.append(tuple(a[-1].shape)) or by(*a))
        torch.manual_seed(1)
        trainer = make(
            model=model_of(family),
            stages=[ContextStage(128, 3, rope_type="yarn" if family == "gpt_oss" else "abf")],
            attention_kernel="reference" if family in OWN_ATTENTION else "auto",
            callbacks=[Count()],
            **options,
        )
        trainer.train()
        return SimpleNamespace(weights=weights(trainer), graphs=graphs, seen=seen)

    return trained


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "mistral"])
@pytest.mark.parametrize("sparse", ["s2", "windows"])
@pytest.mark.parametrize("packing_strategy", ["wrapped", "bfd"])
def test_training_is_as_by_the_whole_mask(run, family, sparse, packing_strategy):
    options = {"sparse": sparse, "dense_every": 2, "packing_strategy": packing_strategy}
    whole, ours = run(family, by=by_whole_mask, **options), run(family, **options)
    assert ours.seen == whole.seen and len(ours.seen) >= 3 and min(shape[1] for shape in ours.seen) >= 128 // WINDOW
    for name, value in whole.weights.items():
        torch.testing.assert_close(ours.weights[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3_text", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_checkpointing_and_compiled_layers_change_nothing(run, family):
    plain, ours = run(family), run(family, gradient_checkpointing=True, compile_layers=True)
    assert plain.seen and len(ours.seen) == 2 * len(plain.seen)
    assert plain.graphs == [0, 0, 0] and ours.graphs[0] == ours.graphs[-1] > 0  # compiled once
    for name, value in plain.weights.items():
        torch.testing.assert_close(ours.weights[name], value, rtol=1e-3, atol=5e-5)
