"""Information bounds against closed forms, SciPy, Monte Carlo and a float64 oracle."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from sgfast.metrics import fano_error_bound, information, information_bounds, pac_privacy_success_bound
from tests.live_bytes import LiveBytes


def mixture(count: int, *shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count + sum(shape))
    mean = spread * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    std = torch.exp(0.3 * torch.randn(count, *shape, generator=generator, dtype=torch.float64))
    return mean.to(dtype), std.to(dtype)


def oracle(mean: Tensor, std: Tensor, used: Tensor | None = None, alpha: float = 0.5) -> list[float]:
    """The four numbers by the definitions, pair by pair with NumPy."""
    means, stds = (side.double().flatten(1).numpy() for side in (mean, std))
    selected = np.ones(means.shape, bool) if used is None else used.flatten(1).numpy()
    count = len(means)
    divergences, chernoff = np.zeros((2, count, count)), {}
    for order in (0.5, alpha):
        distance = np.zeros((count, count))
        for i in range(count):
            for j in range(count):
                s = selected[i] & selected[j]
                v, w, square = stds[i][s] ** 2, stds[j][s] ** 2, (means[i][s] - means[j][s]) ** 2
                divergences[0, i, j] = 0.5 * np.sum(np.log(w / v) + (v + square) / w - 1)
                mixed = (1 - order) * v + order * w
                distance[i, j] = 0.5 * np.sum(
                    order * (1 - order) * square / mixed + np.log(mixed / v ** (1 - order) / w**order)
                )
        chernoff[order] = distance
    estimate = [
        -np.mean(scipy.special.logsumexp(-distance, axis=1) - math.log(count))
        for distance in (divergences[0], chernoff[0.5], chernoff[alpha])
    ]
    return [divergences[0].mean(), *estimate]


@pytest.mark.parametrize("shape", [(1, 3), (6, 4), (5, 3, 4), (40, 2, 33)], ids=str)
@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_definitions(shape, alpha, dtype):
    mean, std = mixture(*shape, spread=0.2, dtype=dtype)
    bounds = information_bounds(mean, std, alpha=alpha)
    expected = torch.tensor(oracle(mean, std, alpha=alpha), dtype=torch.float64)
    torch.testing.assert_close(torch.stack(bounds).double(), expected, rtol=1e-6, atol=1e-7)
    assert all(bound.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for bound in bounds)


def test_chernoff_distance_equals_the_integral():
    """C_α = −ln ∫ p^α q^(1−α), integrated by SciPy, one feature at a time."""
    mean, std = mixture(2, 3)
    p, q = ([scipy.stats.norm(m, s) for m, s in zip(mean[i].tolist(), std[i].tolist(), strict=True)] for i in (0, 1))
    for alpha in (0.3, 0.5, 0.8):
        expected = -sum(
            math.log(scipy.integrate.quad(lambda x, p=p, q=q, a=alpha: p.pdf(x) ** a * q.pdf(x) ** (1 - a), -30, 30)[0])
            for p, q in zip(p, q, strict=True)
        )
        distances = information._chernoff_distances(
            mean[:, None], std[:, None], torch.ones(2, 1, dtype=torch.bool), alpha
        )
        assert distances[0, 1].item() == pytest.approx(expected, rel=1e-7)


def test_two_gaussians_of_equal_variance():
    """KL = Δ²/2σ², Bhattacharyya = Δ²/8σ²."""
    mean, std = torch.tensor([[0.0], [3.0]], dtype=torch.float64), torch.full((2, 1), 2.0, dtype=torch.float64)
    bounds = information_bounds(mean, std, alpha=0.25)
    kl, bhattacharyya, chernoff = 9 / 8, 9 / 32, 0.25 * 0.75 * 9 / 8
    assert bounds.mean_pairwise_kl.item() == pytest.approx(kl / 2, rel=1e-12)
    for bound, distance in zip(bounds[1:], (kl, bhattacharyya, chernoff), strict=True):
        assert bound.item() == pytest.approx(math.log(2) - math.log1p(math.exp(-distance)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identical_components_tell_nothing(dtype):
    mean, std = mixture(1, 4, 50, dtype=dtype)
    for bound in information_bounds(mean.expand(30, -1, -1), std.expand(30, -1, -1), alpha=0.3):
        assert bound.item() == pytest.approx(0, abs=1e-12 if dtype == torch.float64 else 1e-6)


def test_far_components_tell_everything():
    mean, std = mixture(50, 8, spread=1e3)
    bounds = information_bounds(mean, std, alpha=0.1)
    assert bounds.mean_pairwise_kl > 1e6
    for bound in bounds[1:]:
        assert bound.item() == pytest.approx(math.log(50), rel=1e-12)
    only = information_bounds(mean[:1], std[:1])
    assert [bound.item() for bound in only] == [0, 0, 0, 0]


@pytest.mark.parametrize("spread", [0.2, 0.7, 2.0])
def test_monte_carlo_lies_between_the_bounds(spread):
    mean, std = mixture(6, 4, spread=spread)
    generator = torch.Generator().manual_seed(5)
    component = torch.distributions.Normal(mean, std)
    samples = mean + std * torch.randn(40_000, 6, 4, generator=generator, dtype=torch.float64)
    log_density = component.log_prob(samples[:, :, None]).sum(-1)
    own = log_density.diagonal(dim1=1, dim2=2)
    pointwise = own - (log_density.logsumexp(-1) - math.log(6))
    truth, error = pointwise.mean().item(), 5 * pointwise.std().item() / math.sqrt(pointwise.numel())
    bounds = information_bounds(mean, std, alpha=0.4)
    assert 0 < bounds.bhattacharyya_lower <= truth + error
    assert 0 < bounds.chernoff_lower <= truth + error
    assert truth - error <= bounds.kl_upper <= bounds.mean_pairwise_kl
    assert bounds.kl_upper <= math.log(6)
    assert bounds.kl_upper - bounds.bhattacharyya_lower > 10 * error


@pytest.mark.parametrize("mask_shape", [(5, 3), (5, 3, 4)], ids=str)
def test_masks(mask_shape):
    mean, std = mixture(5, 3, 4, spread=0.3)
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) > 0.3
    used = mask if mask.dim() == 3 else mask[..., None].expand(5, 3, 4)
    expected = torch.tensor(oracle(mean, std, used, alpha=0.3), dtype=torch.float64)
    mean[~used], std[~used] = math.nan, math.inf
    bounds = information_bounds(mean, std, mask.int(), alpha=0.3)
    torch.testing.assert_close(torch.stack(bounds), expected, rtol=1e-9, atol=1e-12)


def test_candidates_with_nothing_selected_are_left_out():
    mean, std = mixture(6, 3, 4, spread=0.3)
    mask = torch.ones(6, 3)
    mask[[1, 4]] = 0
    kept = mask.any(1)
    expected = information_bounds(mean[kept], std[kept], alpha=0.3)
    mean[~kept] = math.nan
    torch.testing.assert_close(torch.stack(information_bounds(mean, std, mask, alpha=0.3)), torch.stack(expected))
    tokens = information_bounds(mean[:, 0], std[:, 0], kept)
    torch.testing.assert_close(torch.stack(tokens), torch.stack(information_bounds(mean[kept, 0], std[kept, 0])))
    assert all(bound.isnan() for bound in information_bounds(mean, std, torch.zeros(6, 3)))


def test_alpha_at_the_ends_tells_nothing():
    mean, std = mixture(6, 4)
    for alpha in (0.0, 1.0):
        assert information_bounds(mean, std, alpha=alpha).chernoff_lower.item() == pytest.approx(0, abs=1e-12)


def test_memory_is_bounded(monkeypatch):
    """All pairs of all features at once would take 64 MiB for every temporary."""
    mean, std = mixture(64, 4, 512, dtype=torch.float32)
    whole = information_bounds(mean, std, alpha=0.3)
    monkeypatch.setattr(information, "_CHUNK_BYTES", 2**18)
    with LiveBytes() as counted:
        chunked = information_bounds(mean, std, alpha=0.3)
    torch.testing.assert_close(torch.stack(chunked), torch.stack(whole))
    assert counted.peak < 2 * 2**18 + 12 * 8 * 64**2


def test_information_errors():
    mean, std = mixture(4, 3, 2)
    for arguments, options, error, message in (
        ((mean, std[:2]), {}, ValueError, "mean and std must have one shape"),
        ((mean[0, 0], std[0, 0]), {}, ValueError, r"mean must have shape \(N, T, D\) or \(N, D\).*got \(2,\)"),
        ((mean[:0], std[:0]), {}, ValueError, "N at least 1"),
        ((mean.long(), std), {}, TypeError, "mean must be float32"),
        (
            (mean, std, torch.ones(3, 4)),
            {},
            ValueError,
            r"mask must have the shape of mean, \(4, 3, 2\), .*got \(3, 4\)",
        ),
        ((mean, std), {"alpha": 1.5}, ValueError, r"alpha must lie in \[0, 1\]; got 1.5"),
        ((mean, std), {"alpha": math.nan}, ValueError, "alpha must lie in"),
    ):
        with pytest.raises(error, match=message):
            information_bounds(*arguments, **options)


@pytest.mark.parametrize("information_in_nats", [0.0, 0.1, 1.112, 5.0, 50.0])
@pytest.mark.parametrize("classes", [2, 10, 128_256])
def test_pac_bound_solves_its_equation(information_in_nats, classes):
    prior = 1 / classes
    bound = pac_privacy_success_bound(information_in_nats, prior)

    def excess(p: float) -> float:
        return float(scipy.special.rel_entr([p, 1 - p], [prior, 1 - prior]).sum()) - information_in_nats

    if excess(1.0) <= 0:
        assert bound == 1.0
    else:
        assert bound == pytest.approx(scipy.optimize.brentq(excess, prior, 1.0, xtol=1e-15), rel=1e-7)
    assert prior <= bound <= 1


def test_pac_bound_anchors():
    """A published 12.69 % per token over a vocabulary of 128256 corresponds to 1.112 nats."""
    assert pac_privacy_success_bound(1.112, 1 / 128_256) == pytest.approx(0.1269, abs=5e-5)
    assert pac_privacy_success_bound(0.0, 0.25) == pytest.approx(0.25)
    assert pac_privacy_success_bound(math.log(4), 0.25) == pytest.approx(1.0)
    assert pac_privacy_success_bound(math.inf, 0.25) == 1.0
    assert pac_privacy_success_bound(1e-3, 1e-300) < 1e-4


def test_fano_bound():
    assert fano_error_bound(0.0, 1024) == pytest.approx(0.9)
    assert fano_error_bound(math.log(8), 1024) == pytest.approx(1 - 4 / 10)
    assert fano_error_bound(100.0, 1024) == 0.0
    assert fano_error_bound(0.0, 2) == 0.0


def test_fano_bound_is_the_weaker_one():
    for classes in (2, 17, 49_152):
        for nats in np.linspace(0, 12, 25).tolist():
            assert fano_error_bound(nats, classes) <= 1 - pac_privacy_success_bound(nats, 1 / classes) + 1e-12


def test_bounds_hold_for_a_known_channel():
    """A symmetric channel over 8 classes, right with probability 0.6: the best guess is right as often."""
    right, classes = 0.6, 8
    wrong = (1 - right) / (classes - 1)
    nats = math.log(classes) + right * math.log(right) + (1 - right) * math.log(wrong)
    assert pac_privacy_success_bound(nats, 1 / classes) == pytest.approx(right)
    assert 0 < fano_error_bound(nats, classes) < 1 - right


def test_bounds_take_tensors():
    nats = torch.tensor([[0.0, 1.0], [5.0, math.nan]])
    for bounds, one in (
        (pac_privacy_success_bound(nats, 0.01), lambda value: pac_privacy_success_bound(value, 0.01)),
        (fano_error_bound(nats, 100), lambda value: fano_error_bound(value, 100)),
    ):
        assert (bounds.shape, bounds.dtype) == ((2, 2), torch.float64)  # rounded, it would bound nothing
        assert bounds.flatten()[:3].tolist() == pytest.approx([one(0.0), one(1.0), one(5.0)])
        assert bounds[1, 1].isnan()


def test_errors_of_success_and_error_bounds():
    with pytest.raises(ValueError, match="num_classes must be at least 2; got 1"):
        fano_error_bound(1.0, 1)
    for prior in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"prior must lie in \(0, 1\)"):
            pac_privacy_success_bound(1.0, prior)
    for function in (lambda nats: fano_error_bound(nats, 3), lambda nats: pac_privacy_success_bound(nats, 0.5)):
        with pytest.raises(ValueError, match="mutual_information must not be negative; got -1"):
            function(-1.0)
