"""NoisyModel: both documented calls, targets, the frozen base, hooks under copies, compilation and two processes."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from sgfast import metrics as sg_metrics
from sgfast import model as sg_model
from sgfast import noise_layer as sg_noise_layer
from sgfast.model import NoisyModel, NoisyModelOutput
from sgfast.model.noise_loss import AdaptiveAlpha, negative_log_mean
from sgfast.noise_layer import (
    CloakNoiseLayer,
    CloakNoiseLayer1,
    CloakNoiseLayerOneShot,
    PatchCloakNoiseLayer,
    TransformerCloak,
)
from tests.processes import in_processes
from tests.tiny_models import WIDTH, tiny_causal_lm
from tests.tiny_vision import SETTINGS, SHAPE, make_base, make_model


@pytest.fixture
def images():
    return torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_quickstart_for_computer_vision(tmp_path):
    """The guide's code in its order; only the base model is smaller than its ResNet."""
    base_model = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 10))
    noisy_model = NoisyModel(CloakNoiseLayerOneShot, base_model, scale=(0.001, 1.0), percent_to_mask=0.6)

    base_loss_func = nn.CrossEntropyLoss()
    loss_func = noisy_model.noise_loss_wrapper(base_loss_func, alpha=0.4)

    input, target = torch.rand(2, 3, 32, 32), torch.tensor([1, 7])
    outputs = noisy_model(input)
    base_model_outputs = outputs.base_model_output
    assert base_model_outputs.shape == (2, 10)

    outputs = noisy_model(input)
    # Pass in the `NoisyModelOutput` directly to the wrapped loss function
    loss = loss_func(outputs, target)["composite_loss"]
    loss.backward()
    noise_layer = noisy_model.noise_layer
    assert noise_layer.locs.grad.abs().sum() > 0
    assert noise_layer.rhos.grad.abs().sum() > 0
    assert noise_layer.mask.sum() == int(0.6 * 3 * 32 * 32)

    # This file will be distributed to the client.
    torch.save(noise_layer.state_dict(), tmp_path / "noise_layer.pth")

    stained_glass_transform = CloakNoiseLayerOneShot(percent_to_mask=0.4)
    stained_glass_transform.load_state_dict(torch.load(tmp_path / "noise_layer.pth"))
    transformed_input = stained_glass_transform(input)
    assert (transformed_input != input).any()
    assert stained_glass_transform.mask.sum() == int(0.4 * 3 * 32 * 32)


def test_the_table_of_the_quickstart():
    base_model = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 10))
    base_loss = nn.CrossEntropyLoss()
    input, target = torch.rand(2, 3, 224, 224), torch.tensor([1, 7])
    model = NoisyModel(
        base_model,
        noise_layer_class=CloakNoiseLayerOneShot,
        input_shape=(1, 3, 224, 224),
        scale=(0.001, 1.0),
        percent_to_mask=0.6,
    )
    assert model.noise_layer.locs.shape == (3, 224, 224)
    loss_func = model.noise_loss_wrapper(base_loss, alpha=0.4)
    output = model(input).base_model_output
    assert output.shape == (2, 10)
    output = model(input)
    loss = loss_func(output, target)["composite_loss"]
    loss.backward()
    assert model.noise_layer.rhos.grad.isfinite().all()


def test_the_example_of_the_metrics_page():
    base_model = nn.Conv2d(3, 4, kernel_size=2)
    noisy_model = sg_model.NoisyModel(
        sg_noise_layer.CloakNoiseLayer1,
        base_model,
        target_parameter="input",
    )
    get_noise_metrics = sg_metrics.get_noise_metrics_factory(noisy_model.noise_layer, dim=-3)
    input = torch.ones(4, 3, 2, 2)
    noise_mask = torch.tensor([[True, False], [False, True]])
    noisy_model(input, noise_mask=noise_mask)
    noise_metrics = get_noise_metrics()
    assert list(noise_metrics) == [
        "input_norm",
        "mean_norm",
        "unshifted_noise_norm",
        "mean_shifted_noise_norm",
        "mean_domination_percent",
        "mean_domination_ratio",
        "mean_cosine_similarity",
        "noise_domination_percent",
        "noise_domination_ratio",
        "noise_cosine_similarity",
    ]
    assert {value.shape for value in noise_metrics.values()} == {torch.Size([8])}
    torch.testing.assert_close(noise_metrics["input_norm"], torch.full((8,), 3**0.5))
    noise = noisy_model.noise_layer.noise.movedim(1, -1)[:, noise_mask].flatten(0, 1)
    torch.testing.assert_close(noise_metrics["unshifted_noise_norm"], noise.norm(dim=-1))


def test_both_calls_and_all_orders_give_one_model(images):
    forms = [
        NoisyModel(CloakNoiseLayerOneShot, make_base(), **SETTINGS),
        NoisyModel(make_base(), CloakNoiseLayerOneShot, **SETTINGS),
        NoisyModel(make_base(), noise_layer_class=CloakNoiseLayerOneShot, **SETTINGS),
        NoisyModel(CloakNoiseLayerOneShot, base_model=make_base(), **SETTINGS),
        NoisyModel(noise_layer_class=CloakNoiseLayerOneShot, base_model=make_base(), **SETTINGS),
    ]
    outputs = [form(images).base_model_output for form in forms]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_the_base_computes_on_what_the_output_shows(images):
    noisy_model, base = make_model(percent_to_mask=0.5), make_base().eval()
    noise_mask = torch.rand(4, generator=torch.Generator().manual_seed(1)) < 0.6
    output = noisy_model(images, noise_mask=noise_mask)
    assert isinstance(output, NoisyModelOutput)
    torch.testing.assert_close(output.base_model_output, base(output.transformed))
    assert torch.equal(output.transformed[~noise_mask], images[~noise_mask])
    assert (output.transformed[noise_mask] != images[noise_mask]).any()
    layer = noisy_model.noise_layer
    assert output.input is images
    assert (output.mean is layer.mean, output.std is layer.std, output.mask is layer.mask) == (True, True, True)
    assert output.noise_mask is noise_mask


class TwoInputs(nn.Module):
    def forward(self, first, second=None, *, third=None):
        return first, second, third


@pytest.mark.parametrize("name", [None, "first", "second", "third"])
def test_the_target_parameter_is_found_by_position_and_by_name(name, images):
    noisy_model = NoisyModel(CloakNoiseLayer, TwoInputs(), target_parameter=name, **SETTINGS)
    changed = name or "first"
    calls = [((images,), {"second": images, "third": images}), ((images, images), {"third": images})]
    calls.append(((), {"third": images, "second": images, "first": images}))
    for args, kwargs in calls:
        output = noisy_model(*args, **kwargs)
        for one, result in zip(("first", "second", "third"), output.base_model_output, strict=True):
            assert (result is images) == (one != changed)
        assert output.base_model_output[("first", "second", "third").index(changed)] is output.transformed


def test_a_target_layer_is_transformed_where_it_ends(images):
    noisy_model = NoisyModel(CloakNoiseLayer, make_base(), target_layer="2", **SETTINGS | {"input_shape": (1, 4, 8, 8)})
    base = make_base().eval()
    output = noisy_model(images)
    torch.testing.assert_close(output.input, base[:3](images))
    torch.testing.assert_close(output.base_model_output, base[3:](output.transformed))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, input):
        return self.lstm(input)[0]


def test_of_a_tuple_the_first_element_is_transformed():
    noisy_model = NoisyModel(CloakNoiseLayer, Recurrent(), target_layer="lstm", seed=1)
    output = noisy_model(torch.rand(2, 5, 3))
    assert output.base_model_output is output.transformed
    assert output.input.shape == (2, 5, 4)


def test_an_attention_mask_reaches_estimators_that_take_it():
    base_model, body, target_layer = tiny_causal_lm("llama")
    noisy_model = NoisyModel(
        TransformerCloak, base_model, target_layer=target_layer, config_path=base_model.config, transformer_type=body
    )
    nn.init.normal_(noisy_model.noise_layer.mean_estimator.head.weight)
    noisy_model.eval()
    tokens = torch.arange(1, 11).view(2, 5)
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mean = noisy_model(input_ids=tokens, attention_mask=padded).mean
    alone = noisy_model(input_ids=tokens[:1, 2:], attention_mask=padded[:1, 2:]).mean
    assert mean.shape == (2, 5, WIDTH)
    torch.testing.assert_close(mean[0, 2:], alone[0], rtol=1e-5, atol=1e-5)


def test_the_base_is_frozen_and_stays_in_eval_mode(images):
    noisy_model = make_model().train()
    assert noisy_model.training
    assert noisy_model.noise_layer.training
    assert not any(module.training for module in noisy_model.base_model.modules())
    state = {name: tensor.clone() for name, tensor in noisy_model.base_model.state_dict().items()}
    noisy_model(images).base_model_output.square().sum().backward()
    assert all(torch.equal(tensor, state[name]) for name, tensor in noisy_model.base_model.state_dict().items())
    trained = {name for name, parameter in noisy_model.named_parameters() if parameter.grad is not None}
    assert trained == {"noise_layer.locs", "noise_layer.rhos"} == noisy_model.no_weight_decay()


def test_every_forward_of_the_base_is_transformed_unless_disabled(images):
    noisy_model, base = make_model(), make_base().eval()
    clean = base(images)
    assert (noisy_model.base_model(images) - clean).abs().max() > 1e-3
    with noisy_model.noise_disabled():
        output = noisy_model(images)
        assert torch.equal(noisy_model.base_model(images), clean)
    assert torch.equal(output.base_model_output, clean)
    assert [output.input, output.transformed, output.mean, output.std, output.mask] == [None] * 5
    assert (noisy_model(images).base_model_output - clean).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="boom"), noisy_model.noise_disabled():
        raise RuntimeError("boom")
    assert noisy_model.noise_layer.enabled


def test_noisy_models_over_one_base_do_not_add_up(images):
    base = make_base()
    first = NoisyModel(CloakNoiseLayerOneShot, base, **SETTINGS)
    second = NoisyModel(PatchCloakNoiseLayer, base, patch_size=4, seed=2)
    alone = make_model()
    expected = alone(images).base_model_output
    assert torch.equal(first(images).base_model_output, expected)
    output = second(images)
    torch.testing.assert_close(output.base_model_output, make_base().eval()(output.transformed))
    with first.noise_disabled():
        assert torch.equal(base(images), make_base().eval()(images))


def test_a_base_model_outlives_its_noisy_model(images):
    noisy_model = make_model()
    base_model, layer = noisy_model.base_model, weakref.ref(noisy_model.noise_layer)
    noisy_model(images)
    del noisy_model
    gc.collect()
    assert layer() is None
    assert torch.equal(base_model(images), make_base().eval()(images))


@pytest.mark.parametrize("target_layer", [None, "0"])
def test_copies_are_independent_and_pickles_equal(target_layer, images):
    shape = SETTINGS["input_shape"] if target_layer is None else (1, 4, 8, 8)
    noisy_model = make_model(target_layer=target_layer, input_shape=shape)
    loss = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), alpha=None)
    loss(noisy_model.train()(images), torch.tensor([0, 1, 2, 3]))
    noisy_model(images)
    copied = copy.deepcopy(copy.deepcopy(noisy_model))
    loaded = pickle.loads(pickle.dumps(noisy_model))
    expected = noisy_model(images).base_model_output
    assert torch.equal(copied(images).base_model_output, expected)
    assert torch.equal(loaded(images).base_model_output, expected)
    assert torch.equal(loaded.adaptive_alpha(), noisy_model.adaptive_alpha())
    with torch.no_grad():
        copied.noise_layer.locs.add_(1.0)
    noisy_model.noise_layer.forward_count.zero_()
    copied.noise_layer.forward_count.zero_()
    shift = copied(images).transformed - noisy_model(images).transformed
    torch.testing.assert_close(shift, torch.ones_like(shift))
    base = copy.deepcopy(noisy_model.base_model)
    assert torch.equal(base(images), make_base().eval()(images))


@pytest.mark.parametrize("arguments", [{}, {"percent_to_mask": 0.5}, {"target_layer": "1", "input_shape": None}])
def test_compiled_whole(arguments, images):
    torch._dynamo.reset()
    noisy_model, eager = make_model(**arguments).train(), make_model(**arguments).train()
    for one in (noisy_model, eager):
        one(images)  # gives a layer without shapes its own
    compiled = torch.compile(noisy_model, backend="aot_eager", fullgraph=True)
    loss = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), 0.4)
    eager_loss = eager.noise_loss_wrapper(nn.CrossEntropyLoss(), 0.4)
    target, noise_mask = torch.tensor([0, 1, 2, 3]), torch.ones(4)
    for _ in range(3):
        output, expected = compiled(images, noise_mask=noise_mask), eager(images, noise_mask=noise_mask)
        torch.testing.assert_close(output.base_model_output, expected.base_model_output)
        loss(output, target)["composite_loss"].backward()
        eager_loss(expected, target)["composite_loss"].backward()
    for parameter, reference in zip(noisy_model.noise_layer.parameters(), eager.noise_layer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-6)


def test_compiled_model_is_not_recompiled_for_every_forward(images):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(make_model(), backend=counter, fullgraph=True)
    for _ in range(6):
        compiled(images)
    assert counter.frame_count == 1


def _train_in_two_processes(rank):
    noisy_model = make_model().train()
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(rank))
    target = torch.tensor([0, 1, 2, 3])
    local = copy.deepcopy(noisy_model)
    local.noise_loss_wrapper(nn.CrossEntropyLoss(), 0.4)(local(images), target)["composite_loss"].backward()
    expected = local.noise_layer.rhos.grad
    torch.distributed.all_reduce(expected)
    parallel = nn.parallel.DistributedDataParallel(noisy_model)
    loss = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), 0.4)
    output = parallel(images)
    loss(output, target)["composite_loss"].backward()
    torch.testing.assert_close(noisy_model.noise_layer.rhos.grad, expected / 2)
    noise = [torch.empty_like(images) for _ in range(2)]
    torch.distributed.all_gather(noise, noisy_model.noise_layer.noise)
    assert (noise[0] != noise[1]).any()


def test_distributed_data_parallel():
    in_processes(2, _train_in_two_processes)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_loss_interpolates(alpha, images):
    noisy_model = make_model(percent_to_mask=0.5)
    with torch.no_grad():
        noisy_model.noise_layer.rhos.normal_(generator=torch.Generator().manual_seed(3))
    loss = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), alpha)
    target = torch.tensor([0, 1, 2, 3])
    output = noisy_model(images)
    std, mask = output.std.detach().double(), output.mask
    losses = loss(output, target)
    noise_loss = -std[~mask].mean().log()
    base_loss = nn.functional.cross_entropy(output.base_model_output.double(), target)
    torch.testing.assert_close(losses["noise_loss"].double(), noise_loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(losses["base_loss"].double(), base_loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        losses["composite_loss"].double(), (1 - alpha) * base_loss + alpha * noise_loss, rtol=1e-6, atol=1e-7
    )
    assert losses["alpha"].item() == pytest.approx(alpha)
    assert set(losses) == {"composite_loss", "base_loss", "noise_loss", "alpha"}
    assert [name for name, value in losses.items() if value.requires_grad] == ["composite_loss"]
    losses["composite_loss"].backward()
    suppressed = noisy_model.noise_layer.rhos.grad[mask]
    assert (suppressed == 0).all()


def test_noise_loss_counts_what_is_selected_and_kept():
    generator = torch.Generator().manual_seed(0)
    std = torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.1
    suppressed = torch.rand(3, 4, generator=generator) < 0.4
    shape = torch.Size([2, 3, 4])
    everything = std.expand(shape)
    for noise_mask in (torch.tensor([[1, 0, 1], [0, 0, 1]]), torch.tensor([True, False, True, True])):
        # (2, 3) covers the leading dimensions, (4,) broadcasts
        view = noise_mask[..., None] if noise_mask.dim() == 2 else noise_mask
        kept = (view != 0).expand(shape) & ~suppressed
        torch.testing.assert_close(
            negative_log_mean(std, suppressed, noise_mask, shape), -everything[kept].mean().log()
        )
    torch.testing.assert_close(negative_log_mean(std), -std.mean().log())
    assert negative_log_mean(std.float()).dtype == torch.float32


def test_noise_loss_of_nothing_is_zero_with_zero_gradients():
    std = torch.rand(2, 3, requires_grad=True)
    loss = negative_log_mean(std, torch.ones(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (std.grad == 0).all()


def test_losses_are_wide_for_half_precision_models(images):
    noisy_model = make_model().to(torch.bfloat16)
    output = noisy_model(images.to(torch.bfloat16))
    losses = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), 0.4)(output, torch.tensor([0, 1, 2, 3]))
    assert output.base_model_output.dtype == torch.bfloat16
    assert {value.dtype for value in losses.values()} == {torch.float32}


def run_adaptive(noisy_model, loss, images, target, steps):
    optimizer = torch.optim.Adam(noisy_model.noise_layer.parameters(), lr=0.05)
    history = []
    for _ in range(steps):
        losses = loss(noisy_model(images), target)
        optimizer.zero_grad()
        losses["composite_loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    return history


def test_adaptive_alpha_holds_the_base_loss_at_the_clean_level_plus_the_tolerance(images):
    noisy_model = make_model(scale=(1e-3, 10.0), rhos_init=-2.0).train()
    with noisy_model.noise_disabled():
        target = noisy_model(images).base_model_output.argmax(-1)
        clean_loss = nn.functional.cross_entropy(noisy_model(images).base_model_output, target).item()
    loss = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), alpha=None, tolerance=0.3)
    history = run_adaptive(noisy_model, loss, images, target, 400)
    assert noisy_model.adaptive_alpha.level.item() == pytest.approx(clean_loss, rel=1e-5)
    late = [step["base_loss"] for step in history[-100:]]
    assert sum(late) / 100 == pytest.approx(clean_loss + 0.3, abs=0.1)
    assert history[0]["alpha"] == 0.5
    assert history[-1]["noise_loss"] < history[0]["noise_loss"] - 0.5


def test_adaptive_alpha_follows_its_formula():
    adaptive = AdaptiveAlpha()
    for clean in (0.1, 0.3):
        adaptive.measure(torch.tensor(clean))
    assert adaptive.level.item() == pytest.approx(0.2)
    logit, average = 0.0, 0.5
    for step, base_loss in enumerate((0.5, 0.4, float("nan"), 0.1, 0.9)):
        adaptive.update(torch.tensor(base_loss), tolerance=0.25)
        if step and base_loss == base_loss:
            average = 0.9 * average + 0.1 * base_loss
        logit += 0.05 * max(-1.0, min(1.0, (0.2 + 0.25 - average) / 0.25))
        assert adaptive.logit.item() == pytest.approx(logit, abs=1e-6)
    for _ in range(300):
        adaptive.update(torch.tensor(0.0), tolerance=0.25)
    assert adaptive().item() == pytest.approx(0.99, abs=1e-6)
    assert adaptive.to(torch.bfloat16).logit.dtype == torch.float32


def test_the_adaptive_state_is_saved_with_the_model_and_evaluation_leaves_it(images):
    target = torch.tensor([0, 1, 2, 3])
    noisy_model = make_model().train()
    loss = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), None)
    run_adaptive(noisy_model, loss, images, target, 12)
    alpha = noisy_model.adaptive_alpha().item()
    assert alpha != 0.5
    noisy_model.eval()
    assert loss(noisy_model(images), target)["alpha"].item() == alpha
    assert noisy_model.adaptive_alpha().item() == alpha
    resumed = make_model().eval()
    resumed.load_state_dict(noisy_model.state_dict())
    resumed_loss = resumed.noise_loss_wrapper(nn.CrossEntropyLoss(), None)
    assert resumed_loss(resumed(images), target)["alpha"].item() == alpha
    assert not resumed.adaptive_alpha.measuring
    noisy_model.train()
    noisy_model.noise_layer.forward_count.zero_()
    resumed.train().noise_layer.forward_count.zero_()
    continued = [
        run_adaptive(one, one_loss, images, target, 3)
        for one, one_loss in ((noisy_model, loss), (resumed, resumed_loss))
    ]
    assert continued[0] == continued[1]


def test_measuring_the_clean_level_leaves_the_last_forward_as_it_was(images):
    noisy_model = make_model().train()
    loss = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), None)
    output = noisy_model(images)
    noise = noisy_model.noise_layer.noise
    loss(output, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(noisy_model.noise_layer.output, output.transformed)
    assert torch.equal(noisy_model.noise_layer.noise, noise)
    assert noisy_model.noise_layer.enabled


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: NoisyModel(CloakNoiseLayer), TypeError, "got 1 classes and 0 other arguments"),
        (lambda: NoisyModel(make_base()), TypeError, "got 0 classes and 1 other arguments"),
        (
            lambda: NoisyModel(CloakNoiseLayer, make_base(), base_model=make_base()),
            TypeError,
            "got 1 classes and 2 other arguments",
        ),
        (lambda: NoisyModel(nn.Linear, make_base()), TypeError, "noise_layer_class must be a class of BaseNoiseLayer"),
        (
            lambda: NoisyModel(CloakNoiseLayer, "resnet18"),
            TypeError,
            r"base_model must be a torch\.nn\.Module; got str",
        ),
        (lambda: make_model(target_layer="9"), ValueError, r"base_model has no module '9' \(target_layer\)"),
        (lambda: make_model(target_layer=0), TypeError, "target_layer must be a str or None; got int"),
        (
            lambda: make_model(target_parameter="x"),
            ValueError,
            r"target_parameter must be an argument of Sequential\.forward, one of input; got 'x'",
        ),
        (lambda: make_model(target_parameter=0), TypeError, "target_parameter must be a str or None; got int"),
        (
            lambda: make_model(target_parameter="input", target_layer="0"),
            ValueError,
            "target_layer or target_parameter, not both; got '0' and 'input'",
        ),
        (lambda: make_model(input_shape=8), TypeError, "input_shape must be a tuple of ints, or None; got 8"),
        (lambda: make_model(percent=0.5), TypeError, "percent"),
        (lambda: make_model(percent_to_mask=5), ValueError, r"percent_to_mask must lie in \[0, 1\]; got 5"),
        (lambda: make_model().noise_loss_wrapper(None, 0.5), TypeError, "base_loss must be callable; got NoneType"),
        (lambda: make_model().noise_loss_wrapper(len, 1.5), ValueError, r"alpha must lie in \[0, 1\]; got 1.5"),
        (lambda: make_model().noise_loss_wrapper(len, "a"), TypeError, "alpha must be a number; got str"),
        (
            lambda: make_model().noise_loss_wrapper(len, None, tolerance=0),
            ValueError,
            "tolerance must be positive; got 0",
        ),
        (
            lambda: make_model(scale=(0.0, 1.0)).noise_loss_wrapper(len, 0.5),
            ValueError,
            r"scale starts above 0; got \(0.0, 1.0\)",
        ),
    ],
)
def test_wrong_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_wrong_calls(images):
    noisy_model = make_model()
    loss = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), 0.4)
    target = torch.tensor([0, 1, 2, 3])
    with pytest.raises(TypeError, match="output must be what the noisy model returned; got Tensor"):
        loss(noisy_model(images).base_model_output, target)
    with noisy_model.noise_disabled(), pytest.raises(RuntimeError, match="noise was disabled in the forward"):
        loss(noisy_model(images), target)
    unreduced = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(reduction="none"), 0.4)
    with pytest.raises(ValueError, match=r"base_loss must return a scalar .* got shape \(4,\)"):
        unreduced(noisy_model(images), target)
    with pytest.raises(TypeError, match=r"base_loss must return a torch\.Tensor; got float"):
        noisy_model.noise_loss_wrapper(lambda *_: 1.0, 0.4)(noisy_model(images), target)
    second = NoisyModel(CloakNoiseLayer1, TwoInputs(), target_parameter="second")
    with pytest.raises(ValueError, match="called without its argument 'second'"):
        second(images)
    unused = nn.Sequential(nn.Identity())
    unused.never = nn.Identity()
    unused.forward = lambda input: input
    with pytest.raises(RuntimeError, match="target_layer 'never' did not run"):
        NoisyModel(CloakNoiseLayer1, unused, target_layer="never")(images)


def test_unrelated_models_do_not_quiet_each_other():
    bases = [nn.Linear(3, 2) for _ in range(2)]
    first, second = (NoisyModel(CloakNoiseLayer, base, input_shape=(1, 3), rhos_init=2.0) for base in bases)
    sample = torch.ones(4, 3)
    with torch.no_grad():
        clean = sample @ bases[1].weight.T + bases[1].bias
        with first.noise_disabled():
            assert not torch.allclose(bases[1](sample), clean)
        with second.noise_disabled():
            torch.testing.assert_close(bases[1](sample), clean)


def test_copies_of_copies_carry_one_hook():
    noisy_model = NoisyModel(CloakNoiseLayer, nn.Linear(3, 2), input_shape=(1, 3))
    for _ in range(3):
        noisy_model = copy.deepcopy(noisy_model)
    assert len(noisy_model.base_model._forward_pre_hooks) == 1


def test_a_refused_layer_leaves_the_base_alone():
    base = nn.Linear(3, 2).train()
    with pytest.raises(TypeError):
        NoisyModel(CloakNoiseLayer, base, no_such_argument=1)
    assert base.training
    assert base.weight.requires_grad
