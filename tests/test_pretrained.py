"""The bench of models that others trained: its methods on a tiny model in the place of a pretrained one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from benchmarks.provenance import RESULTS, append_row, read_rows
from benchmarks.quality import example, pretrained
from benchmarks.quality.data import save_documents
from benchmarks.quality.models import SOURCES, Source
from benchmarks.quality.pretrained import GROUPS, METHODS, Run, do, main, steps_of
from benchmarks.quality.pretrained_table import (
    BEGIN,
    END,
    FAMILIES,
    LINES,
    changes,
    pages,
    plot,
    points,
    retrieval,
    table,
    written,
)
from hf_longlora import LongLoraSFTTrainer
from hf_longlora.attention.segments import Documents

LENGTH = 256


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_llama, tiny_tokenizer):
    """What `benchmarks.quality.models` leaves behind, of a model of 64 tokens."""
    source = Source(packages=(), member="", sha256="", licence="", native=64, end=0, checkpointed=True)
    monkeypatch.setitem(SOURCES, "tiny", source)
    for name, value in {"STEPS": 4, "WINDOWS": 2}.items():
        monkeypatch.setattr(pretrained, name, {LENGTH: value})
    monkeypatch.setattr(pretrained, "LAST", 32)
    monkeypatch.setattr(pretrained, "RESULTS", tmp_path / "elsewhere")
    made = tmp_path / "tiny"
    tiny_llama(num_hidden_layers=4).to(torch.bfloat16).save_pretrained(made / "base")
    tiny_tokenizer.save_pretrained(made / "base")
    draw = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        documents = [draw.integers(3, 128, size=2000).tolist() for _ in range(3)]
        save_documents(made / f"books.{split}.npz", documents)
    return made


def run(folder, method, results, model="tiny", **more):
    of = Run(model=model, corpus="books", length=LENGTH, method=method, seed=0, **more)
    do(of, folder, results, shared=False, as_trained=False)


@pytest.fixture
def groups(monkeypatch):
    """The group size of each layer, in the order in which they attend."""
    found = []
    parts = Documents.parts

    def spy(self, heads, kv_heads, group_size, *rest):
        found.append(group_size)
        return parts(self, heads, kv_heads, group_size, *rest)

    monkeypatch.setattr(Documents, "parts", spy)
    return found


@pytest.fixture
def trainers(monkeypatch):
    found = []

    class Kept(LongLoraSFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(pretrained, "LongLoraSFTTrainer", Kept)
    return found


FEW = ["s2 1/4 linear (the paper)", "windows, 2nd dense, norms only, abf 1.5", "dense, rank 256, abf 1.5"]
FEW += ["dense, rate 1e-3, abf 1.5"]
ALL = ["default", "abf 1.5 alone", *GROUPS["papers"], *GROUPS["factors"]]


@pytest.mark.parametrize("method", [*FEW, *(pytest.param(m, marks=pytest.mark.slow) for m in ALL if m not in FEW)])
def test_a_row_for_each_split(method, folder, tmp_path, trainers):
    run(folder, method, tmp_path / "rows.csv")
    found = read_rows(tmp_path / "rows.csv")
    assert [row["split"] for row in found] == ["validation", "test"]
    of = METHODS[method]
    if not of.trained:
        assert not trainers
        return
    [trainer] = trainers
    for row in found:
        assert row["steps"] == str(round(4 * of.cut)) == str(trainer.state.global_step)
        assert int(row["dense_steps"]) == (
            0
            if "4th layer" in method or method in GROUPS["papers"]
            else int(row["steps"]) // (1 if method.startswith("dense") else 4 if "4th" in method else 2)
        )
        assert (row["rank"], row["learning_rate"]) == (str(of.rank), f"{of.learning_rate:.5g}")
        assert float(row["theta"]) == pytest.approx(1e4 * (8 if "abf" in method or method == "default" else 1))
    config = trainer.model.active_peft_config
    assert config.r == of.rank and trainer.args.learning_rate == of.learning_rate
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert any("norm" in name for name in names) == ("neither" not in method)
    assert any("embed" in name for name in names) == (not of.adapter)


def test_a_layer_stays_dense(folder, tmp_path, groups):
    run(folder, "s2 native + sinks, 4th layer dense", tmp_path / "rows.csv")
    assert groups[:4] == [64, 64, 64, LENGTH] and set(groups) == {64, LENGTH}
    assert groups.count(LENGTH) * 3 == groups.count(64)


def test_half_of_the_shift_is_undone(folder, tmp_path, monkeypatch):
    shifts = []
    parts = Documents.parts

    def spy(self, heads, kv_heads, group_size, shift, *rest):
        shifts.append(shift if group_size else "dense")
        return parts(self, heads, kv_heads, group_size, shift, *rest)

    monkeypatch.setattr(Documents, "parts", spy)
    run(folder, "s2 native + sinks, half of the shift undone, 4th dense", tmp_path / "rows.csv")
    assert shifts[:4] == ["none", "half", "none", "half"]
    assert shifts.count("none") == shifts.count("half") == 3 * shifts.count("dense") // 2


def test_groups_grow(folder, tmp_path, groups, monkeypatch):
    monkeypatch.setitem(pretrained.STEPS, LENGTH, 6)
    run(folder, "s2 1/16 to 1/4 + sinks, 4th dense", tmp_path / "rows.csv")
    assert list(dict.fromkeys(groups)) == [16, 32, None, 64]
    assert len({groups.count(size) for size in (16, 64)}) == 1 and groups.count(16) == 2 * groups.count(32)


def test_short_documents_are_of_the_same_rows(folder, tmp_path, trainers, monkeypatch):
    for method in ("windows, 2nd dense", "windows, 2nd dense, a quarter short"):
        run(folder, method, tmp_path / "rows.csv")
    whole, mixed = (trainer.train_dataset for trainer in trainers)
    assert sorted(mixed["seq_lengths"]) == [[64] * 4, *[[LENGTH]] * 3]
    assert sorted(mixed["input_ids"]) == sorted(whole["input_ids"])


RECIPE = {"model": "tiny", "length": str(LENGTH), "method": "windows, 2nd dense, abf 1.5", "rank": "64", "liger": "0"}
TIMED = {"learning_rate": "0.0003", "steps": "4", "train_seconds": "3.1", "dense_step_p50": "1.0", "shared_gpu": "0"}


def test_dense_training_takes_as_many_steps_as_the_recipe_s_time_allows(folder, tmp_path, trainers):
    method, results = "dense of equal time, abf 1.5", tmp_path / "rows.csv"
    of = Run(model="tiny", corpus="math", length=LENGTH, method=method, seed=7)
    row = RECIPE | TIMED
    with pytest.raises(ValueError, match="run that first"):
        steps_of(of, [row | {"shared_gpu": "1"}, row | {"liger": "1"}, row | {"method": "windows, 2nd dense"}])
    assert steps_of(of, [row, row | {"train_seconds": "90", "shared_gpu": "1"}]) == 3
    run(folder, "windows, 2nd dense, abf 1.5", results)
    rows = read_rows(results)
    results.unlink()
    for timed in rows:  # by the machine's clock
        append_row(results, timed | {"train_seconds": "3.1", "dense_step_p50": "1.0"})
    run(folder, method, results)
    found = read_rows(results)[-1]
    assert found["steps"] == found["dense_steps"] == "3"
    assert trainers[-1].state.log_history[-1]["step"] == trainers[-1].args.max_steps == 3


def test_what_is_there_is_not_done_again(folder, tmp_path, monkeypatch, trainers):
    command = ["pretrained", "--work", str(folder.parent), "--model", "tiny", "--corpora", "books"]
    command += ["--lengths", str(LENGTH), "--results", str(tmp_path / "rows.csv"), "--methods"]
    monkeypatch.setitem(GROUPS, "two", ["dense, rank 8", "abf 1.5 alone"])
    for names, rows in ((["dense, rank 8"], 2), (["two"], 4), (["two", "dense, rank 8"], 4)):
        monkeypatch.setattr("sys.argv", [*command, *names])
        main()
        assert len(read_rows(tmp_path / "rows.csv")) == rows
    assert len(trainers) == 1


def test_each_row_and_window_begins_as_gemma_s_texts_do(folder, tmp_path, monkeypatch, trainers):
    monkeypatch.setitem(SOURCES, "gemma", replace(SOURCES["tiny"], begin=1))
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
        max_position_embeddings=64,
    )
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    seen = []
    score = pretrained.loss_by_position
    monkeypatch.setattr(pretrained, "loss_by_position", lambda m, d, *a, **k: seen.extend(d) or score(m, d, *a, **k))
    for method in ("dense, abf 1.5", "windows, 2nd dense, abf 1.5", "s2 native + sinks, 4th dense, abf 1.5"):
        run(folder, method, tmp_path / "rows.csv", model="gemma")
    assert {ids[0] for trainer in trainers for ids in trainer.train_dataset["input_ids"]} == {1}
    assert {len(ids) for trainer in trainers for ids in trainer.train_dataset["input_ids"]} == {LENGTH}
    assert {int(ids[0]) for ids in seen} == {1} and max(map(len, seen)) == LENGTH
    # all of the text is in some window, once
    assert sum(len(ids) - 1 for ids in seen) == 2 * 3 * 3 * 2000


# --- its tables ------------------------------------------------------------------------------------------------------


def measured(method, corpus, seed, ppl, seconds, **more):
    row = {"model": "smollm2", "corpus": corpus, "length": "65536", "method": method, "seed": str(seed), "liger": "1"}
    row |= {"split": "test", "train_seconds": str(seconds), "shared_gpu": "0", "gpu": "H", "ppl_first_8192": "20"}
    return row | {"ppl": str(ppl), "ppl_last_2048": str(2 * ppl)} | more


ROWS = [
    measured("dense, abf 1.5", "books", 0, 10, 100),
    measured("dense, abf 1.5", "books", 1, 20, 100),
    measured("dense, abf 1.5", "math", 0, 4, 100),
    measured("windows, 2nd dense, abf 1.5", "books", 0, 10.1, 60),
    measured("windows, 2nd dense, abf 1.5", "books", 1, 19.8, 50, liger="0"),  # another kernel, and not the only row
    measured("windows, 2nd dense, abf 1.5", "books", 1, 20.4, 50),
    measured("windows, 2nd dense, abf 1.5", "books", 2, 30, 50),  # no dense training to compare with
    measured("windows, 2nd dense, abf 1.5", "math", 0, 4, 500, shared_gpu="1"),
    measured("windows, 2nd dense, abf 1.5", "math", 0, 8, 50, split="validation"),
    measured("windows, 2nd dense, rank 8, abf 1.5", "books", 0, 10.403, 55),
    measured("dense, rank 8, abf 1.5", "books", 0, 10.3, 90),
    measured("abf 1.5 alone", "books", 0, 30, ""),
    measured("nothing that is shown", "books", 0, 30, 1),
]


def test_a_line_compares_with_dense_training_of_its_seed():
    lines = table(ROWS, "smollm2", "65536", "test")
    assert lines[0] == (
        "| SmolLM2-135M, 8,192 -> 65,536 | books, above, % | math, above, % | first 8,192, books / math | time |"
    )
    assert lines[2:] == [
        "| dense | 15.00; 30.00 | 4.000; 8.000 | 20.00 / 20.00 | 1 (100.0 s) |",
        "| **each 2nd dense, windows (the default for plain text)** | +1.00, +2.00; +1.00, +2.00 | +0.00; +0.00 "
        "| 20.00 / 20.00 | 0.53 |",
        "| nothing trained, theta raised | +200.00; +200.00 |  | 20.00 / - |  |",
    ]


def test_a_change_is_compared_with_the_default_and_with_dense_training_changed_alike():
    lines = changes(ROWS, "test")
    assert lines[2:] == ["| rank 8 | +3.00; +3.00 | +3.00; +3.00 | +1.00; +1.00 |"]


def test_a_line_for_each_task_of_ruler():
    run = {"model": "smollm2", "train_length": "65536", "corpus": "books", "seed": "0", "trials": "20"}
    run |= {"method": "windows, 2nd dense, abf 1.5"}
    rows = [
        run | {"length": length, "task": task, "accuracy": accuracy, "error": "0.0512"}
        for length, task, accuracy in (("8192", "vt", "0.95"), ("8192", "niah_single_1", "1"), ("65536", "vt", "0.25"))
    ]
    rows += [run | {"method": "unnamed", "length": "8192", "task": "vt", "accuracy": "0", "error": "0"}]
    assert retrieval([]) == []
    assert retrieval(rows) == [
        "| RULER, %, SmolLM2-135M, 8,192 -> 65,536 on books, 20 texts a task | 8,192 | 65,536 |",
        "|---|---|---|",
        "| **each 2nd dense, windows (the default for plain text)**: niah_single_1 | 100 ± 5 |  |",
        "| **each 2nd dense, windows (the default for plain text)**: vt | 95 ± 5 | 25 ± 5 |",
        "| unnamed: vt | 0 ± 0 |  |",
    ]


def test_points_of_the_plot(tmp_path):
    found = points(ROWS, "smollm2", "65536", "books", "test")
    assert found == {
        "dense, fewer steps": [("dense", 100.0, {"ppl": 0.0, "ppl_last_2048": 0.0})],
        "windows": [("2nd", pytest.approx(160 / 3), pytest.approx({"ppl": 1.5, "ppl_last_2048": 1.5}))],
    }
    plot(ROWS, "test", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_tables_take_the_place_of_those_before():
    page = f"Before.\n\n{BEGIN}an old table\n{END}\nAfter.\n"
    assert written(page, "a new one\n") == f"Before.\n\n{BEGIN}a new one\n{END}\nAfter.\n"
    for path, tables in pages(ROWS, "test").items():
        assert BEGIN + tables + END in written(path.read_text(), tables)
    with pytest.raises(ValueError):
        written("Before.", "a new one\n")


def test_what_is_shown_is_a_method_or_was_one():
    shown = {*LINES, *(method for methods in FAMILIES.values() for method in methods)}
    stored = {row["method"] for row in read_rows(RESULTS / "pretrained.csv")}
    assert shown - set(METHODS) <= stored


# --- the example on such a model -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_leaves_a_card(folder, tmp_path, monkeypatch):
    stages = '[{"max_length": 256, "max_steps": 4, "rope_type": "abf"}]'
    command = ["example", "--work", str(folder.parent), "--model", "tiny", "--out", str(tmp_path / "out")]
    command += ["--lengths", "250", "256", "--windows", "2", "--passkeys", "1", "--short", "64"]
    command += ["--results", str(tmp_path / "example.csv"), "--", "--stages", stages]
    command += ["--use_cpu", "true", "--bf16", "false", "--use_liger_kernel", "false", "--disable_tqdm", "true"]
    monkeypatch.setattr("sys.argv", command)
    example.main()
    made = tmp_path / "out" / "card"
    assert {file.name for file in made.iterdir()} == {
        *("README.md", "adapter_config.json", "evaluation.json", "example.json", "run.json"),
        *("perplexity.png", "positions.png", "passkey.png"),
    }
    text = (made / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in text and str(tmp_path) not in text
    for part in ("| the base as it is |", "## Passkeys found", "## LongPPL", "| 1 | 256 | 4 | dense in windows"):
        assert part in text
    assert text == str(example.card(made))
    assert [row["length"] for row in read_rows(tmp_path / "example.csv")] == ["250", "256"]


def test_the_example_s_card_is_of_rows():
    of_card = example.rows(Path(example.__file__).parents[2] / "model_cards" / example.NAME)
    found = read_rows(RESULTS / "example.csv")
    assert [row["length"] for row in found] == [str(row["length"]) for row in of_card]
    for row, expected in zip(found, of_card, strict=True):
        for name, value in expected.items():
            assert row[name] == (f"{value:.5g}" if isinstance(value, float) else str(value)), name


def test_what_was_trained_gives_logits_in_half_precision(folder, tmp_path, monkeypatch):
    """Not turned to fp32 whole, as a model that is prepared for mixed precision gives them."""
    trained, _ = pretrained.train(
        Run(model="tiny", corpus="books", length=LENGTH, method="windows, 2nd dense", seed=0), folder
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert trained(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.dtype == torch.bfloat16
