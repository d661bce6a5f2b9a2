"""What every operation claims not to depend on: constants added to logits, scales of vectors, places of Gaussians.

Each is compared with the same operation in float64 on the very inputs that float32 was given, so that what rounding the
inputs costs is on both sides.
"""

import pytest
import torch
from torch import Tensor

from sgfast.ops import (
    divergences,
    embedding_ranks,
    hidden_distances,
    nearest_embeddings,
    pairwise_gaussian_kl,
    top_k_support,
)
from sgfast.ops.divergence.kinds import KINDS
from tests.implementations import DEVICE, each_implementation

SHIFTS = [(0.0, 0.0), (1e4, 0.0), (0.0, -1e4), (300.0, 310.0), (-1e4, 1e4), (1e4, 1e4)]
SCALES = [1e-12, 1e-3, 1.0, 1e3, 1e12]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("shifts", SHIFTS)
def test_labels_and_supports_of_shifted_logits(shifts):
    """The kinds are in test_divergence_extremes; hard labels and the choice of the top k shift alike."""
    noisy, clean = (normal(4, 61, seed=i) * 3 + shift for i, shift in enumerate(shifts))
    labels = torch.tensor([3, 60, 0, 17], device=DEVICE)
    values, exact = (
        divergences(a, b, (), labels=labels, impl="torch")["label_cross_entropy"]
        for a, b in ((noisy, clean), (noisy.double(), clean.double()))
    )
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=5e-7)
    for ours, wide in zip(
        top_k_support(noisy, clean, 5), top_k_support(noisy.double(), clean.double(), 5), strict=True
    ):
        assert torch.equal(ours, wide)


@pytest.mark.parametrize("temperature", [0.1, 10.0])
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_a_factor_on_logits_and_temperature_is_no_difference(factor, temperature):
    """Powers of two change no digit: the values are equal to the last bit."""
    noisy, clean = normal(3, 40, seed=2), normal(3, 40, seed=3)
    expected = divergences(noisy, clean, KINDS, temperature=temperature, impl="torch")
    actual = divergences(noisy * factor, clean * factor, KINDS, temperature=temperature * factor, impl="torch")
    for kind in KINDS:
        torch.testing.assert_close(actual[kind], expected[kind], rtol=1e-6, atol=1e-8)


@each_implementation
@pytest.mark.parametrize("noisy_scale", SCALES)
@pytest.mark.parametrize("clean_scale", SCALES)
def test_scales_of_hidden_states(impl, noisy_scale, clean_scale):
    """Cosine does not depend on either scale, the normalized distance on the common one."""
    noisy, clean = normal(5, 64, seed=4) * noisy_scale, normal(5, 64, seed=5) * clean_scale
    found = hidden_distances(noisy, clean, eps=1e-30, impl=impl)
    exact = hidden_distances(noisy.double(), clean.double(), eps=1e-30, impl="torch")
    for ours, wide in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), wide, rtol=2e-5, atol=5e-7)
    alone = hidden_distances(normal(5, 64, seed=4), normal(5, 64, seed=5), impl=impl)
    torch.testing.assert_close(found.cosine_distance, alone.cosine_distance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 1e3, -1e4])
def test_places_and_scales_of_gaussians(shift, scale):
    """The divergence of two Gaussians depends neither on where they lie nor on the unit."""
    means = [(normal(3, 4, 8, seed=i) + shift) * scale for i in (6, 7)]
    stds = [(normal(3, 4, 8, seed=i).abs() + 0.1) * scale for i in (8, 9)]
    arguments = [value for pair in zip(means, stds, strict=True) for value in pair]
    kl, count = pairwise_gaussian_kl(*arguments)
    exact, _ = pairwise_gaussian_kl(*(one.double() for one in arguments))
    torch.testing.assert_close((kl / count).double(), exact / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_scales_of_embeddings(scale):
    """Which row is nearest does not depend on the unit; by cosine it does not depend on either side's scale."""
    queries, table, targets = normal(6, 16, seed=10), normal(50, 16, seed=11), torch.arange(6, device=DEVICE) * 8
    for metric in ("l2", "cosine"):
        other = scale if metric == "l2" else 1.0
        expected = nearest_embeddings(queries, table, 4, metric=metric)
        distances, indices = nearest_embeddings(queries * scale, table * other, 4, metric=metric)
        assert torch.equal(indices, expected[1])
        torch.testing.assert_close(distances / other, expected[0], rtol=1e-5, atol=1e-6)
        ranks = embedding_ranks(queries * scale, table * other, targets, metric=metric)
        assert torch.equal(ranks, embedding_ranks(queries, table, targets, metric=metric))
