"""How cost grows with a size."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

SIZES = ("vocab", "tokens", "top_k", "width")
COSTS = ("milliseconds", "peak_bytes")


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size by least squares: 1 is linear. NaN for fewer than two sizes or a cost of 0.

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
    """The largest ratio of a size's cost per unit to that of the next smaller size; at most 1 where nothing jumps.

    Example:
        >>> largest_cliff([1000, 2000, 4000], [10, 20, 60])
        1.5
    """
    rates = [cost / size for size, cost in sorted(zip(sizes, costs, strict=True))]
    return max((later / one for one, later in itertools.pairwise(rates) if one > 0), default=math.nan)


def growth(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each sweep of a task by an implementation: exponents of time and memory, and the largest cliffs.

    Of the fastest rounds, where records have them: what else a machine does makes a round slower, never faster.
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
        rows.append(row)
    return rows
