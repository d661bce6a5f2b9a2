"""The composite Cloak loss: its values, what it consumes, its getters."""

import pytest
import torch
from torch import nn

from sgfast.loss import composite_cloak_loss_factory
from sgfast.loss.cloak import composite_cloak_loss_factory as documented
from sgfast.model import NoisyModel
from sgfast.noise_layer import CloakNoiseLayerOneShot, PatchCloakNoiseLayer
from tests.tiny_vision import make_base, make_model

TARGET = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noisy_model():
    model = make_model(percent_to_mask=0.5)
    with torch.no_grad():
        model.noise_layer.rhos.normal_(generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("respect_std_mask", [True, False])
def test_value_and_gradients_against_float64(respect_std_mask, noisy_model, images):
    noise_mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.7
    loss, get_losses, get_hyperparameters = composite_cloak_loss_factory(
        noisy_model, nn.CrossEntropyLoss(), 0.3, respect_std_mask
    )
    output = noisy_model(images, noise_mask=noise_mask)
    value = loss(output.base_model_output, TARGET)
    value.backward()

    layer = noisy_model.noise_layer
    rho = layer.rhos.detach().double().requires_grad_()
    std = 0.05 + 0.95 * (1 + torch.tanh(rho)) / 2
    kept = noise_mask.expand(3, 8, 8) & (~layer.mask if respect_std_mask else True)
    noise_loss = -std[kept].mean().log()
    eps = layer.noise.double() / layer.std.double()
    transformed = (images + std * eps) * ~layer.mask + layer.locs.detach().double()
    logits = make_base().double().eval()(torch.where(noise_mask, transformed, images.double()))
    base_loss = nn.functional.cross_entropy(logits, TARGET)
    total = 0.7 * base_loss + 0.3 * noise_loss
    total.backward()
    torch.testing.assert_close(value.double(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.rhos.grad.double(), rho.grad, rtol=1e-4, atol=1e-6)
    losses = get_losses()
    assert list(losses) == ["total", "base_loss", "noise_loss"]
    for name, expected in (("total", total), ("base_loss", base_loss), ("noise_loss", noise_loss)):
        assert not losses[name].requires_grad
        torch.testing.assert_close(losses[name].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert get_hyperparameters() == {"alpha": 0.3}


def test_it_is_the_wrapper_of_the_model_in_another_form(noisy_model, images):
    wrapped = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), 0.4)
    loss, _, _ = documented(noisy_model, nn.CrossEntropyLoss(), 0.4)
    output = noisy_model(images)
    assert torch.equal(wrapped(output, TARGET)["composite_loss"], loss(output, TARGET))


def test_keywords_reach_the_loss_function(noisy_model, images):
    loss, get_losses, _ = composite_cloak_loss_factory(noisy_model, nn.functional.cross_entropy, 0.4)
    output = noisy_model(images).base_model_output
    loss(output, target=TARGET, label_smoothing=0.2)
    expected = nn.functional.cross_entropy(output, TARGET, label_smoothing=0.2)
    torch.testing.assert_close(get_losses()["base_loss"], expected.detach())


def test_a_loss_of_weight_zero_is_not_computed(images):
    zero_scale = NoisyModel(CloakNoiseLayerOneShot, make_base(), scale=(0.0, 1.0))
    loss, get_losses, _ = composite_cloak_loss_factory(zero_scale, nn.CrossEntropyLoss(), 0.0)
    output = zero_scale(images)
    torch.testing.assert_close(loss(output, TARGET), nn.functional.cross_entropy(output.base_model_output, TARGET))
    assert set(get_losses()) == {"base_loss", "total"}

    def fails(*_):
        raise AssertionError("called")

    patches = NoisyModel(PatchCloakNoiseLayer, make_base(), patch_size=4, percent_to_mask=0.25)
    loss, get_losses, _ = composite_cloak_loss_factory(patches, fails, 1.0)
    output = patches(images)
    torch.testing.assert_close(loss(output, TARGET), -output.std[~output.mask].mean().log())
    assert set(get_losses()) == {"noise_loss", "total"}


def test_each_function_is_called_once_after_a_forward(noisy_model, images):
    loss, get_losses, get_hyperparameters = composite_cloak_loss_factory(noisy_model, nn.CrossEntropyLoss(), 0.4)
    for function in (lambda: loss(images, TARGET), get_losses, get_hyperparameters):
        with pytest.raises(RuntimeError, match="needs a"):
            function()
    for _ in range(2):
        output = noisy_model(images)
        with pytest.raises(RuntimeError, match="get_losses needs a call of the loss"):
            get_losses()
        loss(output, TARGET)
        with pytest.raises(RuntimeError, match="the loss needs a forward pass"):
            loss(output, TARGET)
        get_losses()
        get_hyperparameters()
        for getter in (get_losses, get_hyperparameters):
            with pytest.raises(RuntimeError, match="needs a"):
                getter()
    with noisy_model.noise_disabled():
        output = noisy_model(images)
    with pytest.raises(RuntimeError, match="with noise"):
        loss(output, TARGET)


def test_training_makes_the_noise_stronger_and_keeps_the_task(images):
    noisy_model = make_model(scale=(1e-3, 5.0), rhos_init=-3.0).train()
    with noisy_model.noise_disabled():
        target = noisy_model(images).base_model_output.argmax(-1)
    loss, get_losses, _ = composite_cloak_loss_factory(noisy_model, nn.CrossEntropyLoss(), 0.4)
    optimizer = torch.optim.Adam(noisy_model.noise_layer.parameters(), lr=0.05)
    history = []
    for _ in range(150):
        value = loss(noisy_model(images), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(get_losses())
    assert history[-1]["noise_loss"] < history[0]["noise_loss"] - 2
    assert history[-1]["base_loss"] < history[0]["base_loss"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((make_base(), len, 0.5), TypeError, "noisy_model must be a NoisyModel; got Sequential"),
        ((make_model(), None, 0.5), TypeError, "loss_function must be callable; got NoneType"),
        ((make_model(), len, None), TypeError, "alpha must be a number; got NoneType"),
        ((make_model(), len, -0.1), ValueError, r"alpha must lie in \[0, 1\]; got -0.1"),
        ((make_model(), len, 0.5, 1), TypeError, "respect_std_mask must be a bool; got int"),
        ((make_model(scale=(0.0, 1.0)), len, 0.5), ValueError, r"scale starts above 0; got \(0.0, 1.0\)"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        composite_cloak_loss_factory(*arguments)
