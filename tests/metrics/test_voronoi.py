"""Voronoi distances against brute force and numpy.percentile."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sgfast.metrics import compute_percentile_voronoi_l2_distance, privacy, voronoi
from sgfast.metrics.voronoi import percentile_of, voronoi_l2_distances

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def embeddings(vocabulary: int = 300, width: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    return torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)


def oracle(weight: Tensor, half: bool = True) -> np.ndarray:
    """Sorted distances, in float64, of the distinct rows that are not zero."""
    table = np.unique(weight.double().numpy() + 0.0, axis=0)
    table = table[(table != 0).any(1)]
    distances = np.sqrt(((table[:, None] - table) ** 2).sum(-1))
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances.min(1)) / (2 if half else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [True, False])
def test_equals_brute_force(dtype, half):
    weight = embeddings(dtype=dtype)
    distances = voronoi_l2_distances(weight, half)
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(np.sort(distances.numpy()), oracle(weight, half), rtol=2e-7)


@pytest.mark.parametrize("percentile", [0, 5, 33.3, 50, 99.9, 100])
@pytest.mark.parametrize("vocabulary", [2, 7, 300])
def test_percentile_equals_numpys(percentile, vocabulary):
    weight = embeddings(vocabulary)
    for half in (True, False):
        actual = compute_percentile_voronoi_l2_distance(weight, percentile, half)
        assert isinstance(actual, float)
        assert actual == pytest.approx(np.percentile(oracle(weight, half), percentile), rel=2e-7)
    values = torch.rand(1000, dtype=torch.float64)
    assert percentile_of(values, percentile) == pytest.approx(np.percentile(values.numpy(), percentile), rel=1e-14)


def test_defaults_are_half_and_the_fifth_percentile():
    weight = embeddings()
    assert compute_percentile_voronoi_l2_distance(weight) == pytest.approx(np.percentile(oracle(weight), 5), rel=2e-7)
    assert privacy.compute_percentile_voronoi_l2_distance is compute_percentile_voronoi_l2_distance


def test_equal_rows_and_zeros_are_dropped():
    weight = embeddings()
    expected = voronoi_l2_distances(weight).sort().values
    zeros = torch.zeros(20, 12)
    zeros[::2] = -0.0
    padded = torch.cat([zeros, weight, weight[:40], weight[:1].expand(50, -1), zeros])
    assert torch.equal(voronoi_l2_distances(padded).sort().values, expected)
    # A zero that equals a negative zero in every other feature too.
    one, other = torch.tensor([[0.0, 1.0]]), torch.tensor([[-0.0, 1.0]])
    distances = voronoi_l2_distances(torch.cat([one, other, torch.tensor([[0.0, 4.0]])]))
    assert distances.tolist() == [1.5, 1.5]


def test_near_duplicates_far_from_the_origin_keep_their_digits():
    weight = 1000 + 1e-3 * embeddings(dtype=torch.float64)
    np.testing.assert_allclose(np.sort(voronoi_l2_distances(weight).numpy()), oracle(weight), rtol=1e-9)
    rows = torch.ones(30, 30) + torch.eye(30) * 2**-23
    assert torch.allclose(voronoi_l2_distances(rows, half=False), torch.tensor(math.sqrt(2) * 2**-23), rtol=1e-6)


def test_blocks_and_chunks_change_nothing(monkeypatch):
    weight = embeddings()
    expected = voronoi_l2_distances(weight)
    monkeypatch.setattr(voronoi, "_QUERIES", 128)
    seen = []
    assert torch.equal(
        voronoi_l2_distances(weight, max_chunk_bytes=20_000, on_progress=lambda *step: seen.append(step)), expected
    )
    assert seen == [(128, 300), (256, 300), (300, 300)]


def test_parameters_are_taken_and_left_alone():
    weight = torch.nn.Parameter(embeddings(50))
    copy = weight.detach().clone()
    assert not voronoi_l2_distances(weight).requires_grad
    assert torch.equal(weight, copy)


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, r"weight must have shape \(V, D\), both at least 1; got \(3,\)"),
        (torch.ones(0, 3), {}, ValueError, "weight must have shape"),
        (torch.ones(4, 3).long(), {}, TypeError, "weight must be float32"),
        ([1.0], {}, TypeError, "weight must be a torch.Tensor"),
        (torch.ones(4, 3), {}, ValueError, "at least two distinct rows that are not zero; it has 1"),
        (torch.zeros(4, 3), {}, ValueError, "at least two distinct rows that are not zero; it has 0"),
        (torch.tensor([[1.0], [math.nan]]), {}, ValueError, "NaN or infinity"),
        (torch.tensor([[1.0], [-math.inf]]), {}, ValueError, "NaN or infinity"),
        (torch.eye(3), {"percentile": 101}, ValueError, r"percentile must lie in \[0, 100\]; got 101"),
        (torch.eye(3), {"percentile": math.nan}, ValueError, "percentile must lie in"),
    ],
)
def test_errors(weight, options, error, message):
    with pytest.raises(error, match=message):
        compute_percentile_voronoi_l2_distance(weight, **options)
