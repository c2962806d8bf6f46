"""A run that diverges or needs too much memory says what to do, and leaves what was good."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from hf_longlora import LongLoraSFTTrainer
from hf_longlora.trainer.trouble import LAST_GOOD_NAME, beginnings, has_diverged, out_of_memory

from .helpers import Spy, texts


def documents_of_step(trainer, step):
    """How the two rows that step `step`, from 1, has seen begin."""
    rows = trainer.train_dataset[2 * (step - 1) : 2 * step]["input_ids"]
    return ", ".join(repr(trainer.processing_class.decode(row[:12])) for row in rows)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_the_run_and_keeps_the_last_good_adapter(make, what, tiny_llama, tmp_path):
    class Diverging(LongLoraSFTTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 4:
                if what == "loss":
                    return loss * float("nan")
                loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss

    trainer = make(callbacks=[Spy()])
    trainer.__class__ = Diverging
    with pytest.raises(FloatingPointError, match=rf"{what} of step 5 \(stage 2\).*last-good") as error:
        trainer.train()
    assert f"The last batch begins with {documents_of_step(trainer, 5)}. " in str(error.value)
    torch.manual_seed(0)
    kept = PeftModel.from_pretrained(tiny_llama(), str(Path(tmp_path, "out", LAST_GOOD_NAME)))
    values = {k: v for k, v in kept.state_dict().items() if "lora" in k or "modules_to_save" in k}
    assert values and all(v.isfinite().all() for v in values.values())
    assert any(v.abs().sum() > 0 for k, v in values.items() if "lora_B" in k)
    assert kept.config.rope_parameters["factor"] == 4.0


def test_fp16_skips_a_step_of_infinite_gradients_and_goes_on(make):
    """Its loss scaler tries a scale that overflows now and then, and skips that step: no divergence."""

    class Overflowing(LongLoraSFTTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 4:
                loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss

    class Scaler(TrainerCallback):
        skipped = 0

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not all(gradient.isfinite().all() for gradient in gradients):
                self.skipped += 1
                for gradient in gradients:
                    gradient.zero_()

    scaler = Scaler()
    trainer = make(callbacks=[scaler], max_grad_norm=0.0)
    trainer.__class__ = Overflowing
    trainer.args.fp16 = True  # there is no scaler on a CPU
    assert trainer.train().global_step == 6
    assert scaler.skipped == 1


def test_the_last_good_adapter_stays_off_the_hub(make, monkeypatch):
    """`push_to_hub` pushes what a user saves; this is saved for him, and a half-trained adapter is no release."""
    trainer = make()
    pushed = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda **_: pushed.append(1))
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "compute_loss", lambda *_, **__: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(FloatingPointError, match="loss of step 1"):
        trainer.train()
    assert not pushed


def test_a_loss_worse_than_a_guess_ends_the_run(make, tmp_path):
    """The loss stays finite, and the model is gone."""

    class Worse(LongLoraSFTTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * 0.5 if self.state.global_step < 2 else loss + 3

    trainer = make(save_strategy="steps", save_steps=2, report=True)
    trainer.__class__ = Worse
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "at step 4 (stage 2)" in message and "4.85 of a uniform guess over 128 tokens" in message
    assert f"The last batch begins with {documents_of_step(trainer, 4)}. Lower the learning rate" in message
    assert f"The last checkpoint is {tmp_path / 'out' / 'checkpoint-4'}" not in message  # the bad step is not kept
    assert f"The last checkpoint is {tmp_path / 'out' / 'checkpoint-3'}" in message
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 3, 4]  # trackers have it, too
    assert Path(tmp_path, "out", "report.html").is_file()


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([3.0, 2.0, 5.0, 5.0], True),
        ([3.0, 2.0, 5.0], False),  # a spike
        ([3.0, 2.0, 5.0, 4.0], False),
        ([6.0, 5.5, 5.5, 5.2], False),  # a random model, which begins above a uniform guess
        ([4.5, 4.2, 5.0, 5.0], False),  # it had not learned anything yet
        ([], False),
    ],
)
def test_divergence_is_told_from_a_bad_start_and_from_a_spike(losses, diverged):
    assert has_diverged(losses, 128) is diverged


def test_documents_are_named_by_their_beginnings(tiny_tokenizer):
    def ids(text):
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    first, second = ids("It was a long book. " * 9), ids("A fox jumps. " * 9)
    packed = {
        "input_ids": torch.tensor([first + second]),
        "position_ids": torch.tensor([[*range(len(first)), *range(len(second))]]),
    }
    named = beginnings(packed, tiny_tokenizer)
    assert "'It was a" in named and "'A fox" in named and "more" not in named
    assert beginnings({"input_ids": packed["input_ids"]}, tiny_tokenizer).count("'") == 2  # one stream, one document
    assert beginnings(packed, tiny_tokenizer, documents=1).endswith(" and 1 more documents")
    assert beginnings(packed, None, documents=1, tokens=2).startswith(f"'{first[:2]}'")


def test_out_of_memory_is_one_message_with_what_helps(make, tmp_path):
    class Large(LongLoraSFTTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return super().compute_loss(*args, **kwargs)

    trainer = make(gradient_accumulation_steps=3)
    trainer.__class__ = Large
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    message = str(error.value)
    assert "in step 5 (stage 2: 256 tokens in a sequence, 2 in a batch" in message
    assert "per_device_train_batch_size=1 and gradient_accumulation_steps=6; " in message
    name = (
        "activation_checkpointing" if hasattr(trainer.args, "activation_checkpointing") else "gradient_checkpointing"
    )
    assert all(option in message for option in (f"{name}=True", "mlp_tile=4096", "activation_offloading=True"))
    assert "Tried to allocate" in str(error.value.__cause__)


def test_out_of_memory_in_an_evaluation_says_so(make):
    class Large(LongLoraSFTTrainer):
        def compute_loss(self, model, *args, **kwargs):
            if not model.training:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return super().compute_loss(model, *args, **kwargs)

    for batch, helps in ((8, "per_device_eval_batch_size=1; shorter texts"), (1, "shorter texts")):
        trainer = make(eval_strategy="steps", eval_steps=2, eval_dataset=texts(2), per_device_eval_batch_size=batch)
        trainer.__class__ = Large
        with pytest.raises(torch.OutOfMemoryError) as error:
            trainer.train()
        assert f"after step 2 (up to 256 tokens in a sequence, {batch} in a batch" in str(error.value)
        assert f"What helps: {helps} in eval_dataset; " in str(error.value)


def test_advice_leaves_out_what_is_done_already(make):
    trainer = make(per_device_train_batch_size=1, gradient_checkpointing=True, mlp_tile=4096)
    trainer.model.get_base_model().is_loaded_in_4bit = True
    message = out_of_memory(trainer.args, trainer.schedule, 0, trainer.model)
    assert "What helps: activation_offloading=True; shorter stages. " in message
