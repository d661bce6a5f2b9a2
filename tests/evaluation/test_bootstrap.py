"""Bootstrap over windows: closed forms, SciPy's intervals, coverage, and memory."""

import math
import tracemalloc

import pytest
import scipy.stats
import torch

from sgfast.evaluation.bootstrap import interval, resampled_sums


def windows_of(count, *, seed=0):
    """Sums of divergence and tokens: windows of unequal length, heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 200, (count,), generator=generator).double()
    return torch.stack([tokens * torch.randn(count, generator=generator).exp(), tokens], dim=1)


def ratio(resampled):
    return resampled[:, 0] / resampled[:, 1]


def test_the_moments_of_a_multinomial():
    """Times that windows of several blocks are drawn: mean 1, variance 1 − 1/W, covariance −1/W."""
    count, resamples = 1300, 4000
    marked = torch.zeros(count, 4, dtype=torch.float64)
    marked[3, 0] = marked[511, 1] = marked[512, 2] = 1
    marked[:, 3] = 1
    times = resampled_sums([marked], count, seed=1, resamples=resamples)
    assert (times[:, 3] == count).all()
    for column in range(3):
        assert times[:, column].mean().item() == pytest.approx(1, abs=5 / resamples**0.5)
        assert times[:, column].var().item() == pytest.approx(1 - 1 / count, abs=0.12)
    few = resampled_sums([torch.eye(3)], 3, seed=2, resamples=resamples)
    assert (few.sum(1) == 3).all()
    assert torch.cov(few.T)[0, 1].item() == pytest.approx(-1 / 3, abs=0.05)


@pytest.mark.parametrize("count", [40, 1500])
def test_the_interval_of_scipy(count):
    sums = windows_of(count)
    found = interval(ratio(resampled_sums([sums], count, seed=0, resamples=6000)))
    theirs = scipy.stats.bootstrap(
        tuple(sums.T.numpy()),
        lambda divergence, tokens, axis: divergence.sum(axis) / tokens.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=6000,
        batch=500,
        method="percentile",
        rng=1,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found[0] == pytest.approx(theirs.low, abs=0.06 * width)
    assert found[1] == pytest.approx(theirs.high, abs=0.06 * width)


def test_the_interval_of_a_mean_is_the_normal_one():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = interval(resampled_sums([values[:, None]], 2000, seed=0, resamples=8000)[:, 0] / 2000)
    half = 1.96 * values.std().item() / 2000**0.5
    assert found[0] == pytest.approx(values.mean().item() - half, abs=0.06 * half)
    assert found[1] == pytest.approx(values.mean().item() + half, abs=0.06 * half)


def test_the_interval_covers_the_true_mean():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(300):
        values = torch.rand(60, 1, generator=generator, dtype=torch.float64)
        low, high = interval(resampled_sums([values], 60, seed=seed, resamples=500)[:, 0] / 60)
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / 300 <= 0.98  # 95 %, 3 standard errors of 1.3 % to both sides


def test_paired_differences_are_narrow():
    sums = windows_of(300)
    noise = 0.01 * torch.randn(300, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    both = torch.cat([sums, (sums[:, 0] * (1.02 + noise))[:, None]], dim=1)
    resampled = resampled_sums([both], 300, seed=0)
    difference = (resampled[:, 2] - resampled[:, 0]) / resampled[:, 1]
    low, high = interval(difference)
    alone = interval(ratio(resampled))
    assert low > 0  # a difference of 2 % is seen, although each figure is uncertain by more than 10 %
    assert high - low < 0.05 * (alone[1] - alone[0])


def test_parts_change_nothing_and_seeds_do():
    sums = windows_of(1300)
    whole = resampled_sums([sums], 1300, seed=3, resamples=50)
    for size in (1, 7, 512, 1299):
        assert torch.equal(resampled_sums(sums.split(size), 1300, seed=3, resamples=50), whole)
    assert not torch.equal(resampled_sums([sums], 1300, seed=4, resamples=50), whole)


def test_memory_does_not_grow_with_the_windows():
    peaks = []
    for count in (4_000, 40_000):
        tracemalloc.start()
        resampled_sums((torch.ones(100, 2) for _ in range(count // 100)), count, seed=0, resamples=200)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 20e6


def test_one_window_and_infinities():
    one = resampled_sums([torch.tensor([[3.0, 2.0]])], 1, seed=0, resamples=20)
    assert interval(ratio(one)) == (1.5, 1.5)
    sums = torch.tensor([[1.0, 1.0], [math.inf, 1.0]])
    resampled = resampled_sums([sums], 2, seed=0, resamples=400)
    assert interval(ratio(resampled)) == (1.0, math.inf)
    assert all(map(math.isnan, interval(torch.tensor([1.0, math.nan]))))


@pytest.mark.parametrize(
    ("parts", "windows", "message"),
    [(3, 4, "4 windows; got 3"), (5, 4, "4 windows; got more"), (3, 0, "windows must be at least 1")],
)
def test_wrong_numbers(parts, windows, message):
    with pytest.raises(ValueError, match=message):
        resampled_sums([torch.ones(parts, 2)], windows, seed=0)
    with pytest.raises(ValueError, match="confidence"):
        interval(torch.ones(3), 95)
