"""Exact sums against rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgfast.metrics.exact_sum import carried, exact_sums, quotient, to_float64

FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e306, max_value=1e306)


@given(st.lists(FINITE, max_size=40), st.integers(1, 1000), st.randoms())
def test_the_quotient_is_correctly_rounded_whatever_the_order_and_parts(values, count, random):
    expected = float(sum(map(Fraction, values), Fraction(0)) / count)
    assert quotient(exact_sums(torch.tensor(values, dtype=torch.float64)).tolist(), count) == expected
    random.shuffle(values)
    cut = random.randint(0, len(values))
    parts = [exact_sums(torch.tensor(part, dtype=torch.float64)) for part in (values[:cut], values[cut:])]
    assert quotient((parts[0] + parts[1]).tolist(), count) == expected
    assert quotient(carried(parts[0] + parts[1]).tolist(), count) == expected


@given(st.lists(st.floats(min_value=0, max_value=1e306, allow_subnormal=True), max_size=40))
def test_sums_on_the_device_of_non_negative_values(values):
    expected = float(sum(map(Fraction, values), Fraction(0)))
    sums = exact_sums(torch.tensor([values, values[::-1]], dtype=torch.float64))
    assert to_float64(sums).tolist() == pytest.approx([expected, expected], rel=2**-50, abs=0)
    assert torch.equal(sums[0], sums[1])


def test_the_largest_and_the_smallest_numbers():
    largest, smallest = torch.finfo(torch.float64).max, 5e-324
    values = torch.tensor([largest] * 8 + [smallest] * 3 + [-largest] * 8, dtype=torch.float64)
    assert quotient(exact_sums(values).tolist(), 1) == 3 * smallest
    assert quotient(exact_sums(values[:8]).tolist(), 8) == largest
    assert to_float64(exact_sums(values[8:11])).item() == 3 * smallest
    assert to_float64(exact_sums(values[:8])).item() == math.inf


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, math.inf], math.inf),
        ([math.inf, math.nan], math.nan),
        ([1.0, -math.inf], -math.inf),
        ([math.inf, -math.inf], math.nan),
    ],
)
def test_infinities_and_nan(values, expected):
    sums = exact_sums(torch.tensor(values))
    assert quotient(sums.tolist(), 2) == pytest.approx(expected, nan_ok=True)
    if min(values) >= 0:
        assert to_float64(sums).item() == pytest.approx(expected, nan_ok=True)


def test_nothing_is_nan_and_the_empty_sum_is_zero():
    assert math.isnan(quotient(exact_sums(torch.empty(0)).tolist(), 0))
    assert to_float64(exact_sums(torch.empty(3, 0))).tolist() == [0, 0, 0]
