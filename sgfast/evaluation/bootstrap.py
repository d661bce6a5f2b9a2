"""Intervals by bootstrap over windows, in memory that does not grow with the number of windows.

Tokens of one window depend on each other, so that windows are what is drawn again. A resample draws as many windows as
there are, each with equal chance and with replacement. A figure of a resample is the figure of its sums, for example
Σ divergence / Σ tokens. The interval is that between two percentiles of the figure over all resamples (Efron and
Tibshirani 1993, chapter 13).

All figures read the same resamples. The difference of two candidates' figures is therefore a paired difference: what
makes a window hard for both candidates does not widen the interval.

The windows pass by once, in blocks. The numbers of draws of the blocks are conditional binomials, which together are
the multinomial of a draw from all windows.
"""

import math
from collections.abc import Iterable, Iterator

import numpy
import torch
from torch import Tensor

RESAMPLES = 2000
_BLOCK = 512


def resampled_sums(sums: Iterable[Tensor], windows: int, *, seed: int, resamples: int = RESAMPLES) -> Tensor:
    """Draw the windows again, and add up each resample.

    The result depends on the seed and on the order of the windows. It does not depend on how they are cut into parts.

    Args:
        sums: parts of the windows' sums in order, (n, S) floating each.
        windows: W, the number of windows of all parts.
        seed: int ≥ 0.
        resamples: R, the number of resamples.

    Returns:
        (R, S) float64, the sums of each resample.

    Raises:
        ValueError: the parts have not W windows, or W or R is below 1.

    Example:
        >>> import torch
        >>> sums = torch.tensor([[2.0, 1.0], [6.0, 3.0]])  # divergence and tokens of two windows
        >>> resampled = resampled_sums([sums], 2, seed=0)
        >>> interval(resampled[:, 0] / resampled[:, 1])
        (2.0, 2.0)
    """
    for name, count in (("windows", windows), ("resamples", resamples)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
    generator = numpy.random.Generator(numpy.random.PCG64(seed))
    undrawn = numpy.full(resamples, windows, dtype=numpy.int64)
    left, totals = windows, None
    for block in _blocks(sums):
        if len(block) > left:
            raise ValueError(f"sums must have {windows} windows; got more")
        # The chance of a window that is still undrawn to be in this block.
        draws = undrawn if len(block) == left else generator.binomial(undrawn, len(block) / left)
        undrawn, left = undrawn - draws, left - len(block)
        chosen = generator.integers(len(block), size=int(draws.sum()))
        chosen += numpy.repeat(numpy.arange(resamples) * len(block), draws)
        times = numpy.bincount(chosen, minlength=resamples * len(block)).reshape(resamples, len(block))
        # einsum adds in the same order whatever the number of threads; a window that is not drawn adds no infinity.
        added = numpy.einsum("rw,ws->rs", times.astype(numpy.float64), numpy.where(numpy.isfinite(block), block, 0.0))
        for row, column in numpy.argwhere(~numpy.isfinite(block)):
            added[times[:, row] > 0, column] += block[row, column]
        totals = added if totals is None else totals + added
    if left:
        raise ValueError(f"sums must have {windows} windows; got {windows - left}")
    return torch.from_numpy(totals)


def interval(values: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval that holds the given part of a figure's resampled values, equal parts left out on each side.

    Both ends are NaN if a value is NaN.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1, or there is no value.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1; got {confidence}")
    if not values.numel():
        raise ValueError("values must have at least one number")
    if values.isnan().any():
        return math.nan, math.nan
    ordered = values.flatten().double().sort().values
    ends = []
    for part in ((1 - confidence) / 2, (1 + confidence) / 2):
        place = part * (len(ordered) - 1)
        below, above = (float(ordered[round_to(place)]) for round_to in (math.floor, math.ceil))
        ends.append(below if below == above else below + (above - below) * (place - math.floor(place)))
    return ends[0], ends[1]


def _blocks(parts: Iterable[Tensor]) -> Iterator[numpy.ndarray]:
    """Yield the windows of all parts in blocks of one size, the last one excepted."""
    waiting: list[numpy.ndarray] = []
    count = 0
    for part in parts:
        for piece in torch.split(part.detach().to("cpu", torch.float64), _BLOCK):
            waiting.append(piece.numpy())
            count += len(piece)
            if count >= _BLOCK:
                whole = numpy.concatenate(waiting)
                yield whole[:_BLOCK]
                waiting, count = [whole[_BLOCK:]], count - _BLOCK
    if count:
        yield numpy.concatenate(waiting)
