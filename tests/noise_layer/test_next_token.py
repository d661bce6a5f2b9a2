"""Estimates for candidates, step by step with keys and values, against the layer's own pass over the whole sequence."""

import pytest
import torch

from sgfast.noise_layer import CloakNoiseLayer, TransformerCloak
from sgfast.noise_layer.next_token import check_causal, evaluating, next_token_estimates
from tests.tiny_models import FAMILIES, WIDTH, tiny_causal_lm

LENGTH = 8


def layer_of(family, **overrides):
    """A layer of two-layer estimators with random weights, some features suppressed."""
    model, body, _ = tiny_causal_lm(family, **overrides)
    layer = TransformerCloak(
        model.config, body, mean_num_hidden_layers=2, std_num_hidden_layers=2, percent_to_mask=0.25
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return layer


def window_of(family):
    return {
        "mistral": {"sliding_window": 3},
        "phi3": {"sliding_window": 3},
        "gemma2": {"sliding_window": 3},
        "qwen2": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
        "qwen3": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
    }.get(family, {})


@torch.no_grad()
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_keys_and_values_is_the_whole_pass(family, window):
    if window and not window_of(family):
        window = False  # the family has none: the plain case again
    layer = layer_of(family, **(window_of(family) if window else {}))
    sequences = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    others = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))
    mean, std = layer.estimate(sequences)
    suppressed = layer.suppressed_features(std)
    estimates = next_token_estimates(layer, LENGTH, WIDTH)
    # Three hypotheses that begin alike and are swapped at every step.
    order = torch.arange(3)
    sequences[:, 0] = sequences[0, 0]
    mean, std = layer.estimate(sequences)
    suppressed = layer.suppressed_features(std)
    for place in range(LENGTH):
        candidates = torch.cat([sequences[:, place], others])
        found = estimates.estimate(candidates)
        for row, sequence in enumerate(order[: estimates.hypotheses]):
            own = sequence  # the candidate of the same number
            torch.testing.assert_close(found.mean[row, own], mean[sequence, place], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.std[row, own], std[sequence, place], rtol=1e-4, atol=1e-5)
            assert torch.equal(found.suppressed[row, own], suppressed[sequence, place])
        parents = torch.tensor([0, 0, 0]) if place == 0 else torch.tensor([2, 0, 1])
        order = order if place == 0 else order[parents]
        estimates.extend(parents, sequences[order, place])


@torch.no_grad()
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_beginning_in_one_pass_is_the_same(family, window):
    layer = layer_of(family, **(window_of(family) if window else {}))
    sequence = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    mean, std = layer.estimate(sequence[None])
    estimates = next_token_estimates(layer, LENGTH, WIDTH)
    estimates.begin(sequence[:5])
    for place in range(5, LENGTH):
        found = estimates.estimate(sequence[place][None])
        torch.testing.assert_close(found.mean[0, 0], mean[0, place], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.std[0, 0], std[0, place], rtol=1e-4, atol=1e-5)
        estimates.extend(torch.zeros(1, dtype=torch.int64), sequence[place][None])


@torch.no_grad()
def test_a_layer_without_cache_gives_its_own_estimates():
    class Causal(CloakNoiseLayer):
        """A shift by the sum of the tokens up to here."""

        def estimate(self, input):
            mean, std = super().estimate(input)
            return mean + input.cumsum(1), std

    layer = Causal(input_shape=(1, LENGTH, WIDTH)).eval()
    sequence = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    expected = layer.estimate(sequence[None])[0][0]
    check_causal(layer, sequence)
    estimates = next_token_estimates(layer, LENGTH, WIDTH)
    estimates.begin(sequence[:2])
    for place in range(2, LENGTH):
        found = estimates.estimate(sequence[place][None].expand(3, -1))
        torch.testing.assert_close(found.mean[0], expected[place].expand(3, -1))
        assert found.suppressed is None
        estimates.extend(torch.zeros(1, dtype=torch.int64), sequence[place][None])


def test_a_layer_that_looks_ahead_is_refused():
    class LooksAhead(CloakNoiseLayer):
        def estimate(self, input):
            mean, std = super().estimate(input)
            return mean + input.flip(1), std

    layer = LooksAhead(input_shape=(1, LENGTH, WIDTH))
    with pytest.raises(ValueError, match="must be causal: LooksAhead"):
        check_causal(layer, torch.randn(LENGTH, WIDTH))


def test_evaluating_restores_every_mode():
    layer = layer_of("llama")
    layer.train()
    layer.mean_estimator.eval()
    before = [module.training for module in layer.modules()]
    with evaluating(layer):
        assert not any(module.training for module in layer.modules())
    assert [module.training for module in layer.modules()] == before
