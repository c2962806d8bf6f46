"""The demo's figures as rows: `python -m benchmarks.demo --output-dir DIR` appends to `benchmarks/results/demo.csv`.

Runs the demo in DIR, or reads what it left there.
"""

import argparse
import os
import platform
import time

from hf_longlora import demo

from .provenance import RESULTS, append_row, provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="longlora-demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rope-type", default=demo.ROPE_TYPE, help="in place of the demo's own")
    options = parser.parse_args()
    demo.ROPE_TYPE = options.rope_type
    started = time.perf_counter()
    records = demo.run_demo(options.output_dir, seed=options.seed, full=True)
    seconds = time.perf_counter() - started
    for model, rows in records.items():
        for row in rows:
            append_row(
                RESULTS / "demo.csv",
                {
                    "model": model,
                    "rope_type": demo.ROPE_TYPE,
                    **row,
                    "seed": options.seed,
                    "seconds_in_all": seconds,
                    "python": platform.python_version(),  # its standard library is the text
                    "cores": os.cpu_count(),
                    **provenance(),
                },
            )


if __name__ == "__main__":
    main()
