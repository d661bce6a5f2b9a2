"""The growth of cost with a size."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

SIZES = ("vocab", "tokens", "top_k", "width")
COSTS = ("milliseconds", "peak_bytes")
EAGER = "eager PyTorch"


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit the slope of log cost over log size: 1 is linear. NaN for fewer than two sizes or a cost of 0.

    Example:
        >>> exponent([1, 10, 100], [3, 30, 300])
        1.0
    """
    if len(set(sizes)) < 2 or min(costs) <= 0:
        return math.nan
    x, y = ([math.log(one) for one in values] for values in (sizes, costs))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    products = sum((one - x_mean) * (other - y_mean) for one, other in zip(x, y, strict=True))
    return round(products / sum((one - x_mean) ** 2 for one in x), 12)


def largest_cliff(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the largest ratio of a size's cost per unit to the next smaller size's; at most 1 if nothing jumps.

    Example:
        >>> largest_cliff([1000, 2000, 4000], [10, 20, 60])
        1.5
    """
    rates = [cost / size for size, cost in sorted(zip(sizes, costs, strict=True))]
    return max((later / one for one, later in itertools.pairwise(rates) if one > 0), default=math.nan)


def largest_rise(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the largest ratio of a size's value to the next smaller size's.

    Example:
        >>> largest_rise([1000, 2000, 4000], [0.5, 0.25, 0.5])
        2.0
    """
    ordered = [value for _, value in sorted(zip(sizes, values, strict=True))]
    return max((later / one for one, later in itertools.pairwise(ordered)), default=math.nan)


def growth(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute exponents of time and memory and the largest cliffs, for each sweep of a task by an implementation.

    The times are of the fastest rounds, if records have them, because other work on a machine makes a round slower and
    never faster. ``ratio_cliff`` is the largest rise, from one size to the next, of the ratio between the time and the
    time of eager PyTorch. The two ran in turns. The machine's cost of memory at a size cancels in this ratio.
    """
    sweeps: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        if record.get("sweep") in SIZES:
            key = tuple(record[name] for name in ("sweep", "family", "task", "implementation", "dtype"))
            sweeps.setdefault(key, []).append(record)
    rows = []
    for (sweep, family, task, implementation, dtype), points in sweeps.items():
        sizes = [point[sweep] for point in points]
        if len(set(sizes)) < 2:
            continue
        row: dict[str, Any] = {
            "sweep": sweep,
            "family": family,
            "task": task,
            "implementation": implementation,
            "dtype": dtype,
        }
        row |= {"from": min(sizes), "to": max(sizes)}
        for cost in COSTS:
            costs = [point.get(f"fastest_{cost}", point[cost]) for point in points]
            row[f"{cost}_exponent"] = exponent(sizes, costs)
            row[f"{cost}_cliff"] = largest_cliff(sizes, costs)
        peers = sweeps.get((sweep, family, task, EAGER, dtype), [])
        if implementation != EAGER and [peer[sweep] for peer in peers] == sizes:
            ratios = [one["milliseconds"] / peer["milliseconds"] for one, peer in zip(points, peers, strict=True)]
            row["ratio_cliff"] = largest_rise(sizes, ratios)
        rows.append(row)
    return rows
