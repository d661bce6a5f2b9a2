"""Estimates for candidates in a text's places, in one pass, against a pass over each candidate's own text."""

import pytest
import torch

from sgfast.noise_layer.candidate_estimates import candidate_estimates
from tests.noise_layer.test_next_token import layer_of, window_of
from tests.tiny_models import FAMILIES, WIDTH


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_in_one_pass_are_candidates_one_by_one(family, window):
    if window and not window_of(family):
        pytest.skip("the family has no sliding window")
    layer = layer_of(family, **(window_of(family) if window else {}))
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(7, WIDTH, generator=generator)
    places = torch.tensor([0, 3, 6])
    candidates = torch.randn(3, 4, WIDTH, generator=generator)
    mean, std = candidate_estimates(layer, text, places, candidates)
    for which, place in enumerate(places):
        for number in range(4):
            read = torch.cat([text[:place], candidates[which, number][None]])
            own_mean, own_std = layer.estimate(read[None])
            torch.testing.assert_close(mean[which, number], own_mean[0, -1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(std[which, number], own_std[0, -1], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_candidates_own_texts():
    layer = layer_of("llama").double()
    text = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(1, 2, WIDTH, dtype=torch.float64)
    weight = torch.randn(2, WIDTH, dtype=torch.float64)
    inputs = [text, *layer.parameters()]
    mean, std = candidate_estimates(layer, text, torch.tensor([4]), candidates)
    found = torch.autograd.grad((weight * (mean[0] + std[0].log())).sum(), inputs)
    total = 0.0
    for number in range(2):
        own_mean, own_std = layer.estimate(torch.cat([text[:4], candidates[0, number][None]])[None])
        total = total + (weight[number] * (own_mean[0, -1] + own_std[0, -1].log())).sum()
    for one, other in zip(found, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
