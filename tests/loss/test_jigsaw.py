"""The jigsaw objective: against a float64 rewrite, what learns from which term, what runs, and what it refuses."""

import inspect
import itertools
import math

import pytest
import torch

from sgfast.loss.distillation import distillation_loss_factory
from sgfast.loss.jigsaw import jigsaw_loss_factory
from tests.loss.factory_cases import CASES, MASK, component_of, rewritten
from tests.loss.rewrites import Rewrite, learning_parameters, relative_error

ARGUMENTS = CASES["jigsaw"][1]
WEIGHTS = {argument: component_of(argument) for argument in ARGUMENTS if component_of(argument)}


def only(*components):
    """Arguments under which these components alone have weight."""
    return {argument: ARGUMENTS[argument] if name in components else 0.0 for argument, name in WEIGHTS.items()}


def run(pair, batch, order=(0, 1), **changed):
    """Loss, components and gradients of one step."""
    teacher, student = pair
    loss_function, get_losses, _ = jigsaw_loss_factory(teacher, student, **(ARGUMENTS | changed))
    for model in [pair[index] for index in order]:
        model.train()(**batch)
    loss = loss_function(batch["loss_mask"])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in learning_parameters(teacher, student)}
    return loss, get_losses(), gradients


@pytest.mark.parametrize(
    ("pair_arguments", "changed"),
    [
        ({}, {}),
        ({"percent_to_mask": 0.25}, {"distillation_layer_index": -2}),
        ({"two_bases": True}, {}),
        ({}, {"distillation_layer_index": None}),
        ({}, {MASK: False}),
        ({}, {"alpha": 0.0}),
    ],
)
def test_against_a_float64_rewrite(pair_arguments, changed, make_pair, batch):
    teacher, student = make_pair(**pair_arguments)
    loss, losses, gradients = run((teacher, student), batch, **changed)
    arguments = ARGUMENTS | changed
    rewrite = Rewrite(teacher, batch, arguments["distillation_layer_index"], student)
    components, total = rewritten(rewrite, arguments)
    assert losses.keys() == components.keys() | {"total"}
    for component, value in components.items():
        # The cosine's formula costs as many ulps as the norms differ by: a factor of about 50 here.
        assert losses[component].item() == pytest.approx(value.item(), rel=1e-5, abs=2e-6), component
    assert loss.item() == losses["total"].item() == pytest.approx(total.item(), rel=1e-5)
    assert relative_error(gradients, rewrite.gradients(total)) < 2e-5


@pytest.mark.parametrize(
    ("component", "noise_layer_learns", "adapters_learn"),
    [
        ("distillation_layer_cosine_distance", True, True),
        ("distillation_layer_l2_distance", True, True),
        ("distillation_protection_l2", True, False),
        ("clean_embedding_performance", False, True),
        ("std_log_ratio", True, False),
        ("input_embedding_similarity", True, False),
        ("inverse_l2_power_law_catalyst", True, False),
    ],
)
@pytest.mark.parametrize("two_bases", [False, True])
def test_what_learns_from_which_term(component, noise_layer_learns, adapters_learn, two_bases, make_pair, batch):
    teacher, student = make_pair(two_bases=two_bases)
    _, losses, gradients = run((teacher, student), batch, **only(component))
    assert losses.keys() == {component, "total"}
    norms = {False: 0.0, True: 0.0}
    for name, gradient in gradients.items():
        norms["lora_" in name] += 0.0 if gradient is None else gradient.norm().item()
    assert (norms[False] > 0, norms[True] > 0) == (noise_layer_learns, adapters_learn)
    bases = itertools.chain(teacher.base_model.named_parameters(), student.base_model.named_parameters())
    assert all(parameter.grad is None for name, parameter in bases if "lora_" not in name)


@pytest.mark.parametrize(
    ("components", "teacher_runs", "student_runs"),
    [
        (("distillation_layer_cosine_distance",), (1, 0), (0, 1)),
        (("distillation_layer_l2_distance", "distillation_protection_l2"), (1, 1), (0, 1)),
        (("clean_embedding_performance",), (1, 0), (1, 0)),
        (("distillation_protection_l2",), (1, 1), (0, 0)),
        (("std_log_ratio",), (0, 0), (0, 0)),
    ],
)
@pytest.mark.parametrize("clean_pass", ["separate", "joint"])
def test_only_the_halves_and_layers_that_weigh_are_run(
    components, teacher_runs, student_runs, clean_pass, make_pair, batch
):
    teacher, student = make_pair(clean_pass=clean_pass)
    passes = []
    for index, layer in enumerate(teacher.base_model.model.layers):
        layer.register_forward_hook(lambda _, inputs, output, index=index: passes.append((index, len(output))))
    run((teacher, student), batch, **only(*components))
    halves = sum(teacher_runs) + sum(student_runs)
    if clean_pass == "separate":
        assert passes == [(index, 4) for _ in range(halves) for index in range(3)]
    else:
        models = any(teacher_runs) + any(student_runs)
        assert passes == [(index, 8) for _ in range(models) for index in range(3)]


def test_shared_and_separate_bases_joint_passes_checkpointing_and_order_change_nothing(make_pair, batch):
    plain = run(make_pair(), batch)

    def compare(pair, **options):
        loss, losses, gradients = run(pair, batch, **options)
        torch.testing.assert_close((loss, losses), plain[:2], rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            if gradient is not None:
                torch.testing.assert_close(gradient, plain[2][name], rtol=1e-4, atol=1e-6)

    compare(make_pair(two_bases=True))
    compare(make_pair(clean_pass="joint"))
    compare(make_pair(), order=(1, 0))
    checkpointed = make_pair()
    for model in checkpointed:
        model.gradient_checkpointing_enable()
    compare(checkpointed)


def test_empty_masks_give_zero_and_zero_gradients(make_pair, batch):
    nothing = torch.zeros_like(batch["noise_mask"])
    loss, _, gradients = run(make_pair(), batch | {"noise_mask": nothing, "loss_mask": nothing})
    assert loss.item() == 0.0
    found = [gradient for gradient in gradients.values() if gradient is not None]
    assert found
    assert all((gradient == 0).all() for gradient in found)


def test_bfloat16_and_autocast(make_pair, batch):
    exact, _, _ = run(make_pair(), batch)
    pair = make_pair()
    for model in pair:
        model.to(torch.bfloat16)
    half, losses, gradients = run(pair, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _, _ = run(make_pair(), batch)
    for loss in (half, mixed):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=5e-2)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


@pytest.mark.parametrize("masked", [True, False])
def test_normalizers_make_the_parts_of_a_batch_add_up(masked, make_pair, batch):
    pair = make_pair(scale=(1e-12, 2e-12))
    whole, losses, _ = run(pair, batch, **{MASK: masked})
    attended = batch["attention_mask"] != 0
    counts = {"loss_tokens": (batch["loss_mask"] & attended).sum(), "noise_tokens": batch["noise_mask"].sum()}
    loss_function, get_losses, _ = jigsaw_loss_factory(*pair, **ARGUMENTS, **{MASK: masked})
    totals = {}
    for normalizers in (counts | {"attended_tokens": attended.sum()}, counts):
        totals[len(normalizers)] = total = [0.0, 0.0]
        for start in range(4):
            part = {name: value[start : start + 1] for name, value in batch.items()}
            for model in pair:
                model(**part)
            total[0] += loss_function(part["loss_mask"], normalizers=normalizers).item()
            total[1] += get_losses()["distillation_protection_l2"].item()
    assert totals[3][0] == pytest.approx(whole.item(), rel=1e-5)
    # Without the count of attended tokens the protection term is a mean weighted by counted ones: near, not equal.
    protection = losses["distillation_protection_l2"].item()
    assert totals[2][1] == pytest.approx(protection, rel=1e-5 if masked else 0.2)


def test_two_factories_share_one_forward_of_both_models(make_pair, batch):
    teacher, student = make_pair()
    jigsaw = jigsaw_loss_factory(teacher, student, **ARGUMENTS)
    names = inspect.signature(distillation_loss_factory).parameters
    distillation = distillation_loss_factory(student, **{k: v for k, v in ARGUMENTS.items() if k in names})
    for model in (teacher, student):
        model.train()(**batch)
    (jigsaw[0](batch["loss_mask"]) + distillation[0](batch["loss_mask"])).backward()
    _, expected, _ = run(make_pair(), batch)
    torch.testing.assert_close(jigsaw[1](), expected, rtol=1e-5, atol=1e-6)
    assert distillation[1]()["std_log_ratio"].item() == pytest.approx(expected["std_log_ratio"].item(), rel=1e-6)


def test_calls_out_of_order(make_pair, batch):
    teacher, student = make_pair()
    loss_function, get_losses, get_hyperparameters = jigsaw_loss_factory(teacher, student, **ARGUMENTS)
    both = "needs a forward pass of the noisy teacher model and of the noisy student model"
    with pytest.raises(RuntimeError, match=f"the loss {both}"):
        loss_function(batch["loss_mask"])
    teacher.train()(**batch)
    with pytest.raises(RuntimeError, match="needs a forward pass of the noisy student model since"):
        loss_function(batch["loss_mask"])
    student.train()(**batch)
    loss_function(batch["loss_mask"])
    assert get_hyperparameters() == ARGUMENTS
    get_losses()
    with pytest.raises(RuntimeError, match="get_losses needs a call of the loss"):
        get_losses()
    student(**batch)
    with pytest.raises(RuntimeError, match="needs a forward pass of the noisy teacher model since"):
        loss_function(batch["loss_mask"])
    with pytest.raises(RuntimeError, match=f"get_hyperparameters {both}"):
        get_hyperparameters()
    teacher(**batch)
    get_hyperparameters()
    loss_function(batch["loss_mask"])
    with pytest.raises(RuntimeError, match=f"the loss {both}"):
        loss_function(batch["loss_mask"])


def test_models_that_saw_different_noise_or_batches_are_refused(make_pair, batch):
    teacher, student = make_pair()
    loss_function, _, _ = jigsaw_loss_factory(teacher, student, **ARGUMENTS)
    teacher.train()(**batch)
    student.train()(**{name: value.clone() for name, value in batch.items()})
    with pytest.raises(RuntimeError, match="different noise: call both with the same tensors"):
        loss_function(batch["loss_mask"])
    student(**{name: value[:2] for name, value in batch.items()})
    with pytest.raises(RuntimeError, match=r"different batches, \(4, 9\) and \(2, 9\)"):
        loss_function(batch["loss_mask"])
    with student.noise_disabled():
        student(**batch)
    with pytest.raises(RuntimeError, match="different noise"):
        loss_function(batch["loss_mask"])
    for model in (teacher, student):
        model(**batch)
    assert loss_function(batch["loss_mask"]).isfinite()


def test_refused_arguments(make_pair, make_noisy_model):
    teacher, student = make_pair()
    for argument in WEIGHTS:
        for wrong, error in ((-1.0, ValueError), (math.inf, ValueError), (math.nan, ValueError), ("1", TypeError)):
            with pytest.raises(error, match=f"{argument} must be"):
                jigsaw_loss_factory(teacher, student, **(ARGUMENTS | {argument: wrong}))
    for argument in ("inverse_l2_power_law_characteristic_length", "inverse_l2_power_law_exponent_of_decay"):
        with pytest.raises(ValueError, match=f"{argument} must be positive; got 0.0"):
            jigsaw_loss_factory(teacher, student, **(ARGUMENTS | {argument: 0.0}))
    for changed, error, message in (
        ({"alpha": -0.1}, ValueError, r"alpha must lie in \[0, 1\]"),
        ({"distillation_layer_index": 4}, ValueError, r"must lie in \[-4, 3\]"),
        ({MASK: 1}, TypeError, f"{MASK} must be a bool; got int"),
        (only("std_log_ratio") | {"alpha": 0.0}, ValueError, "leave nothing to minimise"),
    ):
        with pytest.raises(error, match=message):
            jigsaw_loss_factory(teacher, student, **(ARGUMENTS | changed))
    with pytest.raises(TypeError, match="noisy_student_model must be a PeftNoiseMasked"):
        jigsaw_loss_factory(teacher, teacher, **ARGUMENTS)
    with pytest.raises(TypeError, match="noisy_teacher_model must be a NoiseMasked"):
        jigsaw_loss_factory(teacher.base_model, student, **ARGUMENTS)
    with pytest.raises(ValueError, match="share one noise layer"):
        jigsaw_loss_factory(make_noisy_model(), student, **ARGUMENTS)
    zero = make_pair(scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="scale starts above 0"):
        jigsaw_loss_factory(*zero, **ARGUMENTS)
