"""TRL's trainers of preferences and rewards on extended models.

The reference is the extended model, and what a model says is scored as it was drawn.
"""

import math
import warnings

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from hf_longlora import LongLoraConfig, s2_attention_mode
from hf_longlora.attention import interface

TARGET = 256
PROMPT = "a long book has many chapters, " * 3
WORDS = [PROMPT + str(i) for i in range(8)]
EXTENDED = LongLoraConfig(r=4, target_length=TARGET, rope_type="yarn")


@pytest.fixture
def base(tiny_llama):
    """A Llama whose weights are large enough for positions to matter."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.set_attn_implementation("s2attn")
    return model


@pytest.fixture
def shared(tmp_path):
    return dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=4,
    )


def first_loss(model, peft_config, tokenizer, shared, **options):
    args = DPOConfig(**shared, max_steps=1, max_length=TARGET, learning_rate=1e-3, **options)
    data = Dataset.from_dict({"prompt": ["Q"] * 8, "chosen": WORDS, "rejected": [word[::-1] for word in WORDS]})
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    return trainer, trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("kept", ["the PeftModel", "merged", "precomputed"])
def test_the_reference_of_an_extended_model_is_the_extended_model(base, tiny_tokenizer, shared, kept):
    extended = get_peft_model(base, EXTENDED)
    given, peft_config, options = extended, None, {}
    if kept == "merged":
        given, peft_config = extended.merge_and_unload(), LongLoraConfig(r=4)
    elif kept == "precomputed":
        options = {"precompute_ref_log_probs": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Without its adapter")
        trainer, loss = first_loss(given, peft_config, tiny_tokenizer, shared, **options)
    assert loss == pytest.approx(math.log(2), abs=1e-5)
    assert trainer.model.config.max_position_embeddings == TARGET
    assert trainer.model.base_model.parts()["norms"][0].ne(1).any()  # and a step was made


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=str)
def test_a_reference_without_the_extension_is_told(base, tiny_tokenizer, shared, options):
    with pytest.warns(UserWarning, match=r"its own RoPE, for 64 tokens.*of 256\. Extend first.*PeftModel"):
        _, loss = first_loss(base, EXTENDED, tiny_tokenizer, shared, **options)
    assert abs(loss - math.log(2)) > 0.05


def test_an_adapter_that_is_not_trained_is_switched_off_without_a_word(base, tiny_llama, tmp_path):
    get_peft_model(base, EXTENDED).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            assert model.config.max_position_embeddings == 64


class Scored(GRPOTrainer):
    """Keeps how much more probable its tokens are when they are scored than when they were drawn."""

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        assert model.training
        scored = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with torch.no_grad():
            drawn = super()._get_per_token_logps_and_entropies(model.eval(), *args, **kwargs)
        model.train()
        self.ratios = [*getattr(self, "ratios", []), (scored[0].detach() - drawn[0]).exp()]
        return scored


@pytest.mark.parametrize("mode", ["auto", "dense"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_what_the_model_says_is_scored_as_it_was_drawn(base, tiny_tokenizer, shared, monkeypatch, mode, beta):
    said = []
    monkeypatch.setattr(interface.logger, "warning_once", said.append)
    args = GRPOConfig(
        **shared,
        max_steps=2,
        num_generations=4,
        num_iterations=2,
        max_completion_length=40,
        learning_rate=0.0,
        beta=beta,
    )
    model = get_peft_model(base, EXTENDED)
    trainer = Scored(
        model,
        args=args,
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 8}),
        processing_class=tiny_tokenizer,
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    with s2_attention_mode(model, mode):
        trainer.train()
    assert len(trainer.ratios) >= 2
    off = torch.cat([(ratio - 1).abs().flatten() for ratio in trainer.ratios])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["clip_ratio/region_mean"] == 0 for log in logs)  # TRL's own, of scores against scores
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    if mode == "dense":
        assert off.max() < 1e-4 and not said
        assert beta == 0 or all(abs(log["kl"]) < 1e-6 for log in logs)  # the reference is the extended model
    else:
        assert off.max() > 0.5
        assert said and all('s2_attention_mode(model, "dense")' in line for line in said)
