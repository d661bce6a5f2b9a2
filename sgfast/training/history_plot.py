"""Curves of a training: the loss, its components and the mean sigma over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgfast.training.run_record import components_in
from sgfast.utils.figures import load_pyplot, save_png

_COLUMNS = 3
# These components keep the model's behaviour. The others make the transform strong.
_UTILITY = ("distillation", "clean_embedding_performance")
_TITLES = {"loss": "loss, weighted sum", "mean_sigma": "mean sigma"}


def plot_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write a PNG with a panel for the loss, for each unweighted component, and for the mean sigma."""
    pyplot = load_pyplot()
    names = components_in(history)
    rows = -(-len(names) // _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(4 * _COLUMNS, 2.7 * rows), squeeze=False, sharex=True)
    panels = list(grid.flat)
    for axes, name in zip(panels, names, strict=False):
        color = "0.25" if name == "loss" else "tab:blue" if name.startswith(_UTILITY) else "tab:orange"
        draw_curve(axes, history, name, color)
        axes.set_title(_TITLES.get(name, name.replace("_", " ")), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(names) - _COLUMNS) : len(names)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    figure.suptitle("blue: the model's behaviour; orange: the transform's strength", fontsize=10)
    figure.tight_layout()
    save_png(figure, path)


def draw_curve(
    axes: Any, history: Sequence[Mapping[str, float]], name: str, color: str, label: str | None = None
) -> None:
    """Draw one value of every step as a faint line, and its running mean as a strong one with the label."""
    steps, values = [step["step"] for step in history], [step[name] for step in history]
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smoothed(values), color=color, label=label, marker="." if len(steps) == 1 else None)
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 1.5
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return running means over a twentieth of the values, over fewer values at the beginning.

    Example:
        >>> smoothed([4.0, 2.0])
        [4.0, 2.0]
    """
    width = max(1, len(values) // 20)
    return [sum(part) / len(part) for part in (values[max(0, end - width) : end] for end in range(1, len(values) + 1))]
