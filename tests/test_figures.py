"""Figures of README, guides and examples are those of rows of `benchmarks/results`.

Each is computed here from its rows, and looked for as the page has it. Where a row is measured anew, the page follows.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.provenance import RESULTS, read_rows
from benchmarks.quality.pretrained_table import DENSE, THETA, Cell, pages, written

ROOT = Path(__file__).parent.parent
DEFAULT = f"windows, 2nd dense{THETA}"
EQUAL_TIME = f"dense of equal time{THETA}"
PAPER = "s2 1/4 linear (the paper)"
QWEN: dict[str, Any] = {"model": "qwen", "length": 131_072}
GEMMA = {**QWEN, "model": "gemma"}
ENDS = ("ppl", "ppl_last_2048")
HALF_UP = 1e-9
"""Rows have five digits, and a last one of 5 is rounded up."""


@cache
def stored(table: str) -> list[dict[str, str]]:
    return read_rows(RESULTS / f"{table}.csv")


def rows(table: str, **where: object) -> list[dict[str, str]]:
    found = [row for row in stored(table) if all(row[name] == str(value) for name, value in where.items())]
    assert found, (table, where)
    return found


def last(table: str, column: str, **where: object) -> float:
    """Of the last such row: a measurement that was repeated stands for those before."""
    return float(rows(table, **where)[-1][column])


def step(method: str, length: int, column: str = "s_p50", **where: object) -> float:
    return last("train_step", column, model="8b", method=method, length=length, **where)


def mixed(length: int, every: int) -> float:
    """Seconds of a mean step with Liger and tiles, each so many steps a dense one."""
    sparse, dense = (step(f"ours-{kind}+liger+tile", length, kernel="flash") for kind in ("2048", "dense"))
    return (dense + (every - 1) * sparse) / every


def attention(method: str, group: int, **where: object) -> float:
    where = {"length": 131_072, "gpu": "NVIDIA H200", **where}
    return last("attention", "ms_p50", method=method, group=group, **where)


def pretrained(method: str, length: int = 65_536, model: str = "smollm2") -> Cell:
    of = {"model": model, "length": length, "split": "test"}
    return Cell(rows("pretrained", method=method, **of), rows("pretrained", method=DENSE, **of))


def above(method: str, corpus: str, column: str = "ppl", **where: object) -> list[float]:
    """In % above dense training, a number for each seed."""
    return pretrained(method, **where).above(corpus, column)


def ranged(values: Iterable[float], digits: int = 1) -> str:
    """The least and the greatest of several seeds, or what both are."""
    values = sorted(values)
    return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in (values[0], values[-1])))


def demo(model: str) -> str:
    found = rows("demo", model=model, rope_type="yarn")[-4:]
    assert [row["length"] for row in found] == ["256", "512", "1024", "2048"]
    return " | ".join(f"{float(row['perplexity']) + HALF_UP:.2f}" for row in found)


def quality(name: str, corpus: str = "math", **where: object) -> float:
    row = rows("quality", name=name, **where)[-1]
    return float(row[f"{corpus}_{row['target']}"])


YARN_44M = {"base": "574aae8a", "target": 4096, "seed": 0, "learning_rate": 0.0003, "rope_type": "yarn"}
GROUPS_44M = "s2 1/16 dense_every 4"


def apart(name: str, corpus: str, **where: object) -> str:
    """Of the 44 M study: in % above dense training."""
    return f"{100 * (quality(name, corpus, **where) / quality('dense', corpus, **where) - 1):+.2f}"


def passkeys(name: str) -> float:
    found = [float(row["accuracy"]) for row in rows("passkey", name=name, passkey_length=4096)]
    return 100 * sum(found) / len(found)


def yarn_above_theta(length: int, corpus: str) -> str:
    ends = (above("dense", corpus, column, length=length) for column in ENDS)
    return "; ".join(", ".join(f"{value:+.1f}" for value in values) + "%" for values in ends)


def planner() -> str:
    planned = rows("planning")
    memory, time = (max(abs(float(row[c].rstrip("%"))) for row in planned if row[c]) for c in ("gib_error", "s_error"))
    return f"its memory is at most {memory:.1f}% off and its time {time:.0f}%"


def readme() -> list[str]:
    books, share = above(DEFAULT, "books"), pretrained(DEFAULT).share
    (qwen, qwen_end), (gemma, gemma_end) = (
        [max(x for corpus in ("books", "math") for x in above(DEFAULT, corpus, c, **of)) for c in ENDS]
        for of in (QWEN, GEMMA)
    )
    paper, theta = (
        [ranged(above(method, corpus), digits) for corpus in ("books", "math")]
        for method, digits in ((PAPER, 0), (f"s2 1/4{THETA}", 1))
    )
    sparse = {
        n: step("ours-2048+liger+tile", n, kernel="flash", gpu="NVIDIA H200") for n in (8192, 32768, 131072, 262144)
    }
    dense = {n: step("ours-dense+liger+tile", n, kernel="flash") for n in sparse}
    offloaded = {"method": "ours-2048+liger+tile+offload", "gpu": "NVIDIA H100 80GB HBM3"}
    million = {"model": "qwen3-8b", "tokens": 1_048_576, "group": 2048}
    return [
        f"ends {ranged(books)}% above dense training's perplexity in {share:.2f} of its time",
        f"Dense training of fewer steps, in that time, ends {ranged(above(EQUAL_TIME, 'books'))}% above",
        f"{dense[8192]:.2f} / {mixed(8192, 2):.2f} / {mixed(8192, 4):.2f} / {sparse[8192]:.2f} |",
        f"{dense[32768]:.1f} / {mixed(32768, 2):.1f} / {mixed(32768, 4):.1f} / {sparse[32768]:.1f} |",
        f"({mixed(131072, 8):.1f} s) | {dense[131072]:.1f} / {mixed(131072, 2):.1f} / {mixed(131072, 4):.1f} / "
        f"{sparse[131072]:.1f} |",
        f"takes {mixed(262144, 8):.1f} s | {dense[262144]:.0f} / {mixed(262144, 2):.1f} / {mixed(262144, 4):.1f} / "
        f"{sparse[262144]:.1f} ({step('ours-2048+liger+tile', 262144, 'peak_gpu_gib'):.1f} GiB; "
        f"{last('train_step', 'peak_gpu_gib', length=262144, **offloaded):.1f} with",
        f"{last('train_step', 's_p50', length=524288, **offloaded):.1f} (H100; "
        f"{last('train_step', 'peak_gpu_gib', length=524288, **offloaded):.1f} GiB, and "
        f"{last('train_step', 'peak_pinned_gib', length=524288, **offloaded):.0f} pinned on the host) |",
        f"takes {step('ours-2048+kernel=flash', 131072):.1f} s, against {step('stock', 131072):.1f} s of TRL and PEFT "
        f"as they come ({step('stock+fa4', 131072):.1f} s with FlashAttention 4)",
        f"take {last('million', 's_p50', **million):.1f} s a sparse step on four H200, "
        f"{last('million', 'peak_gpu_gib', **million):.0f} GiB a card",
        f"| base, trained at 256 | {demo('base')} |",
        f"| base + RoPE scaling (YaRN), untrained | {demo('base + RoPE scaling')} |",
        f"| LoRA, dense training | {demo('LoRA, dense')} |",
        f"| LongLoRA | {demo('LongLoRA')} |",
        f"| LongLoRA, shifted sparse attention alone | {demo('LongLoRA, S2 alone')} |",
        f"{last('demo', 'seconds_in_all', model='LongLoRA'):.0f} seconds on two CPU cores",
        f"at most {qwen:.2f}% above dense training, its end {qwen_end:.2f}%, at "
        f"{pretrained(DEFAULT, **QWEN).share:.2f} of the time; Gemma 3 270M: at most {gemma:.2f}%, its end "
        f"{gemma_end:.2f}%, at {pretrained(DEFAULT, **GEMMA).share:.2f}",
        f"ends {paper[0]}% (books) and {paper[1]}% (math) above dense training in these 50 steps; with a larger theta "
        f"it is {theta[0]}% and {theta[1]}%",
        planner(),
    ]


def groups() -> list[str]:
    ends = [value for corpus in ("books", "math") for value in above(DEFAULT, corpus, "ppl_last_2048")]
    slower = [
        value for nth in ("3rd", "4th") for value in above(f"windows, {nth} dense{THETA}", "books", "ppl_last_2048")
    ]
    alone = f"native windows, scattered{THETA}"
    pose = [above(f"pose{THETA}", corpus, "ppl_last_2048")[0] for corpus in ("books", "math")]
    untrained = [above("yarn alone", corpus)[0] for corpus in ("books", "math")]
    own, many = (above(f"{name}, 4th dense{THETA}", "books") for name in ("native windows", "windows"))
    short = {"length": 32_768}
    unshifted, sinks = (
        above(f"s2 native + sinks{undone}, 4th dense{THETA}", "books", **short)[0]
        for undone in (", half of the shift undone", "")
    )
    at_16x = {"base": "9f01e295", "target": 8192, "seed": 0}
    lines = [
        f"| {shown} | {dense + HALF_UP:.3f} | {sparse + HALF_UP:.3f} | {100 * (sparse / dense - 1):+.2f} |"
        for shown, name in {
            "3e-4, r = 64, 160": "lora r 64",
            "1e-3": "lora r 64 lr 0.001",
            "1e-3, 320 steps": "lora r 64 lr 0.001 steps 320",
            "6e-4, r = 256": "lora r 256 lr 0.0006",
        }.items()
        for dense, sparse in [
            [quality(f"{method}, {name}", **at_16x) for method in ("dense", "s2 1/16 dense_every 4")]
        ]
    ]
    names = ("rank 8", "rank 256", "norms only", "neither norms nor embeddings", "rate 1e-4", "rate 1e-3")
    changed = {name: above_default(name) for name in (*names, "half of the steps", "twice the steps")}
    in_turn = last("pretrained", "sparse_step_p50", method=f"pose{THETA}", corpus="books", length=65_536, split="test")
    at_once = last("pretrained", "sparse_step_p50", method=DEFAULT, corpus="books", length=65_536, split="test")
    s2 = f"s2 native + sinks, 4th dense{THETA}"
    (s2_qwen, windows_qwen), (s2_gemma, windows_gemma) = (
        [[above(method, "books", c, **of)[0] for c in ENDS] for method in (s2, other)]
        for of, other in ((QWEN, f"windows, 3rd dense{THETA}"), (GEMMA, DEFAULT))
    )
    stages = [
        100 * (quality(f"dense through {n}", corpus, seed=0) / quality("dense", corpus, **YARN_44M) - 1)
        for n in (2, 3)
        for corpus in ("books", "math")
    ]
    study = {
        "1/4, never dense (the paper's)": "s2 1/4",
        "1/8, every 4th step dense": "s2 1/8 dense_every 4",
        "1/16, every 8th": "s2 1/16 dense_every 8",
        "dense, 30% of the steps": "dense cut 0.3",
    }
    linear = YARN_44M | {"base": "2bd1553f", "learning_rate": 0.001, "rope_type": "linear"}
    of_linear = [float(apart("s2 1/4", corpus, **linear)) for corpus in ("books", "math")]
    seeds = (
        ", ".join(apart(GROUPS_44M, corpus, **(YARN_44M | {"seed": seed})) for seed in (0, 1, 2))
        for corpus in ("books", "math")
    )
    return [
        *(
            f"| {shown} | {last('quality', 'attention_cost', name=name, **YARN_44M):.3f} | "
            f"{apart(name, 'books', **YARN_44M)} | {apart(name, 'math', **YARN_44M)} |"
            for shown, name in study.items()
        ),
        f"(three seeds) | 0.296 | {' | '.join(seeds)} |",
        f"ended {of_linear[0]:.0f}% (novels) and {of_linear[1]:.0f}% (mathematics) above dense",
        f"({unshifted:.2f}% above dense training for {sinks:.2f}%)",
        f"{own[0]:.1f}% behind on novels instead of {many[0]:.1f}%",
        f"takes {pretrained(DEFAULT, 32_768).share:.2f} of its time (135 M)",
        f"8B at 8,192 tokens: {step('ours-dense+liger+tile', 8192):.2f} s densely, "
        f"{step('ours-2048+liger+tile', 8192):.2f} s in groups of 2,048",
        f"within {max(above(DEFAULT, 'books') + above(DEFAULT, 'math')):.2f}% at 65,536 tokens (its end within "
        f"{max(ends):.2f}%), at {pretrained(DEFAULT).share:.2f} of the time; dense training of fewer steps, "
        f"in that time, ends {ranged(above(EQUAL_TIME, 'books'))}% above itself",
        f"costs the end of long texts {ranged(slower)}% (novels)",
        f"stays {pose[0]:.1f}% (novels) and {pose[1]:.1f}% (mathematics)",
        f"is {s2_qwen[0]:+.1f}% (last 2,048: {s2_qwen[1]:+.1f}), windows with each 3rd {windows_qwen[0]:+.1f}% "
        f"({windows_qwen[1]:+.1f})",
        f"it is {s2_gemma[0]:+.1f}% ({s2_gemma[1]:+.1f}) at {pretrained(s2, **GEMMA).share:.2f} of dense training's "
        f"time, windows with each 2nd {windows_gemma[0]:+.1f}% ({windows_gemma[1]:+.1f}) at "
        f"{pretrained(DEFAULT, **GEMMA).share:.2f}",
        f"{above(alone, 'math', 'ppl_last_2048')[0]:.0f} to {above(alone, 'books', 'ppl_last_2048')[0]:.0f}% behind "
        "over the last 2,048",
        f"YaRN is {untrained[1]:.0f} to {untrained[0]:.0f}% above",
        f"{in_turn:.1f} s a step against {at_once:.1f} at once",
        f"finds {passkeys('s2 1/16 dense_every 4'):.0f}% of them, taught densely {passkeys('dense'):.0f}%",
        *lines,
        f"| r = 8 / 256 (alpha twice that) | {changed['rank 8']:+.1f}% / {changed['rank 256']:+.1f}% |",
        f"| norms, but no embeddings / neither | {changed['norms only']:+.1f}% / "
        f"{changed['neither norms nor embeddings']:+.1f}% |",
        f"| a rate of 1e-4 / 1e-3 | {changed['rate 1e-4']:+.1f}% / {changed['rate 1e-3']:+.1f}% |",
        f"| half / twice the steps | {changed['half of the steps']:+.1f}% / {changed['twice the steps']:+.1f}% |",
        f"two stages end {stages[0]:.2f}% (novels) and {stages[1]:.2f}% (mathematics) above one, three stages "
        f"{stages[2]:.2f}% and {stages[3]:.2f}%",
    ]


def above_default(change: str) -> float:
    of = {"model": "smollm2", "length": 32_768, "corpus": "books", "split": "test", "seed": 0, "liger": 1}
    changed, unchanged = (
        last("pretrained", "ppl", method=m, **of) for m in (f"windows, 2nd dense, {change}{THETA}", DEFAULT)
    )
    return 100 * (changed / unchanged - 1)


def of_44m(rope_type: str, seeds: int) -> str:
    """A line of means over seeds."""
    at = [YARN_44M | {"rope_type": rope_type, "seed": seed} for seed in range(seeds)]
    untrained, dense, sparse = [], [], []
    for corpus, digits in (("books", 1), ("math", 2 if rope_type != "linear" else 1)):
        untrained.append(f"{quality('rope only', corpus, **at[0]):.{digits}f}")
        dense.append(f"{mean(quality('dense', corpus, **where) for where in at):.2f}")
        sparse.append(f"{mean(float(apart(GROUPS_44M, corpus, **where)) for where in at):+.2f}")
    return f"| {rope_type} | {' | '.join(' / '.join(pair) for pair in (untrained, dense, sparse))} |"


def rope() -> list[str]:
    untrained = [above(method, "books")[0] for method in ("yarn alone", "abf 1.5 alone")]
    return [
        *(
            f"| {length:,} | {yarn_above_theta(length, 'books')} | {yarn_above_theta(length, 'math')} |"
            for length in (32_768, 65_536)
        ),
        f"{untrained[0]:.0f}% above `abf` trained densely on books at 65,536 tokens, `abf` {untrained[1]:.0f}%",
        *(of_44m(name, seeds) for name, seeds in {"linear": 1, "dynamic": 1, "llama3": 1, "yarn": 3}.items()),
    ]


def memory() -> list[str]:
    selective = "+selective"
    h100 = {"gpu": "NVIDIA H100 80GB HBM3"}
    fused, offloaded = "ours-2048+liger+tile", "ours-2048+liger+tile+offload"
    tuned = {"kernel": "flash", "gpu": "NVIDIA H200"}

    def peak(method: str, length: int, **where: object) -> float:
        return step(method, length, "peak_gpu_gib", **where)

    def gib(way: str) -> float:
        return last("embedding_memory", "weights_gradients_states_mib", way=way, tied=False)

    weak = [last("parallel", "s_p50", method="sparse-2048", processes=n, model="8b") for n in (1, 2, 4)]
    cards = [last("parallel", "peak_gpu_gib", method="sparse-2048", processes=n, model="8b") for n in (1, 2, 4)]
    four = {"processes": 4, "model": "8b", "tokens": 131_072}
    qwen = [
        rows("million", tokens=tokens, step=kind)[0]
        for tokens, kind in ((262_144, "sparse"), (262_144, "dense"), (1_048_576, "sparse"))
    ]
    waiting = (float(qwen[2]["exchange_share"]), last("parallel", "exchange_share", method="sparse-2048", processes=4))
    return [
        f"| 131,072 | none | {step('ours-2048+kernel=flash', 131072):.1f} | {peak('ours-2048', 131072):.1f} |",
        f"| 131,072 | Liger, `mlp_tile` | {step(fused, 131072, **tuned):.1f} | {peak(fused, 131072, **tuned):.1f} |",
        f"base in 4 bits (H100) | {step(fused + '+qlora', 131072):.1f} | {peak(fused + '+qlora', 131072):.1f} |",
        f"| 262,144 | Liger, `mlp_tile` | {step(fused, 262144, **tuned):.1f} | {peak(fused, 262144, **tuned):.1f} |",
        f"(H100) | {step(offloaded, 262144, **h100):.1f} | {peak(offloaded, 262144, **h100):.1f} (and "
        f"{step(offloaded, 262144, 'peak_pinned_gib', **h100):.0f} pinned on the host) |",
        f"the same (H100) | {step(offloaded, 524288, **h100):.1f} | {peak(offloaded, 524288, **h100):.1f} (and "
        f"{step(offloaded, 524288, 'peak_pinned_gib', **h100):.0f} pinned on the host",
        planner(),
        f"{step('stock', 131072):.1f} s for stock TRL at 131,072 tokens, "
        f"{step('ours-dense+liger+tile', 131072, **tuned):.1f} s with FlashAttention 4, Liger",
        f"{peak('ours-dense+liger+tile', 131072, **tuned):.1f} GiB there, "
        f"{peak('ours-dense+liger+tile', 262144, **tuned):.1f} at 262,144",
        f"{step(offloaded, 262144, gpu='NVIDIA H200'):.0f} s at 262,144 tokens",
        f"{step('floor+liger', 32768):.2f} s against {step('floor', 32768):.2f} s a step at 32,768 tokens",
        f"{step('floor+compile', 32768):.2f} s against {step('floor', 32768):.2f} s in the same measurement",
        f"{peak(fused + selective, 131072):.1f} GiB, not {peak(fused, 131072, **tuned):.1f}, at 131,072 tokens",
        f"A dense step takes {step('ours-dense+liger+tile' + selective, 131072):.1f} s, not "
        f"{step('ours-dense+liger+tile', 131072, **tuned):.1f}, one of n/4 "
        f"{step('ours-n/4' + selective, 131072):.1f}, not {step('ours-n/4', 131072, **tuned):.1f} (without "
        f"Liger); groups of 2,048 gain nothing ({step(fused + selective, 131072):.1f} s either way)",
        f"{gib('embedding_rank=8'):.1f} MiB of weights, gradients and states, not {gib('full'):.0f}",
        f"| 131,072 a card | {weak[0]:.1f} / {weak[1]:.1f} / {weak[2]:.1f} | {cards[0]:.1f} / {cards[1]:.1f} / "
        f"{cards[2]:.1f} |",
        f"| 131,072 | {last('parallel', 's_p50', method='dense', **four):.1f} / "
        f"{last('parallel', 's_p50', method='ulysses-sdpa', **four):.1f} | "
        f"{last('parallel', 'peak_gpu_gib', method='dense', **four):.1f} |",
        f"| 4 | 262,144 | {float(qwen[0]['s_p50']):.1f} / {float(qwen[1]['s_p50']):.1f} | "
        f"{float(qwen[0]['peak_gpu_gib']):.1f} / {float(qwen[1]['peak_gpu_gib']):.1f} |",
        f"| 1,048,576 | {float(qwen[2]['s_p50']):.1f} | {float(qwen[2]['peak_gpu_gib']):.1f}, and "
        f"{float(qwen[2]['host_gib']):.0f} on the host |",
        f"Of a sparse step {100 * waiting[0]:.0f}% (1,048,576 tokens) to {100 * waiting[1]:.0f}% (524,288) is waiting",
    ]


def benchmarks() -> list[str]:
    def both(method: str, digits: int = 1, **where: object) -> str:
        books, math = (ranged(above(method, corpus, **where), digits) for corpus in ("books", "math"))
        return f"{books}{'%' * (digits == 1)} and {math}"

    theta, s2 = f"s2 1/4{THETA}", f"s2 native + sinks, 4th dense{THETA}"
    paper_books, paper_math = (ranged(above(PAPER, corpus), 0) for corpus in ("books", "math"))
    packed = [
        [last("packed", f"{call}_p50", kernel=kernel, mean=mean) for kernel in ("varlen", "sdpa", "auto")]
        for mean in (100, 500, 2000, 8000, 16000)
        for call in ("first", "again")
    ]
    equal = [value for corpus in ("books", "math") for value in above(EQUAL_TIME, corpus, length=32_768)]
    equal_long = [value for corpus in ("books", "math") for value in above(EQUAL_TIME, corpus)]
    gemma, gemma_end = (
        [value for corpus in ("books", "math") for value in above(DEFAULT, corpus, c, **GEMMA)] for c in ENDS
    )
    alone, alone_end = (above(s2, "books", c, **GEMMA)[0] for c in ENDS)
    return [
        f"end {ranged(equal_long)}% above all of them at 65,536",
        f"and {ranged(equal)}% at 32,768",
        f"end {paper_books}% (books) and {paper_math}% (math) above dense training at 65,536 tokens, "
        f"{both(PAPER, 0, length=32_768)}% at 32,768, {above(PAPER, 'books', **QWEN)[0]:.0f}% on Qwen at 131,072; "
        f"with a larger theta {both(theta)}% at 65,536, with YaRN {both('s2 1/4')}%",
        f"takes it better: {above(PAPER, 'books', **GEMMA)[0]:.1f}%, with YaRN "
        f"{above('s2 1/4', 'books', **GEMMA)[0]:.1f}%",
        f"the default is {ranged(gemma)}% above dense training, its end {ranged(gemma_end)}%, at "
        f"{pretrained(DEFAULT, **GEMMA).share:.2f} of the time",
        f"it is {alone:.2f}% above (the end {alone_end:.2f}%), at {pretrained(s2, **GEMMA).share:.2f} of the time",
        *(
            f"| {tokens:,}, {mean:,} | "
            + " | ".join(f"{a:.{d}f} / {b:.1f}" for a, b, d in zip(first, again, digits, strict=True))
            + " |"
            for tokens, mean, first, again, digits in zip(
                [32_768] * 4 + [131_072],
                [100, 500, 2000, 8000, 16000],
                packed[::2],
                packed[1::2],
                [(1, 1, 1)] * 3 + [(1, 0, 1), (0, 0, 0)],
                strict=True,
            )
        ),
    ]


def kernels() -> list[str]:
    one_day = {"date": "2026-11-25"}
    with_sinks = {
        group: [attention("s2 sdpa cudnn", group, sink_tokens=n, date="2026-11-28") for n in (0, 4)]
        for group in (2048, 8192, 32768)
    }
    dense = [attention(f"dense {kernel}", 0, **one_day) for kernel in ("flash4", "cudnn", "flash")]
    sinks = [step(f"ours-2048{off}", 131072, date="2026-11-28") for off in ("", "+sinks=0")]
    sliding = {
        m: last("sliding", "ms_p50", method=m, shape="gemma3-270m", length=32_768)
        for m in ("blocks", "whole mask", "varlen")
    }
    packed = {
        (kernel, mean): [last("packed", f"{call}_p50", kernel=kernel, mean=mean) for call in ("first", "again")]
        for kernel in ("varlen", "sdpa")
        for mean in (500, 8000)
    }
    table = {"`flash` with FlashAttention 4": "s2 flash", "`sdpa` with cuDNN": "s2 sdpa cudnn"}
    table |= {"`sdpa` with FlashAttention 2": "s2 sdpa flash", "`varlen` (FlashAttention 2)": "s2 varlen"}
    return [
        *(
            f"{attention(method, 32768, **one_day):.0f} ms | {attention(method, 2048, **one_day):.1f} ms | "
            f"{last('attention', 'peak_over_least', method=method, group=2048, length=131_072, **one_day):.2f} |"
            for method in table.values()
        ),
        f"{dense[0]:.0f} / {dense[1]:.0f} / {dense[2]:.0f} ms",
        "groups of 2,048 {:.1f} -> {:.1f} ms".format(*with_sinks[2048]),
        "of 8,192 {:.1f} -> {:.1f} ms".format(*with_sinks[8192]),
        "of 32,768 {:.0f} -> {:.0f} ms".format(*with_sinks[32768]),
        f"the 8B shape takes as long with as without ({sinks[0]:.1f} s",
        f"take {packed['varlen', 500][0]:.1f} ms by `varlen`, {packed['sdpa', 500][0]:.1f} by `sdpa`; of 8,000 "
        f"{packed['varlen', 8000][0]:.1f}, by `sdpa` {packed['sdpa', 8000][0]:.0f} ms where it meets the lengths and "
        f"{packed['sdpa', 8000][1]:.1f} afterwards",
        f"takes {sliding['blocks']:.1f} ms, by the whole mask {sliding['whole mask']:.0f}",
        f"which is not built in, {sliding['varlen']:.1f})",
    ]


def peers() -> list[str]:
    ends = [above(f"{name}{THETA}", "books", "ppl_last_2048")[0] for name in ("pose", "native windows")]
    return ["({:+.1f}% and {:+.1f}% above dense training, windows of a step from one row)".format(*ends)]


def smollm2() -> list[str]:
    longest, native = (rows("example", length=n)[-1] for n in (32_768, 8_192))
    steps = [float(row["train_seconds"]) for row in rows("pretrained", method=DEFAULT, length=32_768, liger=1)]
    return [
        f"{float(longest['train_seconds']):.0f} s from the start of the command to its end",
        f"{float(longest['ppl']):.1f}, where the base has {float(longest['ppl_base']) + HALF_UP:,.0f} "
        f"({float(native['ppl_base']):.1f} at 8,192)",
        f"{min(steps):.0f} to {max(steps):.0f} s of steps",
        f"{last('pretrained', 'peak_gib', method=DEFAULT, length=32_768, liger=1):.1f} GiB",
    ]


def llama() -> list[str]:
    fused, h100 = "ours-2048+liger+tile", {"gpu": "NVIDIA H100 80GB HBM3"}
    return [
        f"{step(fused, 262144, 'peak_gpu_gib', kernel='flash'):.1f} GiB and "
        f"{step(fused, 262144, kernel='flash'):.1f} s a step",
        f"{step(fused + '+offload', 262144, 'peak_gpu_gib', **h100):.1f} GiB, "
        f"{step(fused + '+offload', 262144, 'peak_pinned_gib', **h100):.0f} GiB of the host's memory and "
        f"{step(fused + '+offload', 262144, **h100):.1f} s with it, on one H100",
    ]


def million() -> list[str]:
    found = rows("million", tokens=1_048_576, group=2048)[-1]
    return [
        f"{float(found['s_p50']):.1f} s a sparse step in groups of 2,048 at 1,048,576 tokens, "
        f"{float(found['peak_gpu_gib']):.0f} GiB a card and {float(found['host_gib']):.0f} on the host"
    ]


PAGES = {
    "README.md": readme,
    "docs/groups.md": groups,
    "docs/rope.md": rope,
    "docs/memory.md": memory,
    "docs/kernels.md": kernels,
    "benchmarks/README.md": benchmarks,
    "docs/peers.md": peers,
    "examples/smollm2_32k.yaml": smollm2,
    "examples/extend_llama_pg19.yaml": llama,
    "examples/million_tokens.yaml": million,
}


def plain(text: str) -> str:
    """In one line, without the marks of a comment."""
    return re.sub(r"\s+", " ", re.sub(r"^# ?", "", text, flags=re.M))


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_rows(page):
    text = plain((ROOT / page).read_text())
    missing = [figure for figure in PAGES[page]() if figure not in text]
    assert not missing, "\n".join([f"{page} says otherwise than benchmarks/results:", *missing])


def test_tables_are_those_of_rows():
    """`python -m benchmarks.quality.pretrained_table --write` writes them."""
    for path, tables in pages(rows("pretrained"), "test").items():
        assert written(path.read_text(), tables) == path.read_text(), path
