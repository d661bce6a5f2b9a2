"""Intervals of rates over tokens in records, against Wilson's formula, SciPy and repeated sampling."""

import random

import pytest
from scipy import stats

from sgfast.evaluation.intervals import clustered_interval, wilson_interval


@pytest.mark.parametrize(("events", "number"), [(0, 20), (3, 20), (50, 100), (20, 20)])
def test_wilson_against_scipy(events, number):
    expected = stats.binomtest(events, number).proportion_ci(0.95, method="wilson")
    assert wilson_interval(events / number, number) == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_records_that_agree_in_themselves_count_once():
    """Tokens of one record are all read or all not read: the number of records is what counts."""
    counts = [(10, 10), (0, 10)] * 10
    assert clustered_interval(counts) == pytest.approx(wilson_interval(0.5, 20), abs=1e-12)


def test_the_spread_between_records_counts():
    """By hand: 100 records of 10 tokens, of which 3 or 7 are events; the variance of the rate is that of the means."""
    counts = [(3, 10), (7, 10)] * 50
    independent = 0.25 / (100 / 99 * 100 * 4 / 1000**2)
    assert clustered_interval(counts) == pytest.approx(wilson_interval(0.5, independent), abs=1e-12)


def test_no_more_independent_tokens_than_tokens():
    counts = [(1, 2), (1, 2), (1, 2), (0, 2), (2, 2)] * 20
    low, high = clustered_interval(counts)
    assert [low, high] == pytest.approx(wilson_interval(0.5, 200), abs=1e-12)


def test_coverage():
    """Records whose tokens hang together: the interval holds the true rate in about 95 % of the samples."""
    generator = random.Random(0)
    held = 0
    for _ in range(400):
        counts = []
        for _ in range(40):
            rate = generator.betavariate(2, 2)  # mean 0.5
            counts.append((sum(generator.random() < rate for _ in range(20)), 20))
        low, high = clustered_interval(counts)
        held += low <= 0.5 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_one_record_has_no_interval():
    assert clustered_interval([(1, 10), (0, 0)]) is None
