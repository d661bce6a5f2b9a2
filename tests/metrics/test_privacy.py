"""Attacks by rank against brute-force ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgfast.metrics import (
    max_rank_failure_rate,
    mean_reconstruction_rank,
    nearest_neighbor_failure_rate,
    repeated_query_attack,
    token_transformation_rate,
)
from sgfast.metrics.privacy import token_ranks
from sgfast.ops import nearest_embeddings
from tests.live_bytes import LiveBytes

V = 200


@pytest.fixture
def attacked():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(V, 12, generator=generator)
    input_ids = torch.randint(0, V, (4, 9), generator=generator)
    transformed = table[input_ids] + 1.5 * torch.randn(4, 9, 12, generator=generator)
    return transformed, table, input_ids, torch.rand(4, 9, generator=generator) > 0.3


def brute_force_ranks(transformed, table, input_ids, metric):
    """Ranks by sorting all distances, equal ones by index."""
    transformed, table = transformed.double(), table.double()
    if metric == "l2":
        distances = (transformed[..., None, :] - table).norm(dim=-1)
    else:
        distances = -torch.nn.functional.cosine_similarity(transformed[..., None, :], table, dim=-1)
    order = distances.sort(dim=-1, stable=True).indices
    return (order == input_ids[..., None]).long().argmax(-1)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_against_brute_force(attacked, metric):
    transformed, table, input_ids, mask = attacked
    ranks = brute_force_ranks(transformed, table, input_ids, metric)[mask].double()
    for beta in (1, 5):
        expected = (ranks >= beta).double().mean().item()
        assert 0.1 < expected < 0.9
        rate = nearest_neighbor_failure_rate(*attacked, metric=metric, beta=beta)
        assert rate.item() == pytest.approx(expected, abs=1e-6)
    for k in (1, 20, 150):
        expected = (ranks >= k).double().mean().item()
        assert token_transformation_rate(*attacked, metric=metric, k=k).item() == pytest.approx(expected, abs=1e-6)
        expected = ((ranks >= k) & (ranks < V - k)).double().mean().item()
        rate = token_transformation_rate(*attacked, metric=metric, k=k, symmetric=True)
        assert rate.item() == pytest.approx(expected, abs=1e-6)
    expected = ranks.mean().item()
    assert mean_reconstruction_rank(*attacked, metric=metric).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("r", [1, 3])
def test_the_max_rank_attack_takes_the_rth_farthest(attacked, metric, r):
    transformed, table, input_ids, mask = attacked
    guesses = nearest_embeddings(transformed, table, r, metric=metric, farthest=True)[1][..., -1]
    input_ids[:, ::2] = guesses[:, ::2]  # some tokens sit there
    expected = (guesses != input_ids)[mask].double().mean().item()
    assert 0.3 < expected < 0.7
    rate = max_rank_failure_rate(transformed, table, input_ids, mask, metric=metric, r=r)
    assert rate.item() == pytest.approx(expected, abs=1e-6)


def test_equal_rows_go_by_index():
    table = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    transformed, input_ids = torch.ones(3, 1), torch.tensor([1, 2, 3])
    assert token_ranks(transformed, table, input_ids).tolist() == [0, 1, 2]
    assert nearest_neighbor_failure_rate(transformed, table, input_ids).item() == pytest.approx(2 / 3)
    assert max_rank_failure_rate(transformed, table, input_ids, r=2).item() == pytest.approx(2 / 3)


@settings(max_examples=25)
@given(st.data())
def test_chunks_leading_dimensions_and_unselected_rows_change_nothing(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    table = torch.randn(37, 5, generator=generator).to(dtype)
    input_ids = torch.randint(0, 37, shape, generator=generator)
    transformed = (table[input_ids] + torch.randn(*shape, 5, generator=generator)).to(dtype)
    mask = torch.rand(shape, generator=generator) > 0.4
    expected = torch.where(mask, brute_force_ranks(transformed, table, input_ids, "l2"), -1)
    transformed[~mask], input_ids[~mask] = torch.nan, -100
    max_chunk_bytes = data.draw(st.sampled_from([1, 300, 5000, None]))
    ranks = token_ranks(transformed, table, input_ids, mask, max_chunk_bytes=max_chunk_bytes)
    assert torch.equal(ranks, expected)


def test_selected_rows_are_copied_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    table, input_ids = torch.randn(50, 64, generator=generator), torch.randint(0, 50, (3000,), generator=generator)
    transformed, mask = table[input_ids], torch.ones(3000, dtype=torch.bool)
    with LiveBytes() as memory:
        token_ranks(transformed, table, input_ids, mask, max_chunk_bytes=2**17)
    # The search itself keeps to its own share. Ranks and indices of the selected tokens come on top: 16 bytes each.
    assert 2**13 < memory.peak - 16 * 3000 < 2**16


def test_untransformed_embeddings_are_always_read_and_nothing_selected_is_nan(attacked):
    _, table, input_ids, mask = attacked
    assert nearest_neighbor_failure_rate(table[input_ids], table, input_ids).item() == 0.0
    assert mean_reconstruction_rank(table[input_ids], table, input_ids).item() == 0.0
    nothing = table[input_ids], table, input_ids, torch.zeros_like(mask)
    assert nearest_neighbor_failure_rate(*nothing).isnan()
    assert max_rank_failure_rate(*nothing).isnan()
    assert token_transformation_rate(*nothing, k=2).isnan()
    assert mean_reconstruction_rank(*nothing).isnan()
    draws = table[input_ids][None]
    assert repeated_query_attack(draws, table, input_ids, torch.zeros_like(mask))[1].isnan()


def test_repeated_queries_average_noise_out_but_not_the_mean_shift(attacked):
    _, table, input_ids, mask = attacked
    generator = torch.Generator().manual_seed(1)
    noise = 1.5 * torch.randn(100, 4, 9, 12, generator=generator)
    rates = repeated_query_attack(table[input_ids] + noise, table, input_ids, mask)
    assert list(rates) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert rates[1] > 0.5
    assert rates[100] == 0
    for draws in (1, 8, 100):
        mean = table[input_ids] + noise[:draws].double().mean(0).float()
        assert rates[draws] == nearest_neighbor_failure_rate(mean, table, input_ids, mask)
    shift = 3 * torch.randn(12, generator=generator)
    shifted = (table[input_ids] + shift + draw for draw in noise)  # one at a time
    assert repeated_query_attack(shifted, table, input_ids, mask)[100] > 0.8


def test_errors(attacked):
    transformed, table, input_ids, mask = attacked
    with pytest.raises(ValueError, match="beta must be at least 1; got 0"):
        nearest_neighbor_failure_rate(transformed, table, input_ids, beta=0)
    with pytest.raises(ValueError, match="r must be at most 200, the rows of table; got 201"):
        max_rank_failure_rate(transformed, table, input_ids, r=201)
    with pytest.raises(TypeError, match="k must be an int; got float"):
        token_transformation_rate(transformed, table, input_ids, k=1.0)
    with pytest.raises(ValueError, match=r"noise_mask must have the shape of input_ids, \(4, 9\); got \(4, 8\)"):
        nearest_neighbor_failure_rate(transformed, table, input_ids, mask[:, :8])
    with pytest.raises(ValueError, match=r"input_ids must have shape \(4, 9\)"):
        mean_reconstruction_rank(transformed, table, input_ids[:, :8])
    with pytest.raises(TypeError, match="input_ids must hold integers"):
        mean_reconstruction_rank(transformed, table, input_ids.float())
    with pytest.raises(ValueError, match="targets must lie in"):
        mean_reconstruction_rank(transformed, table, input_ids + V)
    with pytest.raises(ValueError, match="at least one draw"):
        repeated_query_attack(transformed[:0], table, input_ids)
