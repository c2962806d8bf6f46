import math
import sys

import pytest

from hf_longlora.evaluation import plot_perplexity, plot_positions, plot_retrieval, plots
from hf_longlora.evaluation.tables import (
    basis,
    perplexity_of,
    perplexity_table,
    retrieval_table,
    ruler_table,
    sections,
)


def records(*values):
    return [{"length": 256 * 2**index, "perplexity": value} for index, value in enumerate(values)]


@pytest.mark.parametrize(
    "curves",
    [
        {"base": records(9.1, 9.0, 8.9)},
        {"base": records(9.1, 9.5, 1800.0, math.inf), "extended": records(9.6, 8.6, 8.2, 8.0)},
        {"one length": records(9.1), "empty": []},
        {f"model {index}": records(9.0, 8.0 + index / 100) for index in range(9)},
    ],
)
def test_writes_a_picture(tmp_path, curves):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "new" / "plot.png"
    assert plot_perplexity(curves, path, base_length=256, train_length=2048, title="A title") == path
    assert imread(path).shape[:2] == (540, 1050)


def test_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_perplexity({"base": records(math.inf)}, tmp_path / "plot.png")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hf-longlora\[plot\]"):
        plot_perplexity({"base": records(9.0)}, tmp_path / "plot.png")


def test_retrieval_heat_map(tmp_path):
    records = [
        {"length": length, "depth": depth, "accuracy": depth * 1024 / length, "trials": 4}
        for length in (1024, 2048, 4096)
        for depth in (0.0, 0.5, 1.0)
    ]
    path = plot_retrieval(records, tmp_path / "new" / "passkey.png", title="passkey")
    assert path.stat().st_size > 5_000
    for incomplete in ([], records[:-1]):
        with pytest.raises(ValueError, match="every depth at every length"):
            plot_retrieval(incomplete, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_loss_by_position(tmp_path):
    records = [
        {"start": start, "end": end, "nll": 3.0 - end / 1e4, "nll_error": 0.02}
        for start, end in ((0, 512), (512, 1024), (1024, 2048))
    ]
    path = plot_positions({"dense": records, "as trained": records[1:]}, tmp_path / "new" / "positions.png")
    assert path.stat().st_size > 5_000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_positions({"dense": []}, tmp_path / "none.png")


def test_history_with_evaluations(tmp_path, monkeypatch):
    """Each evaluation in its curve's colour; axes named, from 0 where heights are to compare."""
    drawn = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]) or save(figure, path))
    curves = {"stage 1": [(1, 3.0), (2, 2.5), (3, 2.4)], "stage 2": [(4, 2.6)]}
    evaluated = {"books": {"stage 2": [(4, 2.7)]}, "math": {"stage 2": [(4, 2.9)], "stage 1": [(1, 3.2)]}}
    plots.plot_history(curves, tmp_path / "a.png", ylabel="loss (nats per token)", evaluated=evaluated)
    plots.plot_history(curves, tmp_path / "b.png", ylabel="peak memory (GiB)", from_zero=True)
    first, second = drawn
    solid, books, math = [line for line in first.lines if list(line.get_xdata()) == [4]]
    assert [line.get_ydata()[0] for line in (solid, books, math)] == [2.6, 2.7, 2.9]
    assert (books.get_linestyle(), math.get_linestyle()) == ("--", ":")
    assert books.get_color() == math.get_color() == solid.get_color()
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["stage 1", "stage 2", "books", "math"]
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["stage 1", "stage 2"]
    assert (first.get_xlabel(), first.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    assert first.get_ylim()[0] > 2 and second.get_ylim()[0] == 0


def test_tables_hold_what_there_is():
    ragged = {"dense": records(12.5, 1234.5), "as trained": records(11.75)}
    assert perplexity_table(ragged) == (
        ["model", "256 tokens", "512 tokens"],
        [["dense", "12.50", "1234.50"], ["as trained", "11.75", ""]],
    )
    found = [{"length": 2048, "depth": 0.5, "accuracy": 0.25, "trials": 4}]
    assert retrieval_table([*found, {"length": 1024, "depth": 1.0, "accuracy": 1.0, "trials": 1}]) == (
        ["tokens", "50%", "100%"],
        [["1,024", "", "100%"], ["2,048", "25%", ""]],
    )

    tasks = [
        {"task": task, "length": length, "accuracy": accuracy}
        for length, accuracies in ((2048, (0.125, 0.0)), (1024, (1.0, 0.5)))
        for task, accuracy in zip(("vt", "cwe"), accuracies, strict=True)
    ]
    assert ruler_table(tasks) == (
        ["tokens", "vt", "cwe", "mean"],
        [["1,024 tokens", "100.0%", "50.0%", "75.0%"], ["2,048 tokens", "12.5%", "0.0%", "6.2%"]],
    )


def test_a_heading_names_four_documents_at_most():
    for names, heading in (
        (None, "documents"),
        (["a", "b", "c", "d"], "a, b, c, d"),
        ([*"abcde"], "a, b, c, d, 1 more"),
        ([*"abcd", *map(str, range(1000))], "a, b, c, d, 1,000 more"),
    ):
        found = perplexity_of({"documents": names, "perplexity": {"dense": records(9.0)}})
        assert found == {heading: {"dense": records(9.0)}}
    assert perplexity_of({"documents": ["a"], "perplexity": {}}) == {}


def test_one_record_makes_a_section():
    keys = {"length": 8192, "short": 4096, "perplexity": 7.125, "key_tokens": 50, "tokens": 2000}
    [section] = sections({}, {"long_ppl": [keys], "passkey": [], "ruler": None})
    assert section.table == (["", "8,192 tokens"], [["LongPPL", "7.12"], ["key tokens", "2.50% of 2,000"]])
    assert "4,096 tokens" in section.note and "the model itself" in section.note


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ([{"trials": 4}, {"trials": 4}], "4 texts"),
        ([{"trials": 1}], "1 text"),
        ([{"tokens": 1280, "documents": 1}], "1,280 tokens of 1 document"),
        ([{"tokens": 10, "documents": 2}, {"tokens": 30, "documents": 3}], "10 to 30 tokens of 2 to 3 documents"),
        ([{"length": 4}], ""),
        ([{"tokens": 10}, {"documents": 2}], ""),
    ],
)
def test_what_a_number_rests_on(measured, words):
    assert basis(measured) == words
