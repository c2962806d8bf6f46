"""A tiny corpus, and callbacks that look at a run."""

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_longlora import ContextStage
from hf_longlora.attention import get_s2_attention

# RoPE with a factor: what it was stretched by is seen in the config.
STAGES = [ContextStage(128, 3, rope_type="yarn"), ContextStage(256, 3, rope_type="yarn")]
TEXT = "It was a bright day, and the clocks were striking 13. "


def texts(documents=12, repeat=6):
    return Dataset.from_dict({"text": [f"{i}: " + TEXT * (repeat + i % 3) for i in range(documents)]})


class Spy(TrainerCallback):
    """What each optimizer step ran with."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        state_of = get_s2_attention(model)
        self.steps.append((model.config.rope_parameters["factor"], state_of.config.group_size, state_of.mode))


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def check_same(resumed, unbroken, checkpoint, keys):
    """That a run that went on from a checkpoint has ended with the weights and the logs of the unbroken one."""
    expected, got = weights(unbroken), weights(resumed)
    assert expected.keys() == got.keys() and len(got) > 10
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    before = load_file(f"{checkpoint}/adapter_model.safetensors")
    after = get_peft_model_state_dict(resumed.model)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    for log, other in zip(resumed.state.log_history, unbroken.state.log_history, strict=True):
        for key in keys:
            assert log.get(key) == other.get(key), key
