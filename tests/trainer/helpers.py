"""A tiny corpus, and callbacks that look at a run."""

from datasets import Dataset
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
