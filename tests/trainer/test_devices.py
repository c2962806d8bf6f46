"""One process, two GPUs: a model that `device_map` spreads over them trains as on one."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from .helpers import Spy, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def spread(head):
    first, second = ("model.embed_tokens", "model.rotary_emb", "model.layers.0"), ("model.layers.1", "model.norm")
    return dict.fromkeys(first, 0) | dict.fromkeys(second, 1) | {"lm_head": head}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": False},
        {"packing_strategy": "bfd"},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"sparse": "pose"},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "wrapped",
)
def test_a_model_over_two_gpus_trains_as_on_one(make, tiny_llama, tied, options, tmp_path, monkeypatch):
    tiny_llama(tie_word_embeddings=tied, num_hidden_layers=2).save_pretrained(tmp_path / "base")
    runs = []
    for name, devices in (("one", {"": 0}), ("two", spread(0 if tied else 1))):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=devices)
        spy = Spy()
        with monkeypatch.context() as patch:
            if name == "one":  # a model on one of two visible GPUs would be copied to the other, and is refused
                patch.setattr(torch.cuda, "device_count", lambda: 1)
            trainer = make(model=model, output=name, use_cpu=False, dense_every=2, callbacks=[spy], **options)
        assert trainer.args.n_gpu == 1
        trainer.train()
        trainer.save_model()
        runs.append((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log], spy.steps))
    (one, losses, steps), (two, other_losses, other_steps) = runs
    assert {p.device.index for p in two.values()} == {0, 1}
    assert steps == other_steps and len(losses) == 6
    assert other_losses == pytest.approx(losses, abs=2e-2 if "bf16" in options else 1e-4)
    if "bf16" not in options:
        assert all(torch.allclose(one[key].cpu(), two[key].cpu(), atol=1e-4) for key in one)
    on_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(on_cpu, tmp_path / "two")
    assert loaded.config.max_position_embeddings == 256
