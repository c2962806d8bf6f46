"""The base model of the demonstration: its text, its tokenizer and its training, offline.

The text is the source of Python's own standard library: it needs no download, and many of its files are long.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"})
TEST_PERCENT = 10
MUON_RATE, ADAMW_RATE = 0.03, 0.01
"""Learning rates at their peaks."""


def stdlib_documents() -> tuple[dict[str, str], dict[str, str]]:
    """The running Python's standard library as documents to train and to test on, by name (`"json/decoder.py"`).

    The same file always lands on the same side, one in ten in the test set, by the SHA-256 of its name.

    Raises:
        FileNotFoundError: this Python carries no library sources (a frozen or zipped one).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    test: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(name.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) < 512:
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        is_test = int.from_bytes(digest[:4], "big") % 100 < TEST_PERCENT
        (test if is_test else train)[name.as_posix()] = text
    if not train or not test:
        raise FileNotFoundError(f"no Python sources under {root}: the demo reads the standard library's own text")
    return train, test


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `vocab_size` entries, bytes and special tokens among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )


def demo_model_config(vocab_size: int = 512) -> LlamaConfig:
    """A Llama of 0.78 M parameters that two CPU cores pretrain in two minutes at a context of 256 tokens.

    Narrow on purpose: at the same number of training tokens it is faster than a wider one, and not worse.
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def pretrain(
    config: LlamaConfig,
    token_ids: Sequence[Sequence[int]],
    *,
    steps: int = 1000,
    batch_size: int = 8,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> LlamaForCausalLM:
    """Train a model from random weights at its `max_position_embeddings`.

    The matrices are trained with Muon, the embeddings and norms with AdamW: in two minutes of two CPU cores, AdamW
    alone gets nowhere near.

    Args:
        token_ids: Of each document; they are joined in a shuffled order and cut into rows of one context.
        checkpoint: A file to keep the state in while training, and to go on from if it is there.
    """
    context = config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(token_ids), generator=generator).tolist()
    stream = torch.tensor(list(chain.from_iterable(token_ids[index] for index in order)))
    rows_NS = stream[: len(stream) // context * context].view(-1, context)
    rows_NS = rows_NS[torch.randperm(len(rows_NS), generator=generator)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
    if torch.cuda.is_available():
        model.to("cuda")
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    matrices = [p for p in model.parameters() if p.dim() == 2 and p not in embeddings]
    others = [p for p in model.parameters() if p.dim() != 2 or p in embeddings]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    parts: list[Any] = [model, *optimizers]
    first = 0
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        for part, values in zip(parts, state["parts"], strict=True):
            part.load_state_dict(values)

    with logging.tqdm(total=steps, initial=first, desc="base model", unit="step", disable=not progress) as bar:
        for step in range(first, steps):
            if checkpoint is not None and step % 100 == 0 and step > first:
                state = {"step": step, "parts": [part.state_dict() for part in parts]}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)  # whole or not at all
            scale = min(1.0, (step + 1) / 20, 1.3 * (1 - step / steps))
            for optimizer, peak in zip(optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
                optimizer.param_groups[0]["lr"] = peak * scale
            input_ids_BS = rows_NS[torch.arange(step * batch_size, (step + 1) * batch_size) % len(rows_NS)]
            input_ids_BS = input_ids_BS.to(model.device)
            loss = model(input_ids=input_ids_BS, labels=input_ids_BS, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
            bar.update()
    return model.eval()
