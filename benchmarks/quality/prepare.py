"""Train the tokenizer on the training splits and encode every split. Runs on a CPU.

    python -m benchmarks.quality.prepare --corpus DIR --work DIR

The work directory holds text in another form (ids, and a vocabulary learned from it): keep it out of the repository.
"""

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .data import CORPORA, save_documents

SPLITS = ("train", "validation", "test")
VOCABULARY = 16_384
END, PAD = "<|endoftext|>", "<|pad|>"


def texts(corpus: Path, name: str, split: str) -> Iterator[str]:
    with gzip.open(corpus / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learned from the training splits alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for name in CORPORA for text in texts(corpus, name, "train")), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with {books,math}.{split}.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="where the encoded splits go")
    args = parser.parse_args()
    prepare(args.corpus, args.work)


def prepare(corpus: Path, work: Path) -> None:
    """Do what is not done yet."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer" / "tokenizer.json").is_file():
        started = time.perf_counter()
        train_tokenizer(corpus).save_pretrained(work / "tokenizer")
        print(f"tokenizer: {time.perf_counter() - started:.0f} s", flush=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    sizes = {}
    for name in CORPORA:
        for split in SPLITS:
            path = work / f"{name}.{split}.npz"
            if path.is_file():
                continue
            documents, size = [], 0
            for text in texts(corpus, name, split):
                documents.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                size += len(text.encode())
            save_documents(path, documents)
            tokens = sum(map(len, documents))
            sizes[f"{name}.{split}"] = {"tokens": tokens, "bytes": size}
            print(f"{name}.{split}: {tokens:,} tokens, {size / tokens:.2f} bytes a token", flush=True)
    if sizes:
        (work / "sizes.json").write_text(json.dumps(sizes, indent=2))


if __name__ == "__main__":
    main()
