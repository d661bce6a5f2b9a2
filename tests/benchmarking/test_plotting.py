"""Ticks and lines of plots."""

import pytest

from sgfast.benchmarking import plotting
from sgfast.training import history_plot
from sgfast.utils.figures import load_pyplot


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of files; closed after the test."""
    figures = []
    for module in (plotting, history_plot):
        monkeypatch.setattr(module, "save_png", lambda figure, path: (figure.canvas.draw(), figures.append(figure)))
    yield figures
    for figure in figures:
        load_pyplot().close(figure)


def labels(axis) -> list[str]:
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 160])
def test_steps_are_whole(drawn, tmp_path, steps):
    history = [{"step": step, "loss": 1 / step, "mean_sigma": 0.1 * step} for step in range(1, steps + 1)]
    history_plot.plot_history(tmp_path / "training.png", history)
    for axes in drawn[0].axes[:2]:
        assert labels(axes.xaxis)
        assert all(label.isdigit() for label in labels(axes.xaxis))
        assert any(line.get_marker() == "." for line in axes.lines) == (steps == 1)  # one point has no line


def records(values):
    return [
        {"sweep": "tokens", "tokens": tokens, "task": task, "implementation": "eager PyTorch"}
        | {"milliseconds": value, "peak_bytes": 2**20 * value}
        for task in ("values", "gradients")
        for tokens, value in zip((1, 8, 64), values, strict=True)
    ]


@pytest.mark.parametrize("values", [(2.0, 2.1, 2.2), (0.7, 3.0, 40.0), (0.03, 5.0, 300.0)])
def test_costs_have_plain_numbers(drawn, tmp_path, values):
    assert plotting.plot_growth(tmp_path / "growth.png", records(values), "")
    for axes in drawn[0].axes:
        found = [float(label) for label in labels(axes.yaxis)]  # no 2×10⁰
        assert len(found) >= 2
        low, high = axes.get_ylim()
        assert high / low >= 10  # nearly equal costs look level
        assert low <= min(values)
        assert high >= max(values)


def test_lines_on_each_other_stay_visible(drawn, tmp_path):
    plotting.plot_growth(tmp_path / "growth.png", records((1.0, 2.0, 3.0)), "")
    under, over = drawn[0].axes[0].lines
    assert under.get_color() == over.get_color()
    assert under.get_linewidth() > over.get_linewidth()
    assert under.get_markersize() > over.get_markersize()
    assert under.get_marker() != over.get_marker()
    assert under.get_zorder() < over.get_zorder()
