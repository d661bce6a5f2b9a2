"""Each factory against a float64 rewrite: its components, total and gradients, and what it refuses."""

import inspect
import math

import numpy as np
import pytest
import torch

from sgfast.loss.distillation import cross_entropy_distillation_factory, distillation_loss_factory
from tests.loss.factory_cases import CASES, CATALYST, COMBINE, component_of, rewritten
from tests.loss.rewrites import Rewrite, learning_parameters, relative_error
from tests.tiny_models import tiny_noisy_model, uneven_tokens

WITHOUT_ATTACK = {"known_transform_attack_loss_weight": 0.0}
SINGLE = {name: case for name, case in CASES.items() if name != "jigsaw"}


def run(name, noisy_model, batch, **changed):
    """Loss, components and gradients of a factory."""
    factory, arguments = CASES[name]
    loss_function, get_losses, _ = factory(noisy_model, **(arguments | changed))
    noisy_model.train()(**batch)
    loss = loss_function(batch["loss_mask"])
    loss.backward()
    gradients = {parameter: p.grad for parameter, p in learning_parameters(noisy_model)}
    return loss, get_losses(), gradients


@pytest.mark.parametrize(
    ("name", "model_arguments", "changed"),
    [(name, arguments, {}) for name in SINGLE for arguments in ({}, {"percent_to_mask": 0.25})]
    + [(name, {}, {"distillation_layer_index": None}) for name in ("distillation", "mutual information")]
    + [
        (name, arguments, {COMBINE: False})
        for name in SINGLE
        if "mutual" in name
        for arguments in ({}, {"percent_to_mask": 0.25})
    ],
)
def test_against_a_float64_rewrite(name, model_arguments, changed, make_noisy_model, batch):
    noisy_model = make_noisy_model(**model_arguments)
    loss, losses, gradients = run(name, noisy_model, batch, **changed)
    arguments = CASES[name][1] | changed
    rewrite = Rewrite(noisy_model, batch, arguments.get("distillation_layer_index"))
    components, total = rewritten(rewrite, arguments)
    assert losses.keys() == components.keys() | {"total"}
    for component, value in components.items():
        # The cosine's formula costs as many ulps as the norms differ by: a factor of about 50 here.
        assert losses[component].item() == pytest.approx(value.item(), rel=1e-5, abs=2e-6), component
        assert losses[component].dtype == torch.float32
        assert not losses[component].requires_grad
    assert loss.item() == losses["total"].item() == pytest.approx(total.item(), rel=1e-5, abs=1e-6)
    assert relative_error(gradients, rewrite.gradients(total)) < 1e-5


@pytest.mark.parametrize("name", SINGLE)
def test_components_of_weight_zero_are_absent_and_each_alone_keeps_its_value(name, make_noisy_model, batch):
    noisy_model = make_noisy_model()
    _, together, _ = run(name, noisy_model, batch)
    weights = [argument for argument in CASES[name][1] if component_of(argument)]
    for argument in weights:
        noisy_model.noise_layer.forward_count.zero_()
        zeros = {other: 0.0 for other in weights if other != argument}
        _, losses, _ = run(name, noisy_model, batch, **zeros)
        assert losses.keys() == {component_of(argument), "total"}
        assert losses[component_of(argument)].item() == pytest.approx(together[component_of(argument)].item(), rel=1e-6)


@pytest.mark.parametrize("name", SINGLE)
def test_hyperparameters_are_the_factorys_numbers(name, make_noisy_model):
    factory, arguments = CASES[name]
    assert factory(make_noisy_model(), **arguments)[2]() == WITHOUT_ATTACK | arguments


@pytest.mark.parametrize("name", SINGLE)
def test_empty_masks_give_zero_and_zero_gradients(name, make_noisy_model, batch):
    nothing = torch.zeros_like(batch["noise_mask"])
    loss, _, gradients = run(name, make_noisy_model(), batch | {"noise_mask": nothing, "loss_mask": nothing})
    assert loss.item() == 0.0
    found = [gradient for gradient in gradients.values() if gradient is not None]
    assert found
    assert all((gradient == 0).all() for gradient in found)


@pytest.mark.parametrize("name", SINGLE)
def test_normalizers_make_the_parts_of_a_batch_add_up(name, make_noisy_model, batch):
    """Without a mutual-information term, whose pairs belong to the part; the noise is too weak to matter."""
    changed = {"mutual_information_loss_weight": 0.0} if "mutual" in name else {}
    noisy_model = make_noisy_model(scale=(1e-12, 2e-12))
    whole, _, _ = run(name, noisy_model, batch, **changed)
    counted = batch["loss_mask"] & (batch["attention_mask"] != 0)
    counts = {"loss_tokens": counted.sum(), "noise_tokens": batch["noise_mask"].sum()}
    factory, arguments = CASES[name]
    loss_function, _, _ = factory(noisy_model, **(arguments | changed))
    total = 0.0
    for start in (0, 2):
        part = {key: value[start : start + 2] for key, value in batch.items()}
        noisy_model(**part)
        total += loss_function(part["loss_mask"], normalizers=counts).item()
    assert total == pytest.approx(whole.item(), rel=1e-5)


def test_a_loss_mask_on_another_device_is_refused(make_noisy_model, batch):
    factory, arguments = CASES["distillation"]
    noisy_model = make_noisy_model().train()
    loss_function, _, _ = factory(noisy_model, **arguments)
    noisy_model(**batch)
    with pytest.raises(ValueError, match="loss_mask and the tokens must be on one device; got meta and cpu"):
        loss_function(batch["loss_mask"].to("meta"))


def test_a_loss_mask_that_weighs_is_refused(make_noisy_model, batch):
    factory, arguments = CASES["distillation"]
    noisy_model = make_noisy_model().train()
    loss_function, _, _ = factory(noisy_model, **arguments)
    noisy_model(**batch)
    with pytest.raises(ValueError, match=r"loss_mask must be bool, or numbers equal to 0 or 1; got 0\.5"):
        loss_function(batch["loss_mask"] * 0.5)
    for name in ("attention_mask", "noise_mask"):
        with pytest.raises(ValueError, match=rf"{name} must be bool, or numbers equal to 0 or 1; got 0\.5"):
            noisy_model(**(batch | {name: batch[name] * 0.5}))


def test_each_loss_keeps_the_outputs_that_it_reads_and_no_others(make_noisy_model, batch):
    noisy_model = make_noisy_model()
    first = noisy_model.attach(layers=frozenset({1}))
    second = noisy_model.attach(layers=frozenset({0, 2}), logits=True)
    noisy_model(**batch)
    for consumer, layers in ((first, {1}), (second, {0, 2})):
        capture = consumer.take("the test")
        for half in (capture.clean, capture.noisy):
            assert half.layers.keys() == layers
            assert (half.logits is None) == (consumer is first)


def test_normalizers_may_be_numbers_of_any_kind(make_noisy_model, batch):
    noisy_model = make_noisy_model().train()
    factory, arguments = CASES["distillation"]
    loss_function, _, _ = factory(noisy_model, **arguments)
    losses = []
    for count in (7, 7.0, np.int64(7), np.float64(7), torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)):
        noisy_model.noise_layer.forward_count.zero_()
        noisy_model(**batch)
        losses.append(loss_function(batch["loss_mask"], normalizers={"loss_tokens": count, "noise_tokens": count}))
    assert {(loss.item(), loss.dtype) for loss in losses} == {(losses[0].item(), torch.float32)}
    noisy_model(**batch)
    for wrong, got in (("7", "str"), (torch.ones(1), r"shape \(1,\)")):
        with pytest.raises(TypeError, match=f"must be a number or a tensor without dimensions; got {got}"):
            loss_function(batch["loss_mask"], normalizers={"loss_tokens": wrong})


def test_mutual_information_of_parts_adds_up_to_their_mean_weighted_by_tokens(make_noisy_model, batch):
    noisy_model = make_noisy_model().train()
    factory, arguments = CASES["mutual information, cross entropy"]
    loss_function, get_losses, _ = factory(noisy_model, **arguments)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in ([0, 1], [0, 3])]
    tokens = torch.tensor([part["noise_mask"].sum() for part in parts])
    values = []
    for normalizers in (None, {"noise_tokens": tokens.sum(), "loss_tokens": 10}):
        for part in parts:
            noisy_model(**part)
            loss_function(part["loss_mask"], normalizers=normalizers)
            values.append(get_losses()["mutual_information"].item())
    weighted = (tokens[0] * values[0] + tokens[1] * values[1]) / tokens.sum()
    assert values[2] + values[3] == pytest.approx(weighted.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("mutual information", 1, "needs a batch of at least 2 rows; got 1 rows"),
        ("mutual information, cross entropy", 3, "needs an even batch; got 3 rows"),
        ("mutual information, cross entropy", 1, "needs an even batch; got 1 rows"),
    ],
)
def test_batches_that_cannot_be_halved(name, rows, message, make_noisy_model, batch):
    part = {key: value[:rows] for key, value in batch.items()}
    with pytest.raises(ValueError, match=message):
        run(name, make_noisy_model(), part)
    loss, _, _ = run(name, make_noisy_model(), part, mutual_information_loss_weight=0.0)
    assert loss.isfinite()


def test_an_odd_batch_is_halved_downwards(make_noisy_model, batch):
    noisy_model = make_noisy_model()
    part = {key: value[:3] for key, value in batch.items()}
    _, losses, _ = run("mutual information", noisy_model, part)
    value = Rewrite(noisy_model, part, 2).mutual_information()
    assert losses["mutual_information"].item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_bfloat16_and_autocast(name, make_noisy_model, batch):
    exact, _, _ = run(name, make_noisy_model(), batch)
    noisy_model = make_noisy_model()
    noisy_model.base_model.to(torch.bfloat16)
    noisy_model.noise_layer.to(torch.bfloat16)
    half, losses, gradients = run(name, noisy_model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _, _ = run(name, make_noisy_model(), batch)
    for loss in (half, mixed):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=5e-2)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert {g.dtype for g in gradients.values() if g is not None} == {torch.bfloat16}


@pytest.mark.parametrize("name", SINGLE)
def test_checkpointing_and_the_joint_pass_change_nothing(name, make_noisy_model, batch):
    plain = run(name, make_noisy_model(), batch)
    checkpointed = make_noisy_model()
    checkpointed.gradient_checkpointing_enable()
    for noisy_model in (checkpointed, make_noisy_model(clean_pass="joint")):
        torch.testing.assert_close(run(name, noisy_model, batch), plain, rtol=2e-5, atol=1e-7)


def test_factories_on_one_model_each_consume_the_forward(make_noisy_model, batch):
    noisy_model = make_noisy_model().train()
    triples = {name: factory(noisy_model, **arguments) for name, (factory, arguments) in SINGLE.items()}
    noisy_model(**batch)
    total = sum(loss_function(batch["loss_mask"]) for loss_function, _, _ in triples.values())
    total.backward()
    together = {name: p.grad.clone() for name, p in learning_parameters(noisy_model) if p.grad is not None}
    summed = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for name in SINGLE:
        alone = make_noisy_model()
        _, losses, gradients = run(name, alone, batch)
        torch.testing.assert_close(triples[name][1](), losses, rtol=1e-5, atol=1e-7)
        for parameter, gradient in gradients.items():
            if gradient is not None:
                summed[parameter] += gradient
    torch.testing.assert_close(together, summed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SINGLE)
def test_calls_out_of_order(name, make_noisy_model, batch):
    factory, arguments = CASES[name]
    noisy_model = make_noisy_model().train()
    loss_function, get_losses, get_hyperparameters = factory(noisy_model, **arguments)
    with pytest.raises(RuntimeError, match="the loss needs a forward pass of the noisy model"):
        loss_function(batch["loss_mask"])
    noisy_model(**batch)
    loss_function(batch["loss_mask"])
    with pytest.raises(RuntimeError, match="the loss needs a forward pass of the noisy model"):
        loss_function(batch["loss_mask"])
    get_losses()
    get_hyperparameters()
    with pytest.raises(RuntimeError, match="get_losses needs a call of the loss"):
        get_losses()
    with pytest.raises(RuntimeError, match="get_hyperparameters needs a forward pass of the noisy model"):
        get_hyperparameters()


@pytest.mark.parametrize("name", SINGLE)
def test_refused_arguments(name, make_noisy_model):
    factory, arguments = CASES[name]
    noisy_model = make_noisy_model()
    for argument in inspect.signature(factory).parameters:
        if component_of(argument) is None or argument == "distillation_layer_distance_loss_weight":
            continue
        for wrong, error in ((-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)):
            with pytest.raises(error, match=f"{argument} must be"):
                factory(noisy_model, **(arguments | {argument: wrong}))
    for argument in CATALYST:
        if argument in arguments and not argument.endswith("weight"):
            for wrong in (0.0, -1.0):
                # Refused whether or not the term has weight.
                with pytest.raises(ValueError, match=f"{argument} must be positive; got {wrong}"):
                    factory(
                        noisy_model,
                        **(arguments | {argument: wrong, "inverse_l2_power_law_catalyst_loss_weight": 0.0}),
                    )
    if "alpha" in arguments:
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]; got 1.1"):
            factory(noisy_model, **(arguments | {"alpha": 1.1}))
        with pytest.raises(ValueError, match=r"must lie in \[-4, 3\] for this model; got 4"):
            factory(noisy_model, **(arguments | {"distillation_layer_index": 4}))
    if "mutual" in name:
        with pytest.raises(TypeError, match=f"{COMBINE} must be a bool; got int"):
            factory(noisy_model, **arguments, **{COMBINE: 1})
        with pytest.raises(ValueError, match="scale starts above 0"):
            factory(make_noisy_model(scale=(0.0, 1.0)), **arguments)
    with pytest.raises(ValueError, match="leave nothing to minimise"):
        factory(noisy_model, **(arguments | {key: 0.0 for key in arguments if component_of(key)}))
    with pytest.raises(TypeError, match=r"noisy_model must be a NoiseMaskedNoisyTransformerModel; got Llama"):
        factory(noisy_model.base_model, **arguments)


@pytest.mark.parametrize(
    ("name", "changed", "runs"),
    [
        ("cross entropy", {}, [2, 2, 2, 2]),
        ("cross entropy", {"distillation_cross_entropy_loss_weight": 0.0}, [0, 0, 0, 0]),
        ("mutual information", {}, [2, 2, 2, 0]),
        ("mutual information", {"distillation_layer_index": None}, [2, 2, 2, 2]),
        ("mutual information", {"distillation_layer_l2_distance_loss_weight": 0.0}, [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_only_as_deep_as_needed_is_run(family, name, changed, runs, make_noisy_model, batch):
    noisy_model = make_noisy_model(family)
    counts = [0, 0, 0, 0]
    body = noisy_model.base_model.transformer.h if family == "gpt2" else noisy_model.base_model.model.layers
    for index, layer in enumerate(body):
        layer.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    run(name, noisy_model, batch, **changed)
    assert counts == runs


@pytest.mark.parametrize("clean_pass", ["separate", "joint"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_objectives_at_the_logits_make_no_logits(family, clean_pass):
    """Beside a metric that reads logits the same objectives give the same numbers from logits."""
    values = []
    for with_logits in (False, True):
        noisy_model = tiny_noisy_model(family, clean_pass=clean_pass).train()
        reader = noisy_model.attach(logits=True) if with_logits else None
        objectives = [
            cross_entropy_distillation_factory(noisy_model, 1.0, 0.0, 0.0),
            distillation_loss_factory(
                noisy_model,
                None,
                0.3,
                std_log_ratio_loss_weight=0.5,
                input_embedding_similarity_loss_weight=0.0,
                distillation_layer_cosine_distance_loss_weight=1.0,
            ),
        ]
        tokens = uneven_tokens()
        loss_mask = tokens.pop("loss_mask")
        output = noisy_model(**tokens).base_model_output
        capped = family == "gemma2"  # a soft cap is no plain head
        assert (output.noisy_logits is None) == (reader is None and not capped)
        totals = [loss_fn(loss_mask) for loss_fn, _, _ in objectives]
        sum(totals).backward()
        gradients = [parameter.grad for parameter in noisy_model.noise_layer.parameters()]
        values.append(([total.item() for total in totals], gradients))
    (totals, gradients), (expected, expected_gradients) = values
    assert totals == pytest.approx(expected, rel=1e-5)
    largest = max(gradient.abs().max().item() for gradient in expected_gradients if gradient is not None)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)
