"""The encoded corpora: for each corpus and split, one file of token ids and where its documents end."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

CORPORA = ("books", "math")


def save_documents(path: Path, documents: list[list[int]]) -> None:
    """Save documents, in 16 bits a token where the vocabulary allows."""
    ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
    joined = np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in documents])
    np.savez_compressed(path, ids=joined.astype(np.uint16) if joined.max() < 2**16 else joined, ends=ends)


def load_documents(work: Path, corpus: str, split: str) -> list[np.ndarray]:
    """The documents of a split, as int32 ids."""
    with np.load(work / f"{corpus}.{split}.npz") as file:
        return np.split(file["ids"].astype(np.int32), file["ends"][:-1])


def load_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


def train_stream(work: Path) -> torch.Tensor:
    """All training documents as one row of ids, each ended by the tokenizer's end-of-text token."""
    end = np.array([load_tokenizer(work).eos_token_id], dtype=np.int32)
    documents = [ids for corpus in CORPORA for ids in load_documents(work, corpus, "train")]
    return torch.from_numpy(np.concatenate([part for ids in documents for part in (ids, end)]))


def train_windows(work: Path, length: int, count: int, seed: int) -> np.ndarray:
    """`count` windows of `length` tokens drawn from the training documents without overlap: `[count, length]`.

    Raises:
        ValueError: if the documents hold fewer.
    """
    generator = np.random.default_rng(seed)
    windows = []
    for corpus in CORPORA:
        for ids in load_documents(work, corpus, "train"):
            start = int(generator.integers(0, len(ids) % length + 1)) if len(ids) >= length else 0
            whole = (len(ids) - start) // length
            windows.extend(ids[start : start + whole * length].reshape(whole, length))
    if len(windows) < count:
        raise ValueError(f"The training documents hold {len(windows)} windows of {length} tokens, asked for {count}.")
    return np.stack([windows[i] for i in generator.permutation(len(windows))[:count]])
