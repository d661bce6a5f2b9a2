"""The nearest-neighbour attack against a brute-force one."""

import pytest
import torch

from sgfast.metrics import nearest_neighbor_failure_rate


@pytest.fixture
def attacked():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(200, 12, generator=generator)
    input_ids = torch.randint(0, 200, (4, 9), generator=generator)
    transformed = table[input_ids] + 1.5 * torch.randn(4, 9, 12, generator=generator)
    return transformed, table, input_ids, torch.rand(4, 9, generator=generator) > 0.3


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("beta", [1, 5])
def test_against_brute_force(attacked, metric, beta):
    transformed, table, input_ids, mask = (tensor.double() for tensor in attacked)
    if metric == "l2":
        distances = (transformed[:, :, None] - table).norm(dim=-1)
    else:
        distances = -torch.nn.functional.cosine_similarity(transformed[:, :, None], table, dim=-1)
    own = distances.gather(-1, input_ids.long()[..., None])
    failed = (distances < own).sum(-1) >= beta
    expected = failed[mask != 0].double().mean().item()
    assert 0.1 < expected < 0.9
    rate = nearest_neighbor_failure_rate(*attacked, metric=metric, beta=beta)
    assert rate.item() == pytest.approx(expected, abs=1e-6)


def test_untransformed_embeddings_are_always_read_and_nothing_selected_is_nan(attacked):
    _, table, input_ids, mask = attacked
    assert nearest_neighbor_failure_rate(table[input_ids], table, input_ids).item() == 0.0
    assert nearest_neighbor_failure_rate(table[input_ids], table, input_ids, torch.zeros_like(mask)).isnan()


def test_errors(attacked):
    transformed, table, input_ids, mask = attacked
    with pytest.raises(ValueError, match="beta must be at least 1; got 0"):
        nearest_neighbor_failure_rate(transformed, table, input_ids, beta=0)
    with pytest.raises(ValueError, match=r"noise_mask must have the shape of input_ids, \(4, 9\); got \(4, 8\)"):
        nearest_neighbor_failure_rate(transformed, table, input_ids, mask[:, :8])
