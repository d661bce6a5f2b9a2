"""Pictures of an evaluation: the distributions of divergences and ranks, and utility against privacy."""

import bisect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgfast.utils.figures import load_pyplot, save_png

DIVERGENCES_PLOT, RANKS_PLOT, COMPARISON_PLOT = "divergences.png", "ranks.png", "utility_privacy.png"
ATTACKS_PLOT = "attacks.png"
# Attacks that name one token (with --beta, a few). `transformation` gives lists, `information` bounds.
READING_ATTACKS = ("known", "learned", "repeated", "nearest", "farthest")
_NUMBERS = {"known": "transforms of a text", "repeated": "transforms of a text", "learned": "training pairs"}
_TITLES = {
    "next_token_utility/jefferys": "Jeffreys divergence, nats",
    "next_token_utility/jensen_shannon": "Jensen-Shannon divergence, nats",
    "next_token_utility/total_variation": "total variation",
    "next_token_utility/squared_hellinger_distance": "squared Hellinger distance",
    "next_token_agreement": "same likeliest next token",
}
# The divergences of weak transforms are tiny and of strong ones large, so the axis is logarithmic.
_DECADES, _BINS_OF_A_DECADE = (-8, 3), 10
_AGREEMENT, _AGREEMENT_BINS = "next_token_agreement", 40


def plot_divergences(path: Path, sequences: Path, means: Mapping[str, float | None]) -> None:
    """Write a PNG of histograms over the sequences of a ``sequences.jsonl``, which is read line by line."""
    histograms = _histograms(sequences)
    pyplot = load_pyplot()
    figure, grid = pyplot.subplots(2, 3, figsize=(12, 6))
    panels = list(grid.flat)
    for axes, (name, title) in zip(panels, _TITLES.items(), strict=False):
        edges, counts = _edges(name), histograms[name]
        color = "tab:green" if name == _AGREEMENT else "tab:blue"
        axes.stairs(counts, edges, fill=True, color=color, alpha=0.8)
        if name != _AGREEMENT:
            axes.set_xscale("log")
            filled = [place for place, count in enumerate(counts) if count] or [0]
            # Whole decades, whose labels do not collide.
            first, last = filled[0] // _BINS_OF_A_DECADE, filled[-1] // _BINS_OF_A_DECADE + 1
            axes.set_xlim(edges[first * _BINS_OF_A_DECADE], edges[last * _BINS_OF_A_DECADE])
            axes.xaxis.set_minor_formatter("")
        mean = means[name]
        axes.set_title(title if mean is None else f"{title}; mean {mean:.3g}", fontsize=10)
        if mean is not None:
            axes.axvline(max(mean, edges[0]), color="0.2", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("sequences")
    panels[-1].set_visible(False)
    figure.suptitle("next token, through the transform against without it; a mean over each sequence", fontsize=10)
    figure.tight_layout()
    save_png(figure, path)


def plot_ranks(path: Path, histogram: Mapping[str, Sequence[int]]) -> None:
    """Write a PNG of the true tokens' ranks among the table's rows by distance, and of the ranks by chance."""
    first_ranks, tokens = histogram["first_ranks"], histogram["tokens"]
    size, total = histogram["table_size"][0], max(1, sum(tokens))
    ends = [*first_ranks[1:], size]
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    places = range(len(first_ranks))
    axes.bar(places, [count / total for count in tokens], color="tab:orange", label="transformed tokens")
    chance = [(end - first) / size for first, end in zip(first_ranks, ends, strict=True)]
    axes.plot(places, chance, color="0.3", marker=".", linewidth=1, label="if ranks were random")
    labels = [str(first) if end == first + 1 else f"{first}-" for first, end in zip(first_ranks, ends, strict=True)]
    axes.set_xticks(places, labels, rotation=45, fontsize=8)
    axes.set(ylabel="fraction of the tokens", xlabel=f"rank of the true token among {size} by distance, 0 = nearest")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    axes.set_title(f"where an attacker finds the {sum(tokens)} transformed tokens", fontsize=10)
    figure.tight_layout()
    save_png(figure, path)


def plot_comparison(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a PNG of utility against privacy, a point for each transform."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.5, 5))
    for name, metrics in results.items():
        strongest = strongest_attack(metrics)
        utility = metrics["utility"]["next_token_agreement"]
        if strongest is None or utility is None:
            continue
        axes.scatter([strongest[1]], [utility], s=50)
        axes.annotate(
            f"{name}\n({strongest[0]})", (strongest[1], utility), (6, 4), textcoords="offset points", fontsize=8
        )
    axes.set(
        xlim=(-0.03, 1.15),
        ylim=(-0.03, 1.03),
        xlabel="privacy: failure rate of the strongest attack that was run",
        ylabel="utility: same likeliest next token",
    )
    axes.set_title("up and to the right is better", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_png(figure, path)


def plot_attacks(path: Path, attacks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a PNG: the failure rate of each attack with its interval, and the rates over the attacker's effort."""
    pyplot = load_pyplot()
    figure, (bars, curves) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    names = [name for name in READING_ATTACKS if attacks.get(name, {}).get("failure_rate") is not None]
    names.sort(key=lambda name: attacks[name]["failure_rate"])
    for place, name in enumerate(names):
        rate, interval = attacks[name]["failure_rate"], attacks[name].get("ci95")
        bars.barh(place, rate, color="tab:red" if place == 0 else "tab:orange", alpha=0.8)
        if interval is not None:
            bars.plot(interval, [place, place], color="0.2", linewidth=1.5)
        bars.text(min(rate, 0.9) + 0.02, place + 0.12, f"{rate:.1%}", fontsize=8)
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.set(xlim=(0, 1.02), xlabel="failure rate, with 95 % interval", title="the strongest attack first")
    for name, effort in _NUMBERS.items():
        rates = attacks.get(name, {}).get("failure_rates") or {}
        if len(rates) > 1:
            curves.plot([int(number) for number in rates], list(rates.values()), marker="o", label=f"{name}: {effort}")
    curves.set(ylim=(-0.02, 1.02), xlabel="number", ylabel="failure rate", title="with more effort")
    curves.set_xscale("log", base=2)
    if curves.lines:
        curves.legend(fontsize=8, frameon=False)
    else:
        curves.set_visible(False)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_png(figure, path)


def strongest_attack(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the attack that failed least and its failure rate; None if no attack was run.

    Example:
        >>> strongest_attack({"attacks": {"nearest": {"failure_rate": 0.9}, "learned": {"failure_rate": 0.4}}})
        ('learned', 0.4)
    """
    found = [
        (name, attack["failure_rate"])
        for name, attack in metrics["attacks"].items()
        if name in READING_ATTACKS and attack.get("failure_rate") is not None
    ]
    return min(found, key=lambda pair: pair[1], default=None)


def _edges(name: str) -> list[float]:
    if name == _AGREEMENT:
        return [place / _AGREEMENT_BINS for place in range(_AGREEMENT_BINS + 1)]
    low, high = (decade * _BINS_OF_A_DECADE for decade in _DECADES)
    return [10 ** (place / _BINS_OF_A_DECADE) for place in range(low, high + 1)]


def _histograms(sequences: Path) -> dict[str, list[int]]:
    """Count the sequences between neighbouring edges. The outer bins also count the values beyond their edges."""
    edges = {name: _edges(name) for name in _TITLES}
    counts = {name: [0] * (len(ends) - 1) for name, ends in edges.items()}
    with sequences.open(encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            for name, bins in counts.items():
                if (value := values[name]) is not None:
                    place = bisect.bisect_right(edges[name], value) - 1
                    bins[min(max(place, 0), len(bins) - 1)] += 1
    return counts
