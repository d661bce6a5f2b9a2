"""The demo's picture: the training's curves, and the held-out figures before and after the training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sgfast.training.history_plot import draw_curve
from sgfast.utils.figures import load_pyplot, save_png

_CURVES = {
    "distillation_layer_cosine_distance": ("layer cosine distance (utility)", "tab:blue"),
    "input_embedding_similarity": ("input similarity (strength)", "tab:orange"),
    "std_log_ratio": ("log(max sigma / sigma) (strength)", "tab:green"),
}
_BARS = {
    "next_token_agreement": "next token\nunchanged",
    "next_token_utility/total_variation": "total variation\nof next token",
    "known_transform_failure_rate": "attack fails\n(knows transform)",
    "nearest_neighbor_failure_rate": "attack fails\n(nearest, L2)",
}


def plot_summary(
    path: Path, history: Sequence[Mapping[str, float]], before: Mapping[str, float], after: Mapping[str, float]
) -> None:
    """Write a PNG: the loss components over the steps, and the held-out metrics before and after."""
    pyplot = load_pyplot()
    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.1))
    for name, (label, color) in _CURVES.items():
        if history and name in history[0]:
            draw_curve(curves, history, name, color, label)
    curves.set(xlabel="step", title="training: unweighted loss components")
    curves.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    curves.legend(fontsize=8)
    width = 0.38
    for offset, label, values, color in ((-1, "before", before, "0.7"), (1, "after", after, "tab:green")):
        heights = [values[name] for name in _BARS]
        places = [index + offset * width / 2 for index in range(len(_BARS))]
        drawn = bars.bar(places, heights, width, label=label, color=color)
        bars.bar_label(drawn, [f"{height:.2f}" for height in heights], fontsize=8)
    bars.set(ylim=(0, 1.12), title="held-out text")
    bars.set_xticks(range(len(_BARS)), _BARS.values(), fontsize=8)
    bars.legend(loc="upper left", fontsize=8)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_png(figure, path, dpi=120)
