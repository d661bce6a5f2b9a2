"""Confidence intervals of rates over tokens that come in records."""

import math
from collections.abc import Sequence

# The 97.5th percentile of the standard normal distribution.
_Z = 1.959963984540054


def clustered_interval(counts: Sequence[tuple[float, float]]) -> list[float] | None:
    """Return a 95 % interval of the rate Σ events / Σ tokens, for pairs (events, tokens) of records.

    Tokens of one record are not independent. With the rate r and k records, the variance of r is

        k/(k − 1) · Σ (events − r·tokens)² / (Σ tokens)²

    The interval is Wilson's, with the number of independent tokens that has this variance, r(1 − r)/variance, at least
    the number of records and at most the number of tokens.

    Returns:
        [low, high], or None for fewer than two records with tokens.

    Example:
        >>> [round(end, 3) for end in clustered_interval([(0, 10), (5, 10), (10, 10), (5, 10)])]
        [0.188, 0.812]
    """
    counts = [(events, tokens) for events, tokens in counts if tokens > 0]
    records, total = len(counts), sum(tokens for _, tokens in counts)
    if records < 2:
        return None
    rate = sum(events for events, _ in counts) / total
    squares = math.fsum((events - rate * tokens) ** 2 for events, tokens in counts)
    variance = records / (records - 1) * squares / total**2
    independent = rate * (1 - rate) / variance if variance > 0 else records
    return wilson_interval(rate, min(max(independent, records), total))


def wilson_interval(rate: float, number: float) -> list[float]:
    """Return Wilson's 95 % interval of a rate over a number of independent events.

    Example:
        >>> [round(end, 4) for end in wilson_interval(0.1, 50)]
        [0.0435, 0.2136]
    """
    middle = rate + _Z**2 / (2 * number)
    half = _Z * math.sqrt(rate * (1 - rate) / number + _Z**2 / (4 * number**2))
    scale = 1 + _Z**2 / number
    # At the ends the difference is 0 but for rounding.
    low = 0.0 if rate == 0 else (middle - half) / scale
    high = 1.0 if rate == 1 else (middle + half) / scale
    return [low, high]
