"""Pictures of benchmark records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgfast.utils.figures import load_pyplot, save_png

_AXES = {
    "vocab": "vocabulary V",
    "tokens": "tokens N",
    "top_k": "top-k",
    "width": "width D",
}
_COSTS = {"milliseconds": ("time [ms]", 1.0), "peak_bytes": ("peak memory [MiB]", 2**-20)}
_ERRORS = {"relative_value_error": "values: relative error", "gradient_error": "gradient rows: relative error"}
_LINES = {"eager PyTorch": "0.55", "torch.compile": "tab:orange", "Liger-Kernel": "tab:purple", "sgfast": "tab:green"}
# Above this ratio of the largest cost to the smallest, only powers of ten are labelled.
_MANY_DECADES = 100.0
_MORE = ("tab:blue", "tab:cyan", "tab:red", "tab:brown")
# The stroke, width, marker and marker's size of each task. Lines that lie on each other stay visible: later ones are
# thinner, with smaller markers.
_STROKES = (("-", 2.2, "o", 5.5), ("--", 1.6, "s", 4.5), (":", 1.6, "^", 4.0), ("-.", 1.0, "D", 3.0))


def plot_growth(path: Path, records: Sequence[dict[str, Any]], title: str) -> bool:
    """Draw time and peak memory against every size that varies. Return False and write no file if no size varies."""
    axes_found = [axis for axis in _AXES if len({record[axis] for record in records if record["sweep"] == axis}) > 1]
    if not axes_found:
        return False
    pyplot = load_pyplot()
    figure, grid = pyplot.subplots(
        len(_COSTS), len(axes_found), figsize=(1.2 + 3.6 * len(axes_found), 6.4), squeeze=False, sharex="col"
    )
    for row, (cost, (label, unit)) in enumerate(_COSTS.items()):
        for column, axis in enumerate(axes_found):
            axes = grid[row][column]
            swept = [record for record in records if record["sweep"] == axis]
            for (task, implementation), line in _by_line(swept).items():
                style = _style(records, task, implementation)
                axes.plot([one[axis] for one in line], [one[cost] * unit for one in line], **style)
            axes.set(xscale="log", yscale="log", ylabel=label if column == 0 else None)
            sizes = sorted({one[axis] for one in swept})
            axes.set_xticks(sizes, [_short(size) for size in sizes], fontsize=8, rotation=45)
            axes.xaxis.minorticks_off()
            _label_plainly(axes)
            if row == len(_COSTS) - 1:
                axes.set_xlabel(f"{_AXES[axis]}  ({_held(swept, axis)})", fontsize=9)
            axes.grid(alpha=0.3)
    _finish(figure, grid[0][0], title, path)
    return True


def plot_accuracy(path: Path, records: Sequence[dict[str, Any]], title: str) -> bool:
    """Draw errors against float64 over the noise between the sides. Return False and write no file without errors."""
    swept = [record for record in records if record["sweep"] == "noise" and "value_error" in record]
    if not swept:
        return False
    pyplot = load_pyplot()
    dtypes = sorted({record["dtype"] for record in swept}, reverse=True)
    figure, grid = pyplot.subplots(len(_ERRORS), len(dtypes), figsize=(1.2 + 4.4 * len(dtypes), 6.4), squeeze=False)
    for row, (error, label) in enumerate(_ERRORS.items()):
        for column, dtype in enumerate(dtypes):
            axes = grid[row][column]
            found = [record for record in swept if record["dtype"] == dtype and record.get(error)]
            for (task, implementation), line in _by_line(found).items():
                style = _style(records, task, implementation)
                axes.plot([one["noise"] for one in line], [one[error] for one in line], **style)
            axes.set(xscale="log", yscale="log", ylabel=label if column == 0 else None)
            # Errors that are all one rounding must look level, so the axis is not zoomed into them.
            lowest, highest = axes.get_ylim()
            middle = (lowest * highest) ** 0.5
            axes.set_ylim(min(lowest, middle / 10), max(highest, middle * 10))
            axes.set_title(f"{dtype} logits" if row == 0 else "", fontsize=10)
            axes.set_xlabel("noise between the two sides, in logits" if row == len(_ERRORS) - 1 else None, fontsize=9)
            axes.grid(alpha=0.3)
    _finish(figure, grid[0][0], title, path)
    return True


def _label_plainly(axes: Any) -> None:
    """Label a logarithmic cost axis with plain numbers, 0.5 and 200, over one decade at least."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lowest, highest = axes.get_ylim()
    middle = (lowest * highest) ** 0.5
    # Costs that are nearly equal must look level, so the axis is not zoomed into them.
    lowest, highest = min(lowest, middle / 10**0.5), max(highest, middle * 10**0.5)
    axes.set_ylim(lowest, highest)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest / lowest < _MANY_DECADES else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _by_line(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        lines.setdefault((record["task"], record["implementation"]), []).append(record)
    return lines


def _style(records: Sequence[dict[str, Any]], task: str, implementation: str) -> dict[str, Any]:
    """Return a colour for an implementation and a stroke for a task, the same in every panel."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    others = [name for name in dict.fromkeys(one["implementation"] for one in records) if name not in _LINES]
    color = _LINES.get(implementation) or _MORE[others.index(implementation) % len(_MORE)]
    place = tasks.index(task) % len(_STROKES)
    stroke, width, marker, size = _STROKES[place]
    return {
        "color": color,
        "linestyle": stroke,
        "linewidth": width,
        "marker": marker,
        "markersize": size,
        "markerfacecolor": "white" if place else color,
        "zorder": 2 + place,
        "label": f"{implementation}: {task}",
    }


def _short(size: int) -> str:
    """Format a size: 65536 as 66k."""
    return str(size) if size < 1000 else f"{size / 1000:.0f}k"


def _held(records: Sequence[dict[str, Any]], axis: str) -> str:
    first = records[0]
    return ", ".join(f"{name} {first[name]}" for name in _AXES if name != axis and first.get(name))


def _finish(figure: Any, labelled: Any, title: str, path: Path) -> None:
    """Put the legend above the panels and the environment below them, and write the file."""
    handles, labels = labelled.get_legend_handles_labels()
    columns = 2 if figure.get_size_inches()[0] > 7 else 1
    figure.legend(handles, labels, loc="upper center", ncols=columns, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 0.98 - 0.028 * -(-len(labels) // columns)))
    figure.text(0.01, 0.01, title, fontsize=7, color="0.4", wrap=True)
    save_png(figure, path)
