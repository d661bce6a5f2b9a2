"""The Cloak layers: formula, suppression, phases, gradients, lazy shapes, states, arguments."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.nn.parameter import UninitializedParameter

from sgfast.noise_layer import (
    CloakNoiseLayer,
    CloakNoiseLayer1,
    CloakNoiseLayer2,
    CloakNoiseLayerOneShot,
    PatchCloakNoiseLayer,
    check_weight_decay,
    parameter_groups,
)
from sgfast.ops import standard_normal

SHAPE = (3, 5, 4)
SCALE = (0.05, 1.5)


@pytest.fixture
def images():
    return torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def spread(layer, seed=0):
    """Give every parameter a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def make(kind, **arguments):
    """A layer of each kind for images of SHAPE, with parameters that are all different."""
    settings = {"scale": SCALE, "seed": 11} | arguments
    if kind is CloakNoiseLayer2:
        stds = make(CloakNoiseLayer1).stds
        return spread(CloakNoiseLayer2(**{"percent_to_mask": 0.4, "stds": stds} | settings))
    if kind is PatchCloakNoiseLayer:
        return spread(PatchCloakNoiseLayer(2, 3, **settings))
    return spread(kind((1, *SHAPE), **settings))


KINDS = [CloakNoiseLayer, CloakNoiseLayer1, CloakNoiseLayer2, CloakNoiseLayerOneShot, PatchCloakNoiseLayer]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_the_transform_is_its_formula(kind, images):
    masked = {} if kind is CloakNoiseLayer1 else {"percent_to_mask": 0.4}
    layer = make(kind, value_range=(-1.0, 1.2), **masked)
    noise_mask = torch.rand(SHAPE[1:], generator=torch.Generator().manual_seed(1)) < 0.6
    output = layer(images, noise_mask, seed=99)
    eps = standard_normal(images.shape, 99)
    keep = 1.0 if layer.mask is None else (~layer.mask).float()
    expected = ((images + layer.std * eps) * keep + layer.mean).clamp(-1.0, 1.2)
    torch.testing.assert_close(output, torch.where(noise_mask, expected, images))
    assert torch.equal(output[..., ~noise_mask], images[..., ~noise_mask])
    assert (output != images).any()


def test_sigma_and_mu_are_those_of_the_parameters(images):
    layer = make(CloakNoiseLayer, shallow=0.7)
    layer(images)
    rho = layer.rhos.detach().double()
    expected = SCALE[0] + (SCALE[1] - SCALE[0]) * (1 + torch.tanh(rho / 0.7)) / 2
    torch.testing.assert_close(layer.std.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(layer.mean, layer.locs)
    assert torch.equal(layer.stds, layer.std)
    assert set(dict(layer.named_parameters())) == {"locs", "rhos"}


@pytest.mark.parametrize("percent", [0.0, 0.1, 0.35, 0.6, 1.0])
@pytest.mark.parametrize("kind", [CloakNoiseLayerOneShot, CloakNoiseLayer2])
def test_exactly_the_features_of_largest_sigma_are_suppressed(kind, percent, images):
    layer = make(kind, percent_to_mask=percent)
    output = layer(images)
    count = math.floor(percent * 60 + 1e-9)
    largest = set(layer.std.flatten().argsort(descending=True, stable=True)[:count].tolist())
    assert set(layer.mask.flatten().nonzero().flatten().tolist()) == largest
    mask = layer.mask.expand_as(images)
    assert torch.equal(output[mask], layer.mean.expand_as(images)[mask])


def test_one_shot_chooses_anew_and_phase_two_keeps_its_choice(images):
    one_shot, second = make(CloakNoiseLayerOneShot, percent_to_mask=0.5), make(CloakNoiseLayer2, percent_to_mask=0.5)
    one_shot(images)
    before = one_shot.mask
    with torch.no_grad():
        one_shot.rhos.neg_()
    one_shot(images)
    assert torch.equal(one_shot.mask, ~before)
    second(images)
    chosen = second.mask
    second.to(torch.bfloat16)(images)
    assert torch.equal(second.mask, chosen)


def test_phase_two_continues_phase_one(images):
    first = make(CloakNoiseLayer1)
    first(images)
    second = CloakNoiseLayer2((1, *SHAPE), SCALE, percent_to_mask=0.25, stds=first.stds, seed=3)
    second(images).sum().backward()
    assert torch.equal(second.std, first.std)
    assert [name for name, _ in second.named_parameters()] == ["locs"]
    torch.testing.assert_close(second.locs.grad, torch.full(SHAPE, 2.0))
    state = second.state_dict()
    loaded = CloakNoiseLayer2(None, SCALE, percent_to_mask=0.25, stds=torch.full(SHAPE, 1.0))
    loaded.load_state_dict(state)
    assert torch.equal(loaded(images, seed=5), second(images, seed=5))


def test_patches_are_transformed_by_their_own_pixels_alone(images):
    layer = make(PatchCloakNoiseLayer)
    layer(images)
    before = layer.mean.detach()
    changed = images.clone()
    changed[0, 1, 2, 3] += 1.0  # in the patch of rows 2–3 and columns 2–3
    layer(changed)
    touched = (layer.mean.detach() != before).any(1)
    expected = torch.zeros_like(touched)
    expected[0, 2:4, 2:4] = True
    assert torch.equal(touched, expected)


def test_patches_are_the_linear_maps_that_their_parameters_say(images):
    """Image of odd height: the last patches see zeros below the image."""
    layer = make(PatchCloakNoiseLayer)
    layer(images)
    padded = torch.cat([images, torch.zeros(2, 3, 1, 4)], dim=2)
    patch = padded[1, :, 4:6, 2:4].flatten()
    outputs = layer.mean_weight.flatten(1) @ patch + layer.mean_bias
    # Of a channel, the outputs for the patch's four pixels follow one another, row by row.
    torch.testing.assert_close(layer.mean[1, :, 4, 2:4], outputs.view(3, 2, 2)[:, 0])
    rho = layer.rho_weight.flatten(1) @ patch + layer.rho_bias
    sigma = SCALE[0] + (SCALE[1] - SCALE[0]) * (1 + torch.tanh(rho)) / 2
    torch.testing.assert_close(layer.std[1, :, 4, 2:4], sigma.view(3, 2, 2)[:, 0])


@pytest.mark.parametrize("percent", [0.0, 0.35, 1.0])
def test_patches_suppress_exactly_so_many_features_of_each_image(percent, images):
    layer = make(PatchCloakNoiseLayer, percent_to_mask=percent)
    layer(images)
    assert layer.mask.sum((1, 2, 3)).tolist() == [math.floor(percent * 60 + 1e-9)] * 2


@pytest.mark.parametrize("kind", [CloakNoiseLayer1, CloakNoiseLayerOneShot, PatchCloakNoiseLayer])
def test_untrained_layers_add_weak_unshifted_noise(kind, images):
    layer = kind(2) if kind is PatchCloakNoiseLayer else kind()
    layer(images)
    assert (layer.mean == 0).all()
    torch.testing.assert_close(layer.std, torch.full_like(layer.std, 1e-4 + (2 - 1e-4) / (1 + math.e**8)))


@each_kind
def test_gradients_against_autograd_in_float64(kind, images):
    """The noise is a constant for the gradient, and so is the choice of suppressed features."""
    masked = {} if kind is CloakNoiseLayer1 else {"percent_to_mask": 0.3}
    layer = make(kind, **masked)
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    source = images.clone().requires_grad_()
    (layer(source, seed=4) * weights).sum().backward()

    exact = copy.deepcopy(layer).double()
    exact.zero_grad()
    wide = images.double().requires_grad_()
    mean, std = exact.estimate(wide)
    eps = standard_normal(images.shape, 4).double()
    keep = 1.0 if layer.mask is None else (~layer.mask).double()
    (((wide + std * eps) * keep + mean) * weights.double()).sum().backward()
    torch.testing.assert_close(source.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    for (name, parameter), reference in zip(layer.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), reference.grad, rtol=1e-5, atol=1e-5, msg=name)
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("rho", [100.0, -100.0])
@pytest.mark.parametrize("scale", [(1e-4, 2.0), (1e-8, 1.0), (0.1, 0.3), (0.3, 1 / 3)])
def test_sigma_stays_within_the_scale_in_half_precision(rho, scale):
    layer = CloakNoiseLayer((1, 4), scale=scale, rhos_init=rho).to(torch.bfloat16)
    output = layer(torch.zeros(2, 4, dtype=torch.bfloat16))
    bounds = torch.tensor(scale, dtype=torch.float32)
    assert output.dtype == torch.bfloat16
    assert layer.std.dtype == torch.float32
    assert torch.equal(layer.std, bounds[int(rho > 0)].expand(4))


def test_frozen_parameters_get_no_gradient(images):
    layer = CloakNoiseLayer((1, *SHAPE), SCALE, locs_requires_grad=False)
    layer(images).sum().backward()
    assert layer.locs.grad is None
    assert layer.rhos.grad.abs().sum() > 0
    lazy = CloakNoiseLayer(scale=SCALE, rhos_requires_grad=False)
    lazy(images).sum().backward()
    assert lazy.rhos.grad is None
    assert (lazy.locs.grad == 2).all()


@each_kind
def test_equal_seeds_give_equal_streams_that_advance(kind, images):
    first, second, other = make(kind), make(kind), make(kind, seed=12)
    one, two = first(images), first(images)
    assert not torch.equal(one, two)
    assert torch.equal(second(images), one)
    assert torch.equal(second(images), two)
    assert not torch.equal(other(images), one)


@each_kind
def test_copies_and_pickles_continue_the_stream_and_leave_the_last_forward_behind(kind, images):
    layer = make(kind)
    layer(images)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(images)
    for one in copies:
        assert one.output is None
        assert torch.equal(one(images), expected)


@each_kind
def test_states_of_the_last_forward_are_not_saved(kind, images):
    layer = make(kind)
    layer(images)
    known = {"forward_count", "locs", "rhos", "stds", "suppressed"}
    known |= {"mean_weight", "mean_bias", "rho_weight", "rho_bias"}
    assert set(layer.state_dict()) <= known
    layer.clear()
    assert [layer.input, layer.mean, layer.std, layer.mask, layer.noise, layer.output] == [None] * 6


LAZY = [
    (CloakNoiseLayer1, {}),
    (CloakNoiseLayerOneShot, {"percent_to_mask": 0.4}),
    (PatchCloakNoiseLayer, {"patch_size": 2, "percent_to_mask": 0.4}),
]


@pytest.mark.parametrize(("kind", "arguments"), LAZY)
def test_shapes_come_from_the_first_forward_into_parameters_an_optimizer_knows(kind, arguments, images):
    layer = kind(scale=SCALE, rhos_init=0.0, **arguments)
    assert not layer.materialized
    assert list(layer.state_dict()) == ["forward_count"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with torch.inference_mode():
        layer(images)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer(images).sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter, before[name] - parameter.grad)
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("kind", "arguments"), LAZY)
def test_states_load_into_layers_without_shapes(kind, arguments, images, tmp_path):
    layer = kind(scale=SCALE, **arguments)
    layer(images)
    spread(layer)
    torch.save(layer.state_dict(), tmp_path / "noise_layer.pth")
    loaded = kind(scale=SCALE, **arguments)
    loaded.load_state_dict(torch.load(tmp_path / "noise_layer.pth"))
    assert torch.equal(loaded(images, seed=7), layer(images, seed=7))
    again = kind(scale=SCALE, **arguments)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again(images, seed=7), layer(images, seed=7))


@pytest.mark.parametrize(("kind", "arguments"), LAZY)
def test_layers_without_shapes_are_copied_moved_and_saved(kind, arguments, images):
    layer = kind(scale=SCALE, seed=1, **arguments)
    copied = copy.deepcopy(layer).to(torch.float64)
    pickled = pickle.loads(pickle.dumps(layer))
    same = kind(scale=SCALE, seed=1, **arguments)
    same.load_state_dict(layer.state_dict())
    copied(images)
    assert all(parameter.dtype == torch.float64 for parameter in copied.parameters())
    assert all(isinstance(parameter, UninitializedParameter) for parameter in layer.parameters())
    expected = layer(images)
    assert torch.equal(pickled(images), expected)
    assert torch.equal(same(images), expected)


def test_states_that_do_not_fit_are_refused(images):
    shaped = make(CloakNoiseLayer)
    with pytest.raises(RuntimeError, match="Missing key"):
        shaped.load_state_dict(CloakNoiseLayer().state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        CloakNoiseLayer().load_state_dict({"forward_count": torch.tensor(0), "locs": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        CloakNoiseLayer((1, 2)).load_state_dict(shaped.state_dict())


@each_kind
def test_compiled_layers_agree_with_eager(kind, images):
    torch._dynamo.reset()  # what other tests compiled decides which sizes are dynamic
    compiled, eager = torch.compile(make(kind), backend="aot_eager", fullgraph=True), make(kind)
    for _ in range(3):
        torch.testing.assert_close(compiled(images), eager(images))


def test_a_layer_without_shapes_runs_its_first_compiled_forward_eagerly(images):
    torch._dynamo.reset()
    layer, eager = CloakNoiseLayer(seed=1), CloakNoiseLayer(seed=1)
    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images), eager(images))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(CloakNoiseLayer(), backend="eager", fullgraph=True)(images)


def test_weight_decay_is_kept_from_what_it_would_erase():
    layer = make(CloakNoiseLayer)
    model = torch.nn.ModuleDict({"noise": layer, "head": torch.nn.Linear(2, 2)})
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {id(one) for one in groups[1]["params"]} == {id(layer.locs), id(layer.rhos)}
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    before = layer.rhos.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.rhos, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_weight_decay(optimizer, model) == []
        assert check_weight_decay(torch.optim.Adam(model.parameters()), model) == []
    with pytest.warns(UserWarning, match=r"weight decay will erase .* noise\.locs, noise\.rhos"):
        assert check_weight_decay(torch.optim.AdamW(model.parameters()), model) == ["noise.locs", "noise.rhos"]
    assert len(parameter_groups(make(PatchCloakNoiseLayer), 0.1)[1]["params"]) == 2
    with pytest.raises(ValueError, match="weight_decay must not be negative; got -1"):
        parameter_groups(model, -1)
    with pytest.raises(ValueError, match="all are frozen"):
        parameter_groups(model.requires_grad_(False), 0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_shape": 3}, TypeError, "input_shape must be a tuple of ints, or None; got 3"),
        ({"input_shape": (1, 2.0)}, TypeError, r"input_shape must be a tuple of ints, or None; got \(1, 2\.0\)"),
        ({"input_shape": (1, 0)}, ValueError, r"followed by positive sizes; got \(1, 0\)"),
        ({"input_shape": ()}, ValueError, r"followed by positive sizes; got \(\)"),
        ({"scale": 1.0}, TypeError, "scale must be a pair of numbers, .* got 1.0"),
        ({"scale": ("a", "b")}, TypeError, "scale must be a pair of numbers"),
        ({"scale": (1.0, 2.0, 3.0)}, ValueError, "0 <= min < max; got"),
        ({"scale": (2.0, 1.0)}, ValueError, r"0 <= min < max; got \(2.0, 1.0\)"),
        ({"shallow": 0.0}, ValueError, "shallow must be positive; got 0.0"),
        ({"shallow": "1"}, TypeError, "shallow must be a number; got str"),
        ({"percent_to_mask": 1.1}, ValueError, r"percent_to_mask must lie in \[0, 1\]; got 1.1"),
        ({"percent_to_mask": math.nan}, ValueError, "percent_to_mask must be a number; got nan"),
        ({"percent_to_mask": "half"}, TypeError, "percent_to_mask must be a number; got str"),
        ({"value_range": 1.0}, TypeError, r"value_range must be \(low or None, high or None\), or None; got float"),
        ({"value_range": (1.0,)}, ValueError, r"value_range must be \(low or None, high or None\); got \(1.0,\)"),
        ({"value_range": (1.0, 0.0)}, ValueError, r"value_range must have low <= high; got \(1.0, 0.0\)"),
        ({"value_range": ("a", None)}, TypeError, "a bound of value_range must be a number; got str"),
        ({"locs_requires_grad": 1}, TypeError, "locs_requires_grad must be a bool; got int"),
        ({"rhos_requires_grad": None}, TypeError, "rhos_requires_grad must be a bool; got NoneType"),
        ({"rhos_init": math.nan}, ValueError, "rhos_init must be a number; got nan"),
        ({"rhos_init": [0.0]}, TypeError, "rhos_init must be a number; got list"),
        ({"seed": -1}, ValueError, r"seed must be None or lie in \[0, 2\*\*64\); got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an int or None; got float"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        CloakNoiseLayerOneShot(**arguments)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: CloakNoiseLayer1(percent_to_mask=0.5), ValueError, "percent_to_mask must be None: .* got 0.5"),
        (lambda: CloakNoiseLayer2(stds=torch.ones(2)), ValueError, "percent_to_mask must be .* got None"),
        (lambda: CloakNoiseLayer2(percent_to_mask=0.5), TypeError, "stds"),
        (lambda: CloakNoiseLayer2(percent_to_mask=0.5, stds=[1.0]), TypeError, "stds must be a torch.Tensor; got list"),
        (
            lambda: CloakNoiseLayer2((1, 3), percent_to_mask=0.5, stds=torch.ones(2)),
            ValueError,
            r"stds must have the features of input_shape, \(3,\); got shape \(2,\)",
        ),
        (
            lambda: CloakNoiseLayer2(percent_to_mask=0.5, stds=torch.tensor([1.0, 3.0])),
            ValueError,
            r"stds must lie within the scale \(0.0001, 2.0\); got 1 to 3",
        ),
        (lambda: PatchCloakNoiseLayer(0), ValueError, "patch_size must be at least 1; got 0"),
        (lambda: PatchCloakNoiseLayer((2, 2)), TypeError, "patch_size must be an int; got tuple"),
        (lambda: PatchCloakNoiseLayer(2, 0), ValueError, "in_channels must be at least 1; got 0"),
        (lambda: PatchCloakNoiseLayer(2, percent_to_mask=2), ValueError, "percent_to_mask must lie in"),
        (lambda: CloakNoiseLayer1().stds, RuntimeError, "has no shape yet"),
    ],
)
def test_wrong_arguments_of_the_other_layers(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_wrong_inputs(images):
    with pytest.raises(ValueError, match=r"\(batch, 3, 5, 4\); got shape \(2, 3, 5\)"):
        make(CloakNoiseLayer)(images[..., 0])
    with pytest.raises(ValueError, match=r"\(batch, 3, 5, 4\); got shape \(2, 3, 4, 5\)"):
        make(CloakNoiseLayer2)(images.mT)
    with pytest.raises(ValueError, match=r"must be images, .* got shape \(3, 5, 4\)"):
        make(PatchCloakNoiseLayer)(images[0])
    with pytest.raises(ValueError, match=r"must have 3 channels; got shape \(2, 5, 3, 4\)"):
        make(PatchCloakNoiseLayer)(images.transpose(1, 2))
    lazy = CloakNoiseLayer()
    with pytest.raises(TypeError, match=r"input must be float32, .* got torch\.int64"):
        lazy(torch.ones(2, 3, dtype=torch.int64))
    assert not lazy.materialized
