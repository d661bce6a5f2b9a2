"""Each component against a float64 rewrite, its masks, and its gradients."""

import math

import pytest
import torch

from sgfast.loss import components
from sgfast.ops import divergences, hidden_distances


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    clean, noisy = (torch.randn(3, 5, 8, generator=generator) for _ in range(2))
    mask = torch.rand(3, 5, generator=generator) > 0.4
    return clean, noisy, mask


def rows(tensor, mask):
    return tensor.double()[mask]


def test_masked_mean_selects_before_it_sums():
    values = torch.tensor([1.0, torch.nan, 5.0, torch.inf], requires_grad=True)
    mean = components.masked_mean(values, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean.item() == 3.0
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_masked_mean_of_nothing_is_zero_with_a_graph():
    values = torch.full((2, 2), torch.nan, requires_grad=True)
    mean = components.masked_mean(values, torch.zeros(2, 2, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert (values.grad == 0).all()


@pytest.mark.parametrize("count", [7, 7.0, torch.tensor(7)])
def test_masked_mean_by_a_global_count(count):
    assert components.masked_mean(torch.ones(4), torch.ones(4, dtype=torch.bool), count).item() == pytest.approx(4 / 7)


def test_std_log_ratio(batch):
    std, mask = batch[0].abs() + 0.1, batch[2]
    expected = (math.log(3.0) - rows(std, mask).log()).mean()
    assert components.std_log_ratio(std, 3.0, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert components.std_log_ratio(torch.full_like(std, 3.0), 3.0, mask).item() == 0.0


def test_std_log_ratio_leaves_out_suppressed_features(batch):
    std, mask = batch[0].abs() + 0.1, batch[2]
    suppressed = torch.zeros_like(std, dtype=torch.bool)
    suppressed[..., :3] = True
    std[..., :3] = torch.nan
    std[~mask] = 0.0
    std.requires_grad_()
    value = components.std_log_ratio(std, 3.0, mask, suppressed)
    expected = (math.log(3.0) - rows(std[..., 3:], mask).log()).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    value.backward()
    assert std.grad.isfinite().all()
    assert (std.grad[mask][:, 3:] < 0).all()
    assert (std.grad[~mask] == 0).all()


def test_similarity_and_layer_distances(batch):
    clean, noisy, mask = batch
    distances = hidden_distances(noisy, clean, mask)
    cosine = torch.nn.functional.cosine_similarity(rows(noisy, mask), rows(clean, mask), dim=-1)
    value = components.input_embedding_similarity(distances.cosine_similarity, mask)
    assert value.item() == pytest.approx(cosine.mean().item(), rel=1e-5)
    value = components.distillation_layer_cosine_distance(distances.cosine_distance, mask)
    assert value.item() == pytest.approx((1 - cosine).mean().item(), rel=1e-5)
    ratio = (rows(noisy, mask) - rows(clean, mask)).norm(dim=-1) / rows(clean, mask).norm(dim=-1)
    value = components.distillation_layer_l2_distance(distances.normalized_l2, mask)
    assert value.item() == pytest.approx(ratio.mean().item(), rel=1e-5)


def test_catalyst(batch):
    clean, noisy, mask = batch
    l2 = hidden_distances(noisy, clean, mask).l2
    squared = (rows(noisy, mask) - rows(clean, mask)).square().sum(-1)
    expected = ((squared + (1e-2 * 1.5) ** 2) / 1.5**2) ** (-2.0 / 2)
    value = components.inverse_l2_power_law_catalyst(l2, 1.5, 2.0, mask)
    assert value.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    at_zero = components.inverse_l2_power_law_catalyst(torch.zeros(1), 1.5, 2.0, torch.ones(1, dtype=torch.bool))
    assert at_zero.item() == pytest.approx(100.0**2)


def test_components_of_half_precision_values_are_float32():
    std, mask = torch.full((2, 3), 0.3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bool)
    assert components.std_log_ratio(std, 3.0, mask).dtype == torch.float32
    assert components.masked_mean(std[:, 0], mask).dtype == torch.float32
    assert components.masked_mean(std[:, 0].double(), mask).dtype == torch.float64


def test_absolute_similarity(batch):
    clean, noisy, mask = batch
    cosine = torch.nn.functional.cosine_similarity(rows(noisy, mask), rows(clean, mask), dim=-1)
    assert (cosine < 0).any()
    value = components.absolute_cosine_similarity(hidden_distances(noisy, clean, mask).cosine_similarity, mask)
    assert value.item() == pytest.approx(cosine.abs().mean().item(), rel=1e-5)


def test_median_norm_penalty(batch):
    shifted, _, mask = batch
    shifted[~mask] = torch.nan
    shifted[0, 0], mask[0, 0] = 0.0, True  # where a norm has no gradient
    shifted.requires_grad_()
    value = components.median_norm_penalty(shifted, 2.5, mask)
    norms = rows(shifted, mask).norm(dim=-1)
    assert value.item() == pytest.approx((norms - 2.5).abs().mean().item(), rel=1e-6)
    value.backward()
    directions = (norms - 2.5).sign()[:, None] * rows(shifted, mask) / norms.clamp(min=1e-30)[:, None] / mask.sum()
    torch.testing.assert_close(shifted.grad[mask].double(), directions.detach(), rtol=1e-5, atol=1e-8)
    assert (shifted.grad[~mask] == 0).all()


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("suppresses", [True, False])
@pytest.mark.parametrize("size", [2, 4, 5])
def test_mutual_information(size, suppresses, combine):
    generator = torch.Generator().manual_seed(10 + size)
    mean = torch.randn(size, 6, 8, generator=generator)
    std = torch.rand(size, 6, 8, generator=generator) + 0.2
    attended = torch.arange(6) < torch.randint(3, 7, (size, 1), generator=generator)
    selected = attended & (torch.rand(size, 6, generator=generator) > 0.4)
    suppressed = torch.rand(size, 6, 8, generator=generator) > 0.7 if suppresses else None
    kept = torch.ones_like(std, dtype=torch.bool) if suppressed is None else ~suppressed
    mean[~attended], std[~attended] = torch.nan, 0.0  # padding never counts
    mean.requires_grad_()
    std.requires_grad_()
    value = components.mutual_information(mean, std, selected, attended, suppressed, combine)
    half, terms = size // 2, []
    for i in range(half):
        for j in range(half, size):
            used = (selected[i] & (selected if combine else attended)[j])[:, None] & kept[i] & kept[j]
            if used.any():
                first, second = ((mean[k][used].double(), std[k][used].double()) for k in (i, j))
                normals = [torch.distributions.Normal(*one) for one in (first, second)]
                terms.append(torch.distributions.kl_divergence(*normals).mean())
    expected = torch.stack(terms).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    found, wanted = (torch.autograd.grad(one, (mean, std), retain_graph=True) for one in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_mutual_information_of_equal_rows_and_of_no_pairs_is_zero():
    mean, mask = torch.randn(1, 3, 4).expand(4, 3, 4), torch.ones(4, 3, dtype=torch.bool)
    std = torch.full((4, 3, 4), 0.5, requires_grad=True)
    assert components.mutual_information(mean, std, mask, mask).item() == pytest.approx(0.0, abs=1e-7)
    apart = mask.clone()
    apart[:2] = False
    value = components.mutual_information(torch.randn(4, 3, 4), std, apart, mask)
    value.backward()
    assert value.item() == 0.0
    assert (std.grad == 0).all()


def test_distillation_cross_entropy(batch):
    noisy, clean, mask = batch
    q, log_p = rows(clean, mask).softmax(-1), rows(noisy, mask).log_softmax(-1)
    values = divergences(noisy, clean, "cross_entropy", mask=mask)["cross_entropy"]
    assert components.distillation_cross_entropy(values, mask).item() == pytest.approx(
        -(q * log_p).sum(-1).mean().item(), rel=1e-6
    )


@pytest.mark.parametrize("component", [components.distillation_protection_l2, components.clean_embedding_performance])
def test_closeness_is_one_where_equal_and_falls_to_zero(component, batch):
    outputs, clean, mask = batch
    ratio = (rows(outputs, mask) - rows(clean, mask)).norm(dim=-1) / rows(clean, mask).norm(dim=-1)
    value = component(hidden_distances(outputs, clean, mask).normalized_l2, mask)
    assert value.item() == pytest.approx((2 - 2 / (1 + (-ratio).exp())).mean().item(), rel=1e-6)
    everything = torch.ones(1, dtype=torch.bool)
    assert component(torch.zeros(1), everything).item() == 1.0
    # No digits are lost far away.
    assert component(torch.full((1,), 40.0), everything).item() == pytest.approx(2 * math.exp(-40), rel=1e-6)
