"""Figures of matplotlib that are drawn without a display and written whole."""

from pathlib import Path
from typing import Any

from sgfast.utils.files import replacing


def load_pyplot() -> Any:
    """Import ``matplotlib.pyplot`` so that it opens no window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_png(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure to a PNG file, which is replaced only by a whole one; close the figure in any case."""
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi)
    finally:
        load_pyplot().close(figure)
