"""From rho to sigma and back, and which features are masked."""

import math

import pytest
import torch

from sgfast.noise_layer import (
    CloakStandardDeviationParameterization,
    DirectStandardDeviationParameterization,
    PercentMasker,
    recommend_scale,
)


def test_cloak_is_the_published_tanh_form():
    rho = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for shallow in (0.5, 1.0, 3.0):
        sigma = CloakStandardDeviationParameterization((0.1, 2.0), shallow)(rho)
        torch.testing.assert_close(sigma, 0.1 + 1.9 * (1 + torch.tanh(rho / shallow)) / 2)
    at_default = CloakStandardDeviationParameterization()(torch.tensor(-4.0))
    assert at_default.item() == pytest.approx(1e-4 + (2 - 1e-4) * (1 + math.tanh(-4)) / 2, rel=1e-5)


def test_inverse():
    parameterization = CloakStandardDeviationParameterization((1e-3, 2.0), 0.7)
    sigma = torch.linspace(0.002, 1.99, 50, dtype=torch.float64)
    torch.testing.assert_close(parameterization(parameterization.inverse(sigma)), sigma)


def test_half_precision_parameters_keep_their_gradient():
    """tanh in bfloat16 is exactly −1 here, with no way back."""
    rho = torch.tensor([-6.0], dtype=torch.bfloat16, requires_grad=True)
    sigma = CloakStandardDeviationParameterization()(rho)
    sigma.backward()
    assert sigma.dtype == torch.float32
    assert sigma.item() > 1e-4
    assert rho.grad.item() > 0


def test_direct_clamps():
    rho = torch.tensor([-1.0, 0.5, 9.0], requires_grad=True)
    parameterization = DirectStandardDeviationParameterization((0.1, 2.0))
    sigma = parameterization(rho)
    sigma.sum().backward()
    assert sigma.tolist() == pytest.approx([0.1, 0.5, 2.0])
    assert rho.grad.tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(parameterization.inverse(sigma), sigma)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (-0.1, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_scales_out_of_order_are_refused(scale):
    for parameterization in (CloakStandardDeviationParameterization, DirectStandardDeviationParameterization):
        with pytest.raises(ValueError, match="0 <= min < max"):
            parameterization(scale)


@pytest.mark.parametrize("percent", [0.0, 0.1, 0.29, 0.5, 1.0])
def test_masker_masks_exactly_the_largest(percent):
    std = torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(0))
    mask = PercentMasker(percent, feature_dimensions=1)(std)
    count = math.floor(percent * 10 + 1e-9)
    assert (mask.sum(-1) == count).all()
    if 0 < count < 10:
        kept_largest = std.masked_fill(mask, -1).amax(-1)
        assert (std.masked_fill(~mask, 2).amin(-1) >= kept_largest).all()
    per_sample = PercentMasker(percent)(std)
    assert (per_sample.flatten(1).sum(-1) == math.floor(percent * 40 + 1e-9)).all()


def test_masker_breaks_ties_by_index_and_refuses_other_percents():
    assert PercentMasker(0.5)(torch.ones(1, 4)).tolist() == [[True, True, False, False]]
    with pytest.raises(ValueError, match=r"percent_to_mask must lie in \[0, 1\]; got 1.5"):
        PercentMasker(1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [(1e-4, 2.0), (1e-8, 1.0), (0.1, 0.3), (0.3, 1 / 3)])
def test_sigma_ends_where_the_scale_ends(dtype, scale):
    rho = torch.tensor([-100.0, -20.0, 20.0, 100.0], dtype=dtype)
    for parameterization in (CloakStandardDeviationParameterization, DirectStandardDeviationParameterization):
        sigma = parameterization(scale)(rho)
        bounds = torch.tensor(scale, dtype=sigma.dtype)
        assert sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (sigma >= bounds[0]).all()
        assert (sigma <= bounds[1]).all()
        assert torch.equal(sigma[[0, 3]], bounds)


def test_masker_refuses_what_has_no_such_dimensions():
    with pytest.raises(ValueError, match=r"std must have at least 2 dimensions; got shape \(3,\)"):
        PercentMasker(0.5, feature_dimensions=2)(torch.ones(3))
    with pytest.raises(ValueError, match="feature_dimensions must be at least 1; got 0"):
        PercentMasker(0.5, feature_dimensions=0)
    with pytest.raises(TypeError, match="percent_to_mask must be a number; got str"):
        PercentMasker("0.5")


def test_recommend_scale():
    assert recommend_scale(torch.tensor([[0.0, -0.02], [3.0, 1.0]])) == pytest.approx((0.002, 30.0))
    with pytest.raises(ValueError, match="non-zero"):
        recommend_scale(torch.zeros(2, 2))
