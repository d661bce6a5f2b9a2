"""Mean, percentiles and extremes of any number of values, in constant memory.

Every quantity has an exact sum (`sgfast.metrics.exact_sum`), a histogram and its two extremes. All are integers. Sums
and histograms add, and the larger of two extremes is kept. A result is therefore the same to the last bit however the
values are cut into updates, processes and merged accumulators.

The histogram has a bin for each sign, each exponent and each value of the first `_FRACTION_BITS` bits of the fraction
of a float32 number. The two edges of a bin are less than 2⁻⁹ apart, relative to the lower edge. A percentile reads the
middle of a bin and is therefore within 1e-3 relative of the exact order statistic. Below 1.2e-38, the smallest normal
float32 number, bins have equal widths instead.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.metrics.accumulators import Accumulator
from sgfast.metrics.exact_sum import WIDTH, carried, exact_sums, quotient, settled

# Name of a percentile → its place among all values, in thousandths.
PERCENTILES = {
    "p99.9": 999,
    "p99": 990,
    "p95": 950,
    "p90": 900,
    "median": 500,
    "p10": 100,
    "p5": 50,
    "p1": 10,
    "p0.1": 1,
}
_THOUSAND = 1000

_FRACTION_BITS = 9
_DROPPED_BITS = 23 - _FRACTION_BITS
# The bins of one sign, up to the bin of infinity.
_BINS = (0xFF << _FRACTION_BITS) + 1
_NOTHING = torch.iinfo(torch.int64).min


class Distributions(Accumulator):
    """The distribution of each of several quantities over a stream of tokens.

    Args:
        names: the quantities.
        options: what two accumulators must share to be merged, beyond the names.

    Example:
        >>> import torch
        >>> from sgfast.metrics.distributions import Distributions
        >>> distributions = Distributions(["change"])
        >>> distributions.add({"change": torch.tensor([-1.0, 0.0, 4.0])})
        >>> figures = distributions.compute()
        >>> figures["change"]["mean"], figures["change"]["max"], figures["tokens"]
        (1.0, 4.0, 3)
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, Any] | None = None) -> None:
        self._names = tuple(names)
        size = len(self._names)
        # In this order: sums, histograms, the number of tokens, the maxima of value and of −value.
        counts = torch.zeros(size * (WIDTH + 2 * _BINS + 2) + 1, dtype=torch.int64)
        counts[-2 * size :] = _NOTHING
        super().__init__(counts, {"names": ",".join(self._names), **(options or {})}, maxima=2 * size)

    def add(self, values: Mapping[str, Tensor], mask: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            values: for each name a floating tensor, all of one shape.
            mask: bool of that shape, True = count this token; None for all.
        """
        stacked = torch.stack([values[name].detach().flatten().to(torch.float64) for name in self._names])
        selected = torch.ones_like(stacked[0], dtype=torch.bool) if mask is None else mask.flatten()
        sums = exact_sums(torch.where(selected, stacked, 0))
        present = selected & ~stacked.isnan()
        histograms = stacked.new_zeros((len(stacked), 2 * _BINS), dtype=torch.int64)
        histograms.scatter_add_(1, _bins(torch.where(present, stacked, 0)), present.to(torch.int64))
        extremes = torch.stack([torch.where(present, _ordered(part), _NOTHING) for part in (stacked, -stacked)])
        nothing = extremes.new_full((*extremes.shape[:2], 1), _NOTHING)
        largest = torch.cat([extremes, nothing], dim=-1).amax(-1)
        self._add(torch.cat([sums.flatten(), histograms.flatten(), selected.sum()[None], largest.flatten()]))

    def _add(self, counts: Tensor) -> None:
        super()._add(counts)
        sums = len(self._names) * WIDTH
        self.counts[:sums] = carried(self.counts[:sums].view(-1, WIDTH)).flatten()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state. The same tokens give the same bytes, in whatever order they were added."""
        state = super().state_dict()
        sums = len(self._names) * WIDTH
        state["counts"][:sums] = settled(state["counts"][:sums].view(-1, WIDTH)).flatten()
        return state

    def compute(self, *, all_processes: bool = True) -> dict[str, Any]:
        """Return the distribution of each quantity.

        Args:
            all_processes: True adds up the updates of all processes under torch.distributed. Every process must call
                this then, also a process without updates. False takes this process's updates alone.

        Returns:
            For each name a dictionary of ``mean`` (correctly rounded), ``max`` and ``min`` (exact), and ``p99.9``,
            ``p99``, ``p95``, ``p90``, ``median``, ``p10``, ``p5``, ``p1``, ``p0.1`` (linear interpolation between the
            two order statistics, as in ``numpy.percentile``; each order statistic within 1e-3 relative); NaN without
            a token and where a value is NaN. ``tokens`` is the number of tokens.
        """
        size = len(self._names)
        total = self._total(all_processes).cpu()
        sums, histograms, tokens, extremes = torch.split(total, [size * WIDTH, size * 2 * _BINS, 1, 2 * size])
        count = int(tokens)
        largest, smallest = _unordered(extremes).view(2, size) * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        result: dict[str, Any] = {}
        for index, name in enumerate(self._names):
            histogram = histograms.view(size, -1)[index]
            result[name] = {
                "mean": quotient(sums.view(size, WIDTH)[index].tolist(), count),
                **_grid(histogram.cumsum(0), count, float(smallest[index]), float(largest[index])),
            }
        return result | {"tokens": count}


def _grid(reached: Tensor, count: int, smallest: float, largest: float) -> dict[str, float]:
    """Return extremes and percentiles of values, from the number of values up to the end of each bin."""
    if count == 0 or int(reached[-1]) < count:  # a value is NaN
        return dict.fromkeys(("max", *PERCENTILES, "min"), math.nan)

    def order_statistic(place: int) -> float:
        middle = _middle(int(torch.searchsorted(reached, place, right=True)))
        return min(max(middle, smallest), largest)

    grid = {"max": largest}
    for name, thousandths in PERCENTILES.items():
        place, part = divmod((count - 1) * thousandths, _THOUSAND)
        below = order_statistic(place)
        if part == 0:
            grid[name] = below
        else:
            above = order_statistic(place + 1)
            # Equal values have no difference, also if they are infinite.
            grid[name] = below if below == above else below + (above - below) * (part / _THOUSAND)
    return grid | {"min": smallest}


def _bins(values: Tensor) -> Tensor:
    """Return the bin of each value: bins ascend with values; the bins of +0 and −0 are one."""
    magnitude = values.abs().to(torch.float32).contiguous().view(torch.int32).to(torch.int64) >> _DROPPED_BITS
    return torch.where(values < 0, _BINS - 1 - magnitude, _BINS + magnitude)


def _middle(index: int) -> float:
    """Return the value from which both edges of a bin are equally far, relative to themselves."""
    sign, magnitude = (1.0, index - _BINS) if index >= _BINS else (-1.0, _BINS - 1 - index)
    low, high = (
        torch.tensor([edge << _DROPPED_BITS for edge in (magnitude, magnitude + 1)], dtype=torch.int32)
        .view(torch.float32)
        .tolist()
    )
    if magnitude == 0 or not math.isfinite(high):  # zero, the last finite bin, and infinity
        return sign * float(low)
    return float(sign * (2 * low * high / (low + high)))


def _ordered(values: Tensor) -> Tensor:
    """Return integers that are ordered as the float64 values are."""
    bits = (values + 0.0).contiguous().view(torch.int64)  # −0 becomes 0
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _unordered(integers: Tensor) -> Tensor:
    """Return the float64 values that `_ordered` was given."""
    return torch.where(integers < 0, integers ^ torch.iinfo(torch.int64).max, integers).view(torch.float64)
