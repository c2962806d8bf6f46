import pytest
import torch

from hf_longlora import LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer

from .helpers import STAGES, texts


@pytest.fixture
def make(tiny_llama, tiny_tokenizer, tmp_path):
    """A trainer of a tiny Llama (64 tokens long) in fp32 on the CPU; the same weights at each call."""

    def trainer(
        *,
        model=None,
        peft_config="default",
        dataset=None,
        output="out",
        callbacks=None,
        eval_dataset=None,
        formatting_func=None,
        kind=LongLoraSFTTrainer,
        **arguments,
    ):
        torch.manual_seed(0)
        options = dict(
            output_dir=str(tmp_path / output),
            stages=STAGES,
            dense_every=0,
            sparse="s2",
            use_cpu=True,
            bf16=False,
            report_to="none",
            report=False,  # its pictures take longer than the run
            disable_tqdm=True,
            logging_steps=1,
            per_device_train_batch_size=2,
            packing=True,
            packing_strategy="wrapped",
            save_strategy="no",
            learning_rate=1e-3,
            warmup_steps=1,
            gradient_checkpointing=False,
        )
        return kind(
            model=tiny_llama() if model is None else model,
            args=LongLoraSFTConfig(**options | arguments),
            train_dataset=texts() if dataset is None else dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=LongLoraConfig(r=4) if peft_config == "default" else peft_config,
            callbacks=callbacks,
            formatting_func=formatting_func,
        )

    return trainer
