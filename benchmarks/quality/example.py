"""The example `examples/smollm2_32k.yaml` as a user runs it, timed, without a network: what is in `model_cards/`.

    python -m benchmarks.quality.example --work DIR --out DIR

Trains by the file with `hf-longlora train`, on the books of the bench in the place of PG19's and the base of
`benchmarks.quality.models` (WORK/smollm2), and evaluates the adapter and the base with `hf-longlora evaluate`, each a
process of its own. OUT/smollm2-135m-32k is then what a user has. Its card, config, results and plots go to OUT/card as
well: all but the weights, to be put into `model_cards/smollm2-135m-32k`. Each length has a row of
`results/example.csv`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import ModelCard
from peft import PeftConfig
from transformers import AutoTokenizer

from hf_longlora import LongLoraConfig
from hf_longlora.hub import adapter_card
from hf_longlora.hub.card import EVALUATION_NAME, PLOT_NAME
from hf_longlora.hub.run import RUN_NAME, duration

from ..provenance import RESULTS, append_row, provenance

CONFIG = Path(__file__).parents[2] / "examples" / "smollm2_32k.yaml"
NAME = "smollm2-135m-32k"
TIMES = "example.json"
"""Seconds of each command, and what the base scored."""
PLOTS = (PLOT_NAME, "positions.png", "passkey.png")
TRAIN_TOKENS = 4_000_000
"""Of the training books, what is written out: 3.3 million are trained on."""
LENGTHS = (4096, 8192, 16_384, 32_768)


def write_texts(encoded: Path, base: Path, file: Path, tokens: int | None = None) -> None:
    """Write the documents of a split as a user has them, a `text` to a line, up to so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    with np.load(encoded) as stored:
        documents = np.split(stored["ids"].astype(np.int64), stored["ends"][:-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with file.open("w") as lines:
        for ids in documents:
            lines.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
            written += len(ids)
            if tokens is not None and written >= tokens:
                break


def timed(*command: str) -> float:
    """Run a command of `hf-longlora`, and say its seconds from its start to its end.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    print(f"$ hf-longlora {' '.join(command)}", flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hf_longlora", *command], check=True)
    return time.perf_counter() - started


def card(folder: Path) -> ModelCard:
    """The card of the adapter whose config and results lie in `folder`."""
    values, times, evaluation, run = (
        json.loads((folder / name).read_text()) for name in ("adapter_config.json", TIMES, EVALUATION_NAME, RUN_NAME)
    )
    config: Any = LongLoraConfig.from_peft_type(**values)
    perplexity = {**evaluation["perplexity"], "the base as it is": times["base"]}
    seconds = {name: duration(times[name]) for name in ("train", "evaluate")}
    return adapter_card(
        config,
        name=NAME,
        base_model=config.base_model_name_or_path,
        perplexity={"held-out novels": perplexity},
        retrieval={"passkey": evaluation["passkey"]},
        long_ppl=evaluation["long_ppl"],
        about=(
            f"What `examples/{CONFIG.name}` makes in {seconds['train']} on one {times['gpu']}, from the start of the "
            f"command to its end; evaluating it took {seconds['evaluate']}. It was run offline: the base is a 4-bit "
            f"file of `{config.base_model_name_or_path}`, made bf16 again, and so not weight for weight that one, "
            "and the books are English novels in the place of PG19's. The adapter is not on the Hub: "
            "`python -m benchmarks.quality.example` makes it."
        ),
        training=run | {"base": config.base_model_name_or_path, "commit": times["commit"]},
        plot=PLOT_NAME if (folder / PLOT_NAME).is_file() else None,
        license="apache-2.0",
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was measured of the adapter whose results lie in `folder`: a row for each length."""
    times, evaluation = (json.loads((folder / name).read_text()) for name in (TIMES, EVALUATION_NAME))
    perplexities = {record["length"]: record["perplexity"] for record in evaluation["perplexity"]["dense"]}
    found = []
    for base in times["base"]:
        length = base["length"]
        passkeys = [record["accuracy"] for record in evaluation["passkey"] if record["length"] == length]
        row = {"length": length, "ppl_base": base["perplexity"], "ppl": perplexities[length], "tokens": base["tokens"]}
        row |= {"passkeys": statistics.mean(passkeys)}
        row |= {"train_seconds": times["train"], "evaluate_seconds": times["evaluate"]}
        found.append(row | {name: times[name] for name in provenance()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="what benchmarks.quality.models has filled")
    parser.add_argument("--model", default="smollm2", help="its folder in the work directory")
    parser.add_argument("--out", type=Path, required=True, help="a folder for texts, adapter and card")
    parser.add_argument("--lengths", nargs="+", default=[str(length) for length in LENGTHS])
    parser.add_argument("--windows", default="16", help="scored at each length")
    parser.add_argument("--passkeys", default="5", help="tried at each length and depth")
    parser.add_argument("--short", default="4096", help="LongPPL's short context")
    parser.add_argument("--results", type=Path, default=RESULTS / "example.csv")
    parser.add_argument("options", nargs="*", help="further options of the training, after --")
    args = parser.parse_args()
    folder = args.work / args.model
    base, adapter, test = str(folder / "base"), args.out / NAME, args.out / "test" / "books.jsonl"
    write_texts(folder / "books.train.npz", folder / "base", args.out / "train" / "books.jsonl", TRAIN_TOKENS)
    write_texts(folder / "books.test.npz", folder / "base", test)
    places = ["--model_name_or_path", base, "--dataset_name", str(args.out / "train"), "--output_dir", str(adapter)]
    times: dict[str, Any] = {"train": timed("train", "--config", str(CONFIG), *places, *args.options)}
    scored = ["--documents", str(test), "--lengths", *args.lengths, "--max-windows", args.windows]
    more = ["--long-ppl", args.short, "--passkey", args.passkeys, "--output-dir", str(adapter)]
    times["evaluate"] = timed("evaluate", str(adapter), *scored, *more)
    times["evaluate the base"] = timed("evaluate", base, *scored, "--output-dir", str(args.out / "base"))
    of_base = json.loads((args.out / "base" / EVALUATION_NAME).read_text())
    times = times | {"base": of_base["perplexity"]["dense"]} | provenance()
    (adapter / TIMES).write_text(json.dumps(times, indent=2) + "\n")
    publish(adapter, args.out / "card")
    for row in rows(args.out / "card"):
        append_row(args.results, row)


def publish(adapter: Path, folder: Path) -> None:
    """Write an adapter's card, config, results and plots, as they would lie on the Hub, without the weights."""
    config: Any = PeftConfig.from_pretrained(adapter)
    config.base_model_name_or_path = yaml.safe_load(CONFIG.read_text())["model_name_or_path"]
    config.save_pretrained(folder)
    for name in (TIMES, EVALUATION_NAME, RUN_NAME, *(plot for plot in PLOTS if (adapter / plot).is_file())):
        shutil.copy(adapter / name, folder / name)
    card(folder).save(folder / "README.md")
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}", flush=True)


if __name__ == "__main__":
    main()
