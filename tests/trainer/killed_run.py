"""A tiny staged run that is there to be killed: a fork server imports this module once, each run is a fork of it."""

import errno
import itertools
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerState

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer
from hf_longlora.trainer import last_checkpoint

STEPS = 8
WRITERS = {  # what writes a checkpoint's files, in order
    "model": (Trainer, "save_model"),
    "optimizer": (Trainer, "_save_optimizer_and_scheduler"),
    "rng": (Trainer, "_save_rng_state"),
    "state": (TrainerState, "save_to_json"),
}


def die_after(name: str, torn: bool) -> None:
    """SIGKILL this process when the second checkpoint of its own has written what `name` says; `torn`: half of it.

    A run that has fewer left to write ends by itself.
    """
    owner, method = WRITERS[name]
    original, calls = getattr(owner, method), []

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not (args and "checkpoint-" in str(args[0])):  # the adapter or the report at the end of the run
            return result
        calls.append(args)
        if len(calls) == 2:
            if torn:
                path = Path(args[0])
                files = [path] if path.is_file() else sorted(path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
                os.truncate(files[-1], files[-1].stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, method, dying)


def count_calls(die_at: int, how: int) -> Iterator[int]:
    """Count the functions that this process calls; at the `die_at`-th a signal, at a moment that no clock decides."""
    calls = itertools.count(1)

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and next(calls) == die_at:
            os.kill(os.getpid(), how)

    sys.setprofile(profile)
    return calls


def full_disk_after(name: str) -> None:
    """From the second checkpoint's `name` on, no checkpoint's file can be written: ENOSPC, as a full disk says it."""
    owner, method = WRITERS[name]
    original, calls = getattr(owner, method), []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return original(self, *args, **kwargs)

    setattr(owner, method, failing)


def run(
    output: str,
    tokenizer: str,
    at: str | None = None,
    torn: bool = False,
    full: str | None = None,
    bytes_on_disk: int = 0,
    die_at: int = 0,
    how: int = signal.SIGKILL,
    counted: bool = False,
    streamed: bool = False,
) -> None:
    calls = count_calls(die_at, how) if die_at or counted else None
    torch.set_num_threads(1)
    disable_progress_bars()
    log = os.open(output + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if at is not None:
        die_after(at, torn)
    if full is not None:
        full_disk_after(full)
    if bytes_on_disk:  # no file may grow beyond: writing fails as it does on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_on_disk, resource.RLIM_INFINITY))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    args = LongLoraSFTConfig(
        output_dir=output,
        stages=[ContextStage(128, STEPS // 2), ContextStage(256, STEPS // 2)],
        dense_every=2,
        packing=True,
        packing_strategy="wrapped",
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_steps=1,
        save_total_limit=2,
        shuffle_buffer=3,
        disable_tqdm=True,
        report_to="none",
    )
    data = Dataset.from_dict({"text": [f"{i}: " + "It was a bright day. " * (20 + i) for i in range(8)]})
    trainer = LongLoraSFTTrainer(
        LlamaForCausalLM(config),
        args,
        train_dataset=data.to_iterable_dataset(num_shards=2) if streamed else data,
        processing_class=PreTrainedTokenizerFast.from_pretrained(tokenizer),
        peft_config=LongLoraConfig(r=4, lora_dropout=0.1),  # the random state has to come back, too
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(output, "losses.json").write_text(json.dumps(losses))
    if calls is not None:
        Path(output, "calls").write_text(str(next(calls)))
