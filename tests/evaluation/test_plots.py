import builtins
import math

import pytest

from hf_longlora.evaluation import plot_perplexity, plot_positions, plot_retrieval


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
    assert imread(path).shape[:2] == (630, 1050)


def test_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_perplexity({"base": records(math.inf)}, tmp_path / "plot.png")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
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
