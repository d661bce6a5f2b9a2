"""The attacker who knows the transform, as a component: closed cases, a float64 loop, gradients, masks and refusals."""

import math

import pytest
import torch
from torch.distributions import Normal

from sgfast.loss import components
from sgfast.loss.components import known_transform
from sgfast.loss.components.known_transform import known_transform_log_odds
from sgfast.model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import CloakNoiseLayer
from tests.loss.factory_cases import CASES
from tests.loss.rewrites import Rewrite, learning_parameters, relative_error

ALONE = {"known_transform_attack_loss_weight": 0.5}
NAMES = [name for name in CASES if name != "jigsaw"]


@pytest.fixture(autouse=True)
def _effort(monkeypatch):
    """With one candidate, the nearest, and all tokens attacked, nothing is random."""
    set_effort(monkeypatch, tokens=100, candidates=1)


def set_effort(monkeypatch, tokens, candidates):
    monkeypatch.setattr(known_transform, "TOKENS", tokens)
    monkeypatch.setattr(known_transform, "CANDIDATES", candidates)


def run(name, noisy_model, batch, **changed):
    """Loss, components and gradients of a factory with the attack as the only component besides utility."""
    factory, arguments = CASES[name]
    others = {
        argument: 0.0 for argument in arguments if argument.endswith("_weight") and "distillation" not in argument
    }
    loss_function, get_losses, get_hyperparameters = factory(noisy_model, **(arguments | others | ALONE | changed))
    noisy_model.train()(**batch)
    loss = loss_function(batch["loss_mask"])
    loss.backward()
    gradients = {parameter: p.grad for parameter, p in learning_parameters(noisy_model)}
    return loss, get_losses(), gradients, get_hyperparameters()


def test_equal_candidates_say_nothing():
    location, std = torch.randn(1, 1, 6).expand(3, 5, 6), torch.full((3, 5, 6), 0.5)
    odds = known_transform_log_odds(torch.randn(3, 6), location, std)
    # The attacker's posterior of the true token is then one half among two candidates, one fifth among five.
    torch.testing.assert_close(odds, torch.zeros(3), rtol=0, atol=1e-5)


def test_the_posterior_of_two_candidates_is_the_logistic_of_the_log_odds():
    location = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]])
    for observed in (-1.0, 0.0, 1.5, 2.0, 90.0):
        odds = known_transform_log_odds(torch.tensor([[observed, 7.0]]), location, torch.full((1, 2, 2), 2.0))
        # log N(x; 0, 4) − log N(x; 3, 4) = (9 − 6 x) / 8
        assert odds.item() == pytest.approx((9 - 6 * observed) / 8, rel=1e-6, abs=1e-6)


def test_log_odds_against_a_loop_in_float64():
    observed, location = torch.randn(4, 6), torch.randn(4, 9, 6)
    std = torch.rand(4, 9, 6) + 0.2
    found = known_transform_log_odds(observed, location, std)
    for row in range(4):
        likelihood = [
            sum(
                Normal(location[row, c, f].double(), std[row, c, f].double()).log_prob(observed[row, f].double())
                for f in range(6)
            )
            for c in range(9)
        ]
        others = sum(value.exp() for value in likelihood[1:]) / 8
        assert found[row].item() == pytest.approx((likelihood[0] - others.log()).item(), rel=1e-5, abs=1e-5)
    doubles = [value.double().requires_grad_() for value in (observed, location, std)]
    assert torch.autograd.gradcheck(known_transform_log_odds, doubles)


def test_odds_so_long_that_their_posterior_is_one_keep_their_gradient():
    location = torch.tensor([[[0.0], [60.0]]], requires_grad=True)
    odds = known_transform_log_odds(torch.zeros(1, 1), location, torch.ones(1, 2, 1))
    assert odds.item() == 1800.0
    odds.sum().backward()
    assert location.grad.flatten().tolist() == [0.0, 60.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_component_against_a_loop_in_float64(name, make_noisy_model, batch):
    noisy_model = make_noisy_model()
    loss, losses, gradients, hyperparameters = run(name, noisy_model, batch)
    assert ALONE.items() <= hyperparameters.items()
    rewrite = Rewrite(noisy_model, batch, 2 if "alpha" in hyperparameters else None)
    layer = rewrite.model.noise_layer
    table = rewrite.model.base_model.get_input_embeddings().weight.detach()
    odds = []
    for row, place in rewrite.selected.nonzero().tolist():
        token = int(batch["input_ids"][row, place])
        distances = (table - table[token]).norm(dim=-1)
        distances[token] = math.inf
        other = table[distances.argmin()]
        before = rewrite.x[row, :place][rewrite.attended[row, :place]]
        mean, std = layer.estimate(torch.cat([before, other[None]])[None])
        observed = rewrite.transformed[row, place]
        true = Normal(table[token] + rewrite.mean[row, place], rewrite.std[row, place])
        false = Normal(other + mean[0, -1], std[0, -1])
        odds.append((true.log_prob(observed) - false.log_prob(observed)).sum())
    expected = torch.stack(odds).mean()
    assert losses["known_transform_attack"].item() == pytest.approx(expected.item(), rel=1e-5)
    alpha = hyperparameters.get("alpha")
    share, total = (1.0, 0.0) if alpha is None else (alpha, 0.0)
    total = total + share * 0.5 * expected
    for argument, weight in hyperparameters.items():
        component = argument.removesuffix("_loss_weight")
        if component in losses and component != "known_transform_attack":
            total = total + (1.0 if alpha is None else 1 - alpha) * weight * rewrite.component(component)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert relative_error(gradients, rewrite.gradients(total)) < 1e-5


def test_passes_of_one_place_each_give_the_same(make_noisy_model, batch, monkeypatch):
    found = []
    set_effort(monkeypatch, 100, 6)
    for queries in (known_transform.QUERIES_OF_A_PASS, 1):
        monkeypatch.setattr(known_transform, "QUERIES_OF_A_PASS", queries)
        noisy_model = make_noisy_model()
        torch.manual_seed(4)
        found.append(run("distillation", noisy_model, batch)[:3])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_candidates_are_the_nearest_half_and_tokens_of_the_batch_and_never_the_own_token(monkeypatch):
    set_effort(monkeypatch, 100, 7)
    table = torch.randn(40, 5)
    own = torch.tensor([0, 0, 7, 9])
    distances = torch.cdist(table.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist")
    frequent = []
    for _ in range(200):
        found = known_transform._candidates(table, table[own])
        assert found.shape == (4, 7)
        assert not (found == own[:, None]).any()
        assert torch.equal(found[:, :4], distances[own].argsort(1)[:, 1:5])
        frequent.append(found[2, 4:])
    # Half of the batch's tokens are token 0. Where token 7 itself is drawn, one of the 39 others stands.
    drawn = torch.cat(frequent).bincount(minlength=40) / 600
    assert drawn[0].item() == pytest.approx(0.5 + 0.25 / 39, abs=0.07)
    assert drawn[9].item() == pytest.approx(0.25 + 0.25 / 39, abs=0.06)
    assert (drawn > 0).sum() > 20


def test_fewer_tokens_are_drawn_among_the_transformed_ones(make_noisy_model, batch, monkeypatch):
    set_effort(monkeypatch, 1, 1)
    values = set()
    for seed in range(4):
        noisy_model = make_noisy_model()
        torch.manual_seed(seed)
        value = run("distillation", noisy_model, batch)[1]
        values.add(round(value["known_transform_attack"].item(), 4))
    assert len(values) > 1


def test_a_batch_without_transformed_tokens_gives_zero(make_noisy_model, batch, monkeypatch):
    set_effort(monkeypatch, 100, 6)
    nothing = torch.zeros_like(batch["noise_mask"])
    _, losses, gradients, _ = run("distillation", make_noisy_model(), batch | {"noise_mask": nothing})
    assert losses["known_transform_attack"].item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients.values() if gradient is not None)


def test_a_part_of_a_batch_has_its_share_of_the_mean(make_noisy_model, batch):
    noisy_model = make_noisy_model().train()
    factory, arguments = CASES["cross entropy"]
    loss_function, get_losses, _ = factory(noisy_model, **(arguments | ALONE))
    counts = {"noise_tokens": batch["noise_mask"].sum(), "loss_tokens": 10}
    for start in (0, 2):
        part = {key: value[start : start + 2] for key, value in batch.items()}
        values = []
        for normalizers in (None, counts):
            noisy_model.noise_layer.forward_count.zero_()
            noisy_model(**part)
            loss_function(part["loss_mask"], normalizers=normalizers)
            values.append(get_losses()["known_transform_attack"].item())
        share = int(part["noise_mask"].sum()) / int(batch["noise_mask"].sum())
        assert values[1] == pytest.approx(share * values[0], rel=1e-5)


def test_training_against_the_attack_lowers_its_odds(make_noisy_model, batch, monkeypatch):
    set_effort(monkeypatch, 100, 8)
    noisy_model = make_noisy_model(scale=(1e-2, 4.0)).train()
    factory, arguments = CASES["cross entropy"]
    loss_function, get_losses, _ = factory(noisy_model, **(arguments | ALONE))
    optimizer = torch.optim.Adam(noisy_model.noise_layer.parameters(), lr=0.02)
    odds = []
    for _ in range(30):
        noisy_model(**batch)
        optimizer.zero_grad()
        loss_function(batch["loss_mask"]).backward()
        optimizer.step()
        odds.append(get_losses()["known_transform_attack"].item())
    assert odds[-1] < 0.2 * odds[0]


@pytest.mark.parametrize("setting", [{"percent_to_mask": 0.25}, {"value_range": (-1.0, 1.0)}])
def test_layers_that_suppress_or_clamp_are_refused(setting, make_noisy_model):
    factory, arguments = CASES["distillation"]
    with pytest.raises(ValueError, match="needs a TransformerCloak without percent_to_mask and value_range"):
        factory(make_noisy_model(**setting), **(arguments | ALONE))


def test_a_transform_of_a_deeper_layer_is_refused(make_noisy_model):
    noisy_model = make_noisy_model()
    deeper = NoiseMaskedNoisyTransformerModel(
        None, noisy_model.base_model, target_layer="model.layers.0", noise_layer=noisy_model.noise_layer
    )
    factory, arguments = CASES["distillation"]
    with pytest.raises(ValueError, match="needs a transform of the embeddings, not of a deeper layer"):
        factory(deeper, **(arguments | ALONE))


def test_a_layer_of_another_class_is_refused(make_noisy_model):
    base_model = make_noisy_model().base_model
    noisy_model = NoiseMaskedNoisyTransformerModel(CloakNoiseLayer, base_model, scale=(0.1, 1.0))
    factory, arguments = CASES["cross entropy"]
    with pytest.raises(ValueError, match="needs a TransformerCloak"):
        factory(noisy_model, **(arguments | ALONE))


def test_the_function_is_a_component():
    assert components.known_transform_log_odds is known_transform_log_odds
