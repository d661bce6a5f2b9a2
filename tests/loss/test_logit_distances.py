"""Distances between logits from hidden states against the logits themselves, in float64."""

import pytest
import torch

from sgfast.loss.components.logit_distances import logit_distances
from sgfast.ops.hidden import hidden_distances
from sgfast.sides import LinearLogits

V, D = 60, 12


def sides(*, bias=False, dtype=torch.float32, gap=1.0, scale=1.0, softcap=None, rank=D):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, rank, generator=generator) @ torch.randn(rank, D, generator=generator)).to(dtype)
    offset = torch.randn(V, generator=generator).to(dtype) if bias else None
    clean = torch.randn(3, 5, D, generator=generator)
    noisy = clean + gap * torch.randn(3, 5, D, generator=generator)
    options = {"scale": scale, "softcap": softcap}
    return [LinearLogits(one.to(dtype).requires_grad_(), weight, offset, **options) for one in (noisy, clean)]


def logits(side):
    hidden, weight = side.hidden.detach().double().requires_grad_(), side.weight.double()
    made = side.scale * (hidden @ weight.T + (0 if side.bias is None else side.bias.double()))
    return hidden, made if side.softcap is None else side.softcap * (made / side.softcap).tanh()


@pytest.mark.parametrize("gap", [1.0, 1e-4])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"scale": 0.25}, {"rank": 5}, {"softcap": 3.0}, {"bias": True, "dtype": torch.bfloat16}],
)
def test_against_logits(options, gap):
    noisy, clean = sides(gap=gap, **options)
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[0, 2:] = False
    found = logit_distances(noisy, clean, counted)
    leaves, made = zip(*(logits(side) for side in (noisy, clean)), strict=True)
    expected = hidden_distances(*made, counted)
    for name in ("cosine_distance", "l2", "normalized_l2"):
        one, other = getattr(found, name), getattr(expected, name)
        # With a soft cap the logits are made, in float32.
        tolerance = 1e-5 if noisy.softcap is None else 2e-3
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=1e-9, msg=name)
    sum(part.sum() for part in found).backward()
    sum(part.sum() for part in expected).backward()
    for side, leaf in zip((noisy, clean), leaves, strict=True):
        size = leaf.grad.abs().max().item()
        tolerance = 1e-2 if side.hidden.dtype == torch.bfloat16 else 1e-5 if side.softcap is None else 2e-3
        torch.testing.assert_close(side.hidden.grad.double(), leaf.grad, rtol=0, atol=tolerance * size)


def test_a_changed_head_is_read_again():
    noisy, clean = sides()
    counted = torch.ones(3, 5, dtype=torch.bool)
    before = logit_distances(noisy, clean, counted).l2
    noisy.weight.mul_(2)
    torch.testing.assert_close(logit_distances(noisy, clean, counted).l2, 2 * before)


def test_other_pairs_make_their_logits():
    noisy, clean = sides()
    counted = torch.ones(3, 5, dtype=torch.bool)
    other = LinearLogits(clean.hidden, clean.weight.clone().requires_grad_())
    expected = logit_distances(noisy, clean, counted)
    for one, two in ((noisy, other), (noisy.hidden @ noisy.weight.T, clean)):
        found = logit_distances(one, two, counted)
        torch.testing.assert_close(found.l2, expected.l2, rtol=1e-4, atol=1e-5)
    logit_distances(noisy, other, counted).l2.sum().backward()
    assert other.weight.grad.abs().max() > 0
