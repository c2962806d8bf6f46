"""The adapters of the recipe as they would lie on the Hub: `model_cards/`, all but the weights.

    python -m benchmarks.quality.publish --work DIR

An adapter that is not in the work directory is trained; then its config, its results and its card are written, here
and beside the weights. Weights and base are too large for the repository; the base is `benchmarks.quality.run`'s.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftConfig

from hf_longlora import LongLoraConfig
from hf_longlora.hub import adapter_card

from ..provenance import RESULTS, append_row, provenance, read_rows
from .data import CORPORA
from .extend import LENGTHS, Run, extend
from .run import FINAL, folder, key
from .table import Row, find

OWNER = "hf-longlora"
BASE_NAME = f"{OWNER}/llama-44m-books-math-512"
RECIPE = "s2 1/16 dense_every 4"
ADAPTERS = {f"{OWNER}/llama-44m-books-math-{run.target}": run for run in FINAL if run.name == f"{RECIPE}, lora r 64"}
CARDS = Path(__file__).parents[2] / "model_cards"


def records(row: Row, corpus: str) -> list[dict[str, Any]]:
    """A row's dense perplexities, as `perplexity_by_length` gives them."""
    return [{"length": n, "perplexity": float(row[f"{corpus}_{n}"])} for n in LENGTHS if row[f"{corpus}_{n}"]]


def results(run: Run, rows: list[Row]) -> dict[str, Any]:
    """The row of an adapter, and by the names to show those of what it is compared with."""
    row = next(row for row in find(rows, run) if row["seed"] == str(run.seed))
    beside = {
        "dense training in its place": run.name.replace(RECIPE, "dense"),
        "the base, RoPE scaled and nothing trained": "rope only",
    }
    found = {}
    for label, method in beside.items():
        others = (other for other in rows if other["name"] == method and other["target"] == row["target"])
        match = [o for o in others if (o["base"], o["rope_type"]) == (row["base"], row["rope_type"])]
        match = [o for o in match if method == "rope only" or o["seed"] == row["seed"]]
        if match:
            found[label] = match[0]
    passkeys = [
        other
        for other in read_rows(RESULTS / "passkey.csv")
        if (other["name"], other["target"], other["passkey_length"]) == (run.name, row["target"], "512")
    ]
    return {**row, "beside": found, **({"retrieval": passkeys} if passkeys else {})}


def card(folder: Path) -> ModelCard:
    """The card of the adapter whose config and results lie in `folder`."""
    row = json.loads((folder / "results.json").read_text())
    config: Any = LongLoraConfig.from_peft_type(**json.loads((folder / "adapter_config.json").read_text()))
    perplexity = {}
    for corpus in CORPORA:
        found = {"dense": records(row, corpus)}
        found["as trained"] = [{"length": int(row["target"]), "perplexity": float(row[f"{corpus}_trained"])}]
        found |= {label: records(other, corpus) for label, other in row["beside"].items()}
        perplexity[f"{corpus}.test"] = found
    retrieval = [
        {"length": int(found["length"]), "depth": float(found["depth"]), "accuracy": float(found["accuracy"])}
        for found in row.get("retrieval", [])
    ]
    return adapter_card(
        config,
        name=f"{OWNER}/{folder.name}",
        base_model=BASE_NAME,
        perplexity=perplexity,
        retrieval={"passkey": retrieval} if retrieval else None,
        about=(
            "An experiment and not a model to use: what the trainer's schedule and LoRA alone do to a Llama of 44 M "
            "parameters that was trained on English novels and mathematics at 512 tokens. Neither it nor its base is "
            "on the Hub; `python -m benchmarks.quality.run` makes the base, `python -m benchmarks.quality.publish` "
            "the adapter." + (" Passkeys: after a fine-tune on the task at 512 tokens." if retrieval else "")
        ),
        training={
            "text": "English novels and mathematics, the training split",
            "tokens": f"{int(row['tokens']):,} in {row['steps']} steps",
            "learning rate": f"{row['learning_rate']}, {row['schedule']}, {row['warmup']} steps of warm-up",
            "attention FLOPs, dense training = 1": row["attention_cost"],
            "hardware": f"{row['gpu']}, {row['train_seconds']} s, shared by {row['processes']} runs",
            "versions": ", ".join(f"{library} {row[library]}" for library in ("torch", "transformers", "peft", "trl")),
            "commit": row["commit"],
            "date": row["date"],
        },
        license="apache-2.0",
    )


def publish(name: str, run: Run, adapter: Path, rows: list[Row]) -> None:
    """Write the card, the config and the results of one adapter."""
    config: Any = PeftConfig.from_pretrained(adapter)
    config.base_model_name_or_path = BASE_NAME
    folder = CARDS / name.rpartition("/")[2]
    config.save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps(results(run, rows), indent=2) + "\n")
    card(folder).save(folder / "README.md")
    for file in folder.iterdir():
        shutil.copy(file, adapter / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="tokens, tokenizer and base, as `run` leaves them")
    parser.add_argument("--base", default="base", help="folder of the base in the work directory")
    parser.add_argument("--results", type=Path, default=RESULTS / "test.csv")
    parser.add_argument("--eval-windows", type=int, default=256)
    args = parser.parse_args()
    base = args.work / args.base
    for name, run in ADAPTERS.items():
        adapter = args.work / "save" / folder(run)
        rows = read_rows(args.results)
        if not (adapter / "adapter_model.safetensors").is_file():
            made = extend(run, base, args.work, splits=("test",), windows=args.eval_windows, save=adapter)["test"]
            if key(made) not in {key(row) for row in rows}:
                append_row(args.results, {**made, **provenance(), "processes": 1})
        publish(name, run, adapter, read_rows(args.results))
        print(f"{name}: {adapter}")


if __name__ == "__main__":
    main()
