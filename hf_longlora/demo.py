"""Parts of the offline demonstration: text that every machine has, a tokenizer and a small Llama.

The text is the source of Python's own standard library. It needs no download, it is long, and its identifiers come
back far apart, so that a model that reads 2,048 tokens can do better than one that reads 256.
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


def stdlib_documents() -> tuple[dict[str, str], dict[str, str]]:
    """The running Python's standard library as two sets of documents, split by file.

    A file goes to the test set by the SHA-256 of its name relative to the library's folder, so the same file always
    lands on the same side (another Python version has other files and other text). Tests, vendored applications,
    installed packages, files that are not UTF-8 and files of less than 512 characters are left out.

    Returns:
        `(train, test)`, each from the relative name (`"json/decoder.py"`) to the text, sorted by name. About nine
        files in ten are in `train`.

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
    """Train a byte-level BPE tokenizer: any text round-trips, no unknown token.

    Args:
        texts: the documents to learn from (give it the training set only).
        vocab_size: entries, the 256 bytes and the two special tokens (`<|endoftext|>` = 0, `<|pad|>` = 1) included.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [EOS_TOKEN, PAD_TOKEN]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size={vocab_size} is below the {256 + len(special)} that bytes and special tokens need"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )


def demo_model_config(vocab_size: int = 512) -> LlamaConfig:
    """A Llama of 0.78 M parameters that two CPU cores pretrain in two minutes at a context of 256 tokens.

    Narrow on purpose: with 819k training tokens it reached perplexity 14.9 (400 steps of 8 rows, 74 CPU seconds), and
    one 192 wide (1.7 M parameters) 17.6 (200 steps of 16 rows, 136 CPU seconds).
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
    steps: int = 800,
    batch_size: int = 8,
    muon_lr: float = 0.03,
    adamw_lr: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> LlamaForCausalLM:
    """Train a model from random weights at its `max_position_embeddings`, on the device torch defaults to.

    The matrices are trained with Muon, the embeddings and norms with AdamW: after 614k tokens of the standard library
    this reached perplexity 19 where AdamW alone stood at 53 (1.7 M parameters, a vocabulary of 512, 300 steps of
    8 x 256 tokens).

    Args:
        config: the model to make; its `max_position_embeddings` is the context in tokens.
        token_ids: one sequence of ids per document. They are joined in a shuffled order, with `config.eos_token_id`
            after each, and cut into rows of one context.
        steps: optimizer steps of `batch_size` rows each; the data is repeated where it is too short.
        muon_lr, adamw_lr: peak learning rates: 20 steps of warm-up, and down to zero over the last 3/4.
        seed: of the weights and of the order of the data.
        progress: show a progress bar with the loss.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: the documents hold fewer tokens than one row.
    """
    context = config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(token_ids), generator=generator).tolist()
    stream = torch.tensor(list(chain.from_iterable([*token_ids[index], config.eos_token_id] for index in order)))
    if len(stream) < context:
        raise ValueError(f"the documents hold {len(stream)} tokens, fewer than one row of {context}")
    rows_NS = stream[: len(stream) // context * context].view(-1, context)
    rows_NS = rows_NS[torch.randperm(len(rows_NS), generator=generator)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    matrices = [p for p in model.parameters() if p.dim() == 2 and p not in embeddings]
    others = [p for p in model.parameters() if p.dim() != 2 or p in embeddings]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [muon_lr, adamw_lr]

    with logging.tqdm(total=steps, desc="pretraining", unit="step", disable=not progress) as bar:
        for step in range(steps):
            scale = min(1.0, (step + 1) / 20, 1.3 * (1 - step / steps))
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * scale
            input_ids_BS = rows_NS[torch.arange(step * batch_size, (step + 1) * batch_size) % len(rows_NS)]
            input_ids_BS = input_ids_BS.to(model.device)
            loss = model(input_ids=input_ids_BS, labels=input_ids_BS, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.2f}")
            bar.update()
    return model.eval()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices (https://kellerjordan.github.io/posts/muon).

    `torch.optim.Muon` is the same method, but orthogonalises in bfloat16, one matrix at a time, which is slow
    on most CPUs: this one keeps fp32 and takes matrices of one shape together.

    Args:
        params: 2-D parameters only.
        lr: length of an update: each of its singular values is about `lr`, times `sqrt(rows / columns)` for tall ones.
        momentum: of the averaged gradient; the update looks one step ahead (Nesterov).
    """

    # Newton-Schulz: the quintic whose five-fold iteration brings every singular value to within about 0.7 .. 1.2.
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                by_shape.setdefault(parameter.shape, []).append((parameter, update))
            for (rows, columns), pairs in by_shape.items():
                update_NRC = self._orthogonalise(torch.stack([update for _, update in pairs]))
                for (parameter, _), update in zip(pairs, update_NRC, strict=True):
                    parameter.sub_(update, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _orthogonalise(self, matrices_NRC: torch.Tensor) -> torch.Tensor:
        a, b, c = self.COEFFICIENTS
        tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
        x = matrices_NRC.mT if tall else matrices_NRC
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(self.ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x
