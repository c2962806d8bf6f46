"""The tables of `benchmarks/README.md` on models that others trained, from `results/pretrained.csv`.

    python -m benchmarks.quality.pretrained_table [--split test] [--against "dense, abf 1.5"]

A line for each method: mean perplexity over the seeds it has, and above dense training, in %, a number for each seed
(against dense training of the same seed, corpus and length). Seconds of training are those of a GPU without other
work, and so are the shares: of dense training's on the same kind of GPU with the same kernels.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..provenance import RESULTS, read_rows

Row = dict[str, str]


def above(row: Row, dense: Sequence[Row], column: str) -> float | None:
    """How far a row lies above dense training of its seed, in %, with the same kernels where there is such a row."""
    for other in sorted(dense, key=lambda other: other["liger"] != row["liger"]):
        if all(row[name] == other[name] for name in ("model", "corpus", "length", "seed", "split", "rank")):
            return 100 * (float(row[column]) / float(other[column]) - 1)
    return None


def share(row: Row, dense: Sequence[Row]) -> float | None:
    """Seconds of training as a share of dense training's, on the same GPU with the same kernels."""
    if not row["train_seconds"] or row["shared_gpu"] == "1":
        return None
    same = ("model", "length", "gpu", "liger")
    times = [
        float(other["train_seconds"])
        for other in dense
        if all(row[name] == other[name] for name in same) and other["shared_gpu"] == "0"
    ]
    return float(row["train_seconds"]) / statistics.mean(times) if times else None


def table(rows: Sequence[Row], model: str, length: str, split: str, against: str) -> list[str]:
    chosen = [r for r in rows if r["model"] == model and r["length"] == length and r["split"] == split]
    dense = [r for r in chosen if r["method"] == against]
    corpora = sorted({r["corpus"] for r in chosen})
    head = [f"{c}: all | last 2,048 | above, % (all; last) | first 8,192" for c in corpora]
    lines = ["| " + " | ".join([f"{model}, {int(length):,}", *head, "seconds, share"]) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for method in dict.fromkeys(r["method"] for r in chosen):
        cells = [method]
        own = [r for r in chosen if r["method"] == method]
        for corpus in corpora:
            here = sorted((r for r in own if r["corpus"] == corpus), key=lambda r: int(r["seed"]))
            if not here:
                cells += ["", "", "", ""]
                continue
            cells += [f"{statistics.mean(float(r[c]) for r in here):.3f}" for c in ("ppl", "ppl_last_2048")]
            gaps = [[above(r, dense, c) for r in here] for c in ("ppl", "ppl_last_2048")]
            texts = [", ".join(f"{g:+.2f}" for g in gap if g is not None) for gap in gaps]
            cells.append("; ".join(texts) if method != against else "")
            cells.append(_mean(here, "ppl_first_8192"))
        shares = [s for r in own if (s := share(r, dense)) is not None]
        seconds = _mean([r for r in own if r["shared_gpu"] == "0"], "train_seconds", 1)
        cells.append(seconds + (f", {statistics.mean(shares):.2f}" if shares else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _mean(rows: Sequence[Row], column: str, digits: int = 3) -> str:
    values = [float(r[column]) for r in rows if r[column]]
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--against", default="dense")
    parser.add_argument("--results", type=Path, default=RESULTS / "pretrained.csv")
    args = parser.parse_args()
    rows = read_rows(args.results)
    for model, length in dict.fromkeys((r["model"], r["length"]) for r in rows):
        print("\n".join(table(rows, model, length, args.split, args.against)), end="\n\n")


if __name__ == "__main__":
    main()
