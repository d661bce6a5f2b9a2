"""The distillation objective: against a float64 rewrite, its contract of calls, its argument checks."""

import math
import weakref

import pytest
import torch

from sgfast.loss import distillation_loss_factory

WEIGHTS = {
    "std_log_ratio_loss_weight": 0.1,
    "input_embedding_similarity_loss_weight": 0.5,
    "distillation_layer_cosine_distance_loss_weight": 2.0,
    "distillation_layer_l2_distance_loss_weight": 0.3,
    "inverse_l2_power_law_catalyst_loss_weight": 0.2,
    "inverse_l2_power_law_characteristic_length": 1.5,
    "inverse_l2_power_law_exponent_of_decay": 2.0,
}
REQUIRED = {
    "std_log_ratio_loss_weight": 0.1,
    "input_embedding_similarity_loss_weight": 0.5,
    "distillation_layer_cosine_distance_loss_weight": 2.0,
}


@pytest.mark.parametrize("layer", [2, -3, None])
def test_against_a_float64_rewrite(layer, make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, get_losses, _ = distillation_loss_factory(noisy_model, layer, 0.4, **WEIGHTS)
    keep = noisy_model.attach(layers=frozenset({layer or 0}), logits=True)
    output = noisy_model(**tokens)
    loss_mask = tokens["loss_mask"] & (torch.arange(9) > 1)
    loss = loss_function(loss_mask)
    capture = keep.take("the test")
    clean, noisy = (half.double()[loss_mask] for half in capture.halves(layer if layer is None else layer % 4))
    x, transformed, std = (
        tensor.double()[tokens["noise_mask"]] for tensor in (output.input, output.transformed, output.std)
    )
    cosine = torch.nn.functional.cosine_similarity
    squared = (transformed - x).square().sum(-1)
    expected = {
        "distillation_layer_cosine_distance": (1 - cosine(noisy, clean, dim=-1)).mean(),
        "distillation_layer_l2_distance": ((noisy - clean).norm(dim=-1) / clean.norm(dim=-1)).mean(),
        "std_log_ratio": (math.log(2.0) - std.log()).mean(),
        "input_embedding_similarity": cosine(transformed, x, dim=-1).mean(),
        "inverse_l2_power_law_catalyst": (1 / ((squared + 0.015**2) / 1.5**2)).mean(),
    }
    losses = get_losses()
    assert losses.keys() == expected.keys() | {"total"}
    total = 0.0
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=2e-5), name
        total += (0.6 if "layer" in name else 0.4) * WEIGHTS[f"{name}_loss_weight"] * value.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert losses["total"].item() == loss.item()
    assert not losses["total"].requires_grad


def test_padding_never_counts(make_noisy_model, tokens):
    values = []
    for mask in (tokens["loss_mask"], torch.ones_like(tokens["loss_mask"])):
        noisy_model = make_noisy_model().train()
        loss_function, _, _ = distillation_loss_factory(noisy_model, 1, 0.4, **WEIGHTS)
        noisy_model(**tokens)
        values.append(loss_function(mask).item())
    assert values[0] == values[1]


def test_suppressed_features_leave_the_log_ratio(make_noisy_model, tokens):
    noisy_model = make_noisy_model(percent_to_mask=0.25).train()
    loss_function, get_losses, _ = distillation_loss_factory(noisy_model, 1, 0.4, **WEIGHTS)
    output = noisy_model(**tokens)
    kept = tokens["noise_mask"][..., None] & ~output.mask
    expected = (math.log(2.0) - output.std.double()[kept].log()).mean().item()
    loss_function(tokens["loss_mask"])
    assert get_losses()["std_log_ratio"].item() == pytest.approx(expected, rel=1e-6)


def test_a_refused_mask_leaves_the_forward_to_a_second_try(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, get_losses, _ = distillation_loss_factory(noisy_model, 1, 0.4, **REQUIRED)
    noisy_model(**tokens)
    for wrong, error in ((tokens["loss_mask"][:, :4], ValueError), (None, TypeError)):
        with pytest.raises(error, match="loss_mask must"):
            loss_function(wrong)
    with pytest.raises(
        ValueError, match="normalizers may hold loss_tokens, noise_tokens and attended_tokens; got loss_token"
    ):
        loss_function(tokens["loss_mask"], normalizers={"loss_token": 3})
    loss_function(tokens["loss_mask"])
    noisy_model(**tokens)
    with pytest.raises(RuntimeError, match="get_losses needs a call"):
        get_losses()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha(alpha, make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, get_losses, _ = distillation_loss_factory(noisy_model, 1, alpha, **REQUIRED)
    noisy_model(**tokens)
    loss = loss_function(tokens["loss_mask"])
    loss.backward()
    losses = get_losses()
    strength = 0.1 * losses["std_log_ratio"] + 0.5 * losses["input_embedding_similarity"]
    expected = strength if alpha else 2 * losses["distillation_layer_cosine_distance"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    only_strength = REQUIRED | {"distillation_layer_cosine_distance_loss_weight": 0.0}
    if alpha == 0:
        with pytest.raises(ValueError, match="leave nothing to minimise"):
            distillation_loss_factory(noisy_model, 1, alpha, **only_strength)


def test_calls_out_of_order_raise(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, get_losses, get_hyperparameters = distillation_loss_factory(noisy_model, 1, 0.4, **REQUIRED)
    with pytest.raises(RuntimeError, match="needs a forward pass"):
        loss_function(tokens["loss_mask"])
    with pytest.raises(RuntimeError, match="get_losses needs a call of the loss"):
        get_losses()
    noisy_model(**tokens)
    loss_function(tokens["loss_mask"])
    with pytest.raises(RuntimeError, match="needs a forward pass"):
        loss_function(tokens["loss_mask"])
    get_losses()
    with pytest.raises(RuntimeError, match="get_losses needs a call of the loss"):
        get_losses()
    get_hyperparameters()
    with pytest.raises(RuntimeError, match="get_hyperparameters needs a forward pass"):
        get_hyperparameters()
    noisy_model(**tokens)
    assert get_hyperparameters()["alpha"] == 0.4


def test_hyperparameters_are_the_factory_arguments(make_noisy_model):
    noisy_model = make_noisy_model()
    weights = {**WEIGHTS, "known_transform_attack_loss_weight": 0.7}
    hyperparameters = distillation_loss_factory(noisy_model, None, 0.25, **weights)[2]()
    assert hyperparameters == {"distillation_layer_index": None, "alpha": 0.25, **weights}


def test_the_older_name_of_the_cosine_weight(make_noisy_model):
    older = {name: value for name, value in REQUIRED.items() if "cosine" not in name}
    older["distillation_layer_distance_loss_weight"] = 12.0
    hyperparameters = distillation_loss_factory(make_noisy_model(), 1, 0.5, **older)[2]()
    assert hyperparameters["distillation_layer_cosine_distance_loss_weight"] == 12.0


def test_components_of_weight_zero_are_absent(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    weights = REQUIRED | {"input_embedding_similarity_loss_weight": 0.0}
    loss_function, get_losses, _ = distillation_loss_factory(noisy_model, 1, 0.4, **weights)
    noisy_model(**tokens)
    loss_function(tokens["loss_mask"])
    assert get_losses().keys() == {"distillation_layer_cosine_distance", "std_log_ratio", "total"}


def test_empty_masks_give_zero_and_zero_gradients(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, _, _ = distillation_loss_factory(noisy_model, 1, 0.4, **WEIGHTS)
    nothing = torch.zeros_like(tokens["noise_mask"])
    noisy_model(**(tokens | {"noise_mask": nothing}))
    loss = loss_function(nothing)
    loss.backward()
    assert loss.item() == 0.0
    gradients = [p.grad for p in noisy_model.noise_layer.parameters() if p.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


def test_normalizers_make_accumulation_exact(make_noisy_model, tokens):
    """Rows one by one, normalised by the whole batch's token counts, add up to the batch's loss without noise."""
    noisy_model = make_noisy_model(scale=(1e-12, 2e-12)).train()
    loss_function, _, _ = distillation_loss_factory(noisy_model, 1, 0.4, **WEIGHTS)
    noisy_model(**tokens)
    whole = loss_function(tokens["loss_mask"]).item()
    counts = {"loss_tokens": tokens["loss_mask"].sum(), "noise_tokens": tokens["noise_mask"].sum()}
    parts = 0.0
    for row in range(3):
        part = {name: value[row : row + 1] for name, value in tokens.items()}
        noisy_model(**part)
        parts += loss_function(part["loss_mask"], normalizers=counts).item()
    assert parts == pytest.approx(whole, rel=1e-5)


def test_two_losses_on_one_model_each_consume_the_forward(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    shallow = distillation_loss_factory(noisy_model, 0, 0.4, **REQUIRED)
    deep = distillation_loss_factory(noisy_model, 2, 0.4, **REQUIRED)
    noisy_model(**tokens)
    (shallow[0](tokens["loss_mask"]) + deep[0](tokens["loss_mask"])).backward()
    first, second = shallow[1](), deep[1]()
    assert first["std_log_ratio"] == second["std_log_ratio"]
    assert first["distillation_layer_cosine_distance"] != second["distillation_layer_cosine_distance"]


def test_the_graph_is_let_go_of_once_consumed(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, _, _ = distillation_loss_factory(noisy_model, 1, 0.4, **REQUIRED)
    transformed = weakref.ref(noisy_model(**tokens).transformed)
    assert transformed().grad_fn is not None
    loss = loss_function(tokens["loss_mask"])
    assert noisy_model.noise_layer.output.grad_fn is None
    del loss
    assert transformed() is None


def test_loss_without_a_transform_is_refused(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, _, _ = distillation_loss_factory(noisy_model, 1, 0.4, **REQUIRED)
    with noisy_model.noise_disabled():
        noisy_model(**tokens)
    with pytest.raises(RuntimeError, match="noise was disabled"):
        loss_function(tokens["loss_mask"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 2.0}, ValueError, r"alpha must lie in \[0, 1\]; got 2.0"),
        ({"alpha": -0.1}, ValueError, "alpha"),
        (
            {"std_log_ratio_loss_weight": -1.0},
            ValueError,
            "std_log_ratio_loss_weight must be finite and not negative; got -1.0",
        ),
        ({"inverse_l2_power_law_characteristic_length": 0.0}, ValueError, "characteristic_length must be positive"),
        ({"inverse_l2_power_law_exponent_of_decay": -1.0}, ValueError, "exponent_of_decay must be positive"),
        ({"distillation_layer_index": 4}, ValueError, r"must lie in \[-4, 3\] for this model; got 4"),
        ({"distillation_layer_index": 1.5}, TypeError, "must be an int"),
        ({"distillation_layer_distance_loss_weight": 1.0}, TypeError, "once"),
        (dict.fromkeys(REQUIRED, 0.0), ValueError, "leave nothing to minimise"),
        ({"std_log_ratio_loss_weight": math.inf}, ValueError, "must be finite"),
    ],
)
def test_errors_at_factory_time(arguments, error, message, make_noisy_model):
    defaults = {"distillation_layer_index": 1, "alpha": 0.4, **REQUIRED}
    with pytest.raises(error, match=message):
        distillation_loss_factory(make_noisy_model(), **(defaults | arguments))


def test_a_scale_from_zero_is_refused_where_log_sigma_is_needed(make_noisy_model):
    noisy_model = make_noisy_model(scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="scale starts above 0"):
        distillation_loss_factory(noisy_model, 1, 0.4, **REQUIRED)
    distillation_loss_factory(noisy_model, 1, 0.4, **(REQUIRED | {"std_log_ratio_loss_weight": 0.0}))


def test_wrong_loss_mask_shape(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, _, _ = distillation_loss_factory(noisy_model, 1, 0.4, **REQUIRED)
    noisy_model(**tokens)
    with pytest.raises(ValueError, match=r"loss_mask must have the shape of the tokens, \(3, 9\); got \(3, 4\)"):
        loss_function(tokens["loss_mask"][:, :4])
