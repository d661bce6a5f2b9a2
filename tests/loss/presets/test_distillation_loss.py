"""Configuration and the module, against TextBrewer's GeneralDistiller."""

import copy
import json
import random

import pytest
import torch
from torch import Tensor

from sgfast.loss.presets import (
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    TEMPERATURE_SCHEDULER,
    DistillationConfig,
    DistillationLoss,
)
from tests.loss.presets import real

BATCH, LENGTH, CLASSES = 3, 5, 7


def outputs(seed: int, width: int, *, heads: int | None = None, mask: Tensor | None = None, labelled: bool = False):
    """An adaptor's dictionary, with three layers of hidden states and attentions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    logits = [draw(BATCH, LENGTH, CLASSES) for _ in range(heads or 1)]
    found = {
        "logits": logits if heads else logits[0],
        "hidden": [draw(BATCH, LENGTH, width) for _ in range(3)],
        "attention": [draw(BATCH, 2, LENGTH, LENGTH) for _ in range(3)],
        "losses": [draw(4), draw()],
    }
    if mask is not None:
        found["logits_mask"] = [mask] * (heads or 1)
        found["inputs_mask"] = mask
    if labelled:
        labels = torch.randint(-1, CLASSES, (BATCH, LENGTH), generator=generator)
        found["labels"] = [labels] * (heads or 1)
    return found


def leaves(*sides: dict) -> list[Tensor]:
    return [one for side in sides for key in ("hidden", "attention") for one in side[key]] + [
        one for side in sides for one in (side["logits"] if isinstance(side["logits"], list) else [side["logits"]])
    ]


MATCHES = [
    {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 0.5, "proj": ["linear", 4, 6]},
    {"layer_T": 1, "layer_S": 0, "feature": "hidden", "loss": "cos", "weight": 2, "proj": ["tanh", 4, 6]},
    {"layer_T": 0, "layer_S": 2, "feature": "attention", "loss": "attention_ce", "weight": 0.1},
    {"layer_T": [0, 1], "layer_S": [1, 2], "feature": "hidden", "loss": "fsp", "weight": 1, "proj": ["relu", 4, 6]},
    {
        "layer_T": [0, 2],
        "layer_S": [0, 2],
        "feature": "hidden",
        "loss": "gram",
        "weight": -0.3,
        "proj": ["linear", 4, 6],
    },
]


@pytest.mark.parametrize("seed", range(12))
def test_the_same_total_components_and_gradients(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    heads = chance.choice([None, 2])
    mask = (torch.rand(BATCH, LENGTH) < 0.6) if chance.random() < 0.6 else None
    if mask is not None:
        mask[:, 0] = True
    # With a logits mask TextBrewer indexes the selected rows with unselected labels and raises.
    shift = mask is None and chance.random() < 0.5
    student = outputs(seed, 4, heads=heads, mask=mask, labelled=shift)
    teacher = outputs(seed + 100, 6, heads=heads, mask=mask)
    config = {
        "temperature": chance.choice([1, 4, 2.5]),
        "temperature_scheduler": chance.choice(["none", "constant", ["flsw", 0.5, 1], ["cwsm", 0.1]]),
        "hard_label_weight": chance.choice([0, 0.3]),
        "kd_loss_type": chance.choice(["ce", "mse"]),
        "kd_loss_weight": chance.choice([1, 0.7]),
        "probability_shift": shift,
        "intermediate_matches": copy.deepcopy(chance.sample(MATCHES, 3)),
    }
    loss = DistillationLoss(DistillationConfig.from_dict(config)).double()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    total, components = loss(student, teacher)
    parameters = list(loss.parameters())
    inputs = [*leaves(student, teacher), *student["losses"], *parameters]
    found = torch.autograd.grad(total, inputs, allow_unused=True)

    projections = [
        loss.projections[str(index)] if match.get("proj") else None
        for index, match in enumerate(config["intermediate_matches"])
    ]
    expected_total, expected_components = real.distiller(config, projections).compute_loss(
        real.adapted(student), real.adapted(teacher)
    )
    expected = torch.autograd.grad(expected_total, inputs, allow_unused=True)
    torch.testing.assert_close(total, expected_total, rtol=1e-9, atol=1e-9)
    assert components.keys() == expected_components.keys()
    for name, component in expected_components.items():
        torch.testing.assert_close(components[name], component.detach(), rtol=1e-9, atol=1e-9)
        assert not components[name].requires_grad
    for one, other in zip(found, expected, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        one, other = (zero if gradient is None else gradient for gradient in (one, other))
        torch.testing.assert_close(one.expand_as(other + one), (other + 0 * one), rtol=1e-9, atol=1e-9)


def test_outputs_are_not_written_to():
    student, teacher = outputs(0, 6, labelled=True), outputs(1, 6)
    student["labels"] = student["labels"][0]
    before = teacher["logits"].detach().clone()
    keys = dict(student)
    DistillationLoss(DistillationConfig(probability_shift=True))(student, teacher)
    assert teacher["logits"].equal(before)
    assert student == keys


def kd(student: dict, teacher: dict, **config) -> Tensor:
    return DistillationLoss(DistillationConfig(**config))(student, teacher)[1]["unweighted_kd_loss"]


@pytest.mark.parametrize("scheduler", ["none", ["flsw", 1, 1]])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_each_side_may_select_its_own_rows(loss, scheduler):
    """A left-padded teacher beside a right-padded student: the n-th selected row meets the n-th."""
    student, teacher = outputs(0, 6), outputs(1, 6)
    left, right = torch.tensor([0, 0, 1, 1, 1]) != 0, torch.tensor([1, 1, 1, 0, 0]) != 0
    student["logits_mask"], teacher["logits_mask"] = right.expand(3, 5), left.expand(3, 5)
    cut = {"logits": student["logits"][:, :3]}, {"logits": teacher["logits"][:, 2:]}
    options = {"kd_loss_type": loss, "temperature_scheduler": scheduler}
    torch.testing.assert_close(kd(student, teacher, **options), kd(*cut, **options))
    # The teacher's rows may also come selected.
    teacher = {"logits": teacher["logits"][:, 2:].reshape(-1, CLASSES)}
    torch.testing.assert_close(kd(student, teacher, **options), kd(*cut, **options))


def test_one_mask_serves_every_head_and_either_side():
    """TextBrewer raises from the second head on, and where one side alone has a mask."""
    mask = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    student, teacher = outputs(0, 6, heads=2), outputs(1, 6, heads=2)
    expected = sum(
        kd({"logits": s[mask]}, {"logits": t[mask]}) for s, t in zip(student["logits"], teacher["logits"], strict=True)
    )
    torch.testing.assert_close(kd(student | {"logits_mask": mask}, teacher | {"logits_mask": mask}), expected)
    torch.testing.assert_close(kd(student | {"logits_mask": mask}, teacher), expected)
    torch.testing.assert_close(kd(student, teacher | {"logits_mask": [mask, mask.clone()]}), expected)


def test_probability_shift_with_a_mask_and_ignored_labels():
    """Both raise in TextBrewer."""
    mask = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    student, teacher = outputs(0, 6, labelled=True), outputs(1, 6)
    labels = student["labels"][0]
    options = {"probability_shift": True, "temperature_scheduler": ["flsw", 1, 1]}
    found = kd(student | {"logits_mask": mask}, teacher | {"logits_mask": mask}, **options)
    flat = ({"logits": student["logits"][mask], "labels": labels[mask]}, {"logits": teacher["logits"][mask]})
    torch.testing.assert_close(found, kd(*flat, **options))
    kept = labels >= 0
    by_label = teacher["logits"].detach().clone()
    for sample, position in kept.nonzero():
        row, label = by_label[sample, position], labels[sample, position]
        largest = row.argmax()
        row[label], row[largest] = row[largest].item(), row[label].item()
    torch.testing.assert_close(
        found, kd(student | {"logits_mask": mask}, {"logits": by_label}, temperature_scheduler=["flsw", 1, 1])
    )


def test_users_functions_are_given_the_selected_rows():
    mask = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    student, teacher = outputs(0, 6, mask=mask), outputs(1, 6, mask=mask)
    KD_LOSS_MAP["mine"] = lambda s, t, temperature: (s - t).abs().mean() * temperature
    MATCH_LOSS_MAP["mine"] = lambda s, t, mask=None: (s - t).abs()[mask].mean()
    TEMPERATURE_SCHEDULER["mine"] = lambda s, t, base: base + s.shape[0]
    try:
        match = {"layer_T": 0, "layer_S": 1, "feature": "hidden", "loss": "mine", "weight": 1}
        loss = DistillationLoss(
            DistillationConfig(kd_loss_type="mine", temperature_scheduler="mine", intermediate_matches=[match])
        )
        total, components = loss(student, teacher)
    finally:
        for registry in (KD_LOSS_MAP, MATCH_LOSS_MAP, TEMPERATURE_SCHEDULER):
            del registry["mine"]
    hidden = (student["hidden"][1] - teacher["hidden"][0]).abs()[mask].mean()
    logits = (student["logits"][mask] - teacher["logits"][mask]).abs().mean() * (4 + mask.sum())
    torch.testing.assert_close(components["unweighted_hidden_mine_1_0"], hidden)
    torch.testing.assert_close(total, hidden + logits)


def test_min_temperature_floors_any_scheduler():
    student, teacher = outputs(0, 6), outputs(1, 6)
    plain = TEMPERATURE_SCHEDULER["cwsm", 3](student["logits"], teacher["logits"], 4)
    assert plain.min() < 3.5
    expected = KD_LOSS_MAP["ce"](student["logits"], teacher["logits"], plain.clamp(min=3.5))
    torch.testing.assert_close(kd(student, teacher, temperature_scheduler=["cwsm", 3], min_temperature=3.5), expected)
    assert kd(student, teacher, temperature_scheduler="constant", min_temperature=8) == kd(
        student, teacher, temperature=8
    )


def test_weight_schedulers_scale_or_overwrite():
    config = {
        "kd_loss_weight": 0.8,
        "kd_loss_weight_scheduler": "linear_decay",
        "hard_label_weight": 0.5,
        "hard_label_weight_scheduler": "linear_growth",
    }
    student, teacher = outputs(0, 6), outputs(1, 6)

    def weights(loss: DistillationLoss) -> tuple[Tensor, Tensor]:
        total, components = loss(student, teacher)
        return torch.autograd.grad(total, student["losses"][1])[0], (
            total - components["unweighted_hard_label_loss"] * loss.hard_label_weight
        ) / components["unweighted_kd_loss"]

    scaling = DistillationLoss(DistillationConfig(**config))
    overwriting = DistillationLoss(DistillationConfig(**config, overwrite_scheduled_weights=True))
    torch.testing.assert_close(weights(scaling), tuple(torch.tensor([0.0, 0.8], dtype=torch.float64)))
    torch.testing.assert_close(weights(overwriting), tuple(torch.tensor([0.5, 0.8], dtype=torch.float64)))
    for loss in (scaling, overwriting):
        loss.set_progress(0.25)
    torch.testing.assert_close(weights(scaling), tuple(torch.tensor([0.125, 0.6], dtype=torch.float64)))
    torch.testing.assert_close(weights(overwriting), tuple(torch.tensor([0.25, 0.75], dtype=torch.float64)))

    resumed = DistillationLoss(DistillationConfig(**config))
    resumed.load_state_dict(scaling.state_dict())
    torch.testing.assert_close(weights(resumed), weights(scaling))
    # The user's configuration is not written to, so that a second training starts from its weights.
    assert (scaling.config.kd_loss_weight, overwriting.config.kd_loss_weight) == (0.8, 0.8)


def test_a_weight_of_zero_keeps_an_infinite_component_out():
    student = {"logits": torch.zeros(2, 3), "losses": torch.tensor(float("inf"))}
    total, components = DistillationLoss(DistillationConfig())(student, {"logits": torch.ones(2, 3)})
    assert total.isfinite()
    assert components["unweighted_hard_label_loss"].isinf()


def test_repeated_matches_keep_their_names_apart():
    match = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "cos", "weight": 1}
    loss = DistillationLoss(DistillationConfig(intermediate_matches=[match, match]))
    _, components = loss(outputs(0, 6), outputs(1, 6))
    assert {"unweighted_hidden_cos_0_0", "unweighted_hidden_cos_0_0_2"} < components.keys()


def test_projections_are_parameters_in_half_precision_too():
    loss = DistillationLoss(DistillationConfig(intermediate_matches=MATCHES))
    assert {"projections.0.weight", "projections.1.0.bias", "projections.3.0.weight"} < loss.state_dict().keys()
    student, teacher = (
        {key: [one.detach().bfloat16() for one in side[key]] for key in ("hidden", "attention")}
        for side in (outputs(0, 4), outputs(1, 6))
    )
    total, _ = loss(student, teacher)
    total.backward()
    assert total.dtype == torch.float32
    assert all(parameter.grad.norm() > 0 for parameter in loss.parameters())


def test_parameter_groups():
    proj = ["linear", 4, 6, {"lr": 0.5}]
    loss = DistillationLoss(
        DistillationConfig(intermediate_matches=[MATCHES[2], MATCHES[0] | {"proj": proj}, MATCHES[1]])
    )
    first, second = loss.parameter_groups()
    assert first == {"params": list(loss.projections["1"].parameters()), "lr": 0.5}
    assert second == {"params": list(loss.projections["2"].parameters())}
    assert torch.optim.SGD([first, second], lr=0.1).param_groups[0]["lr"] == 0.5
    assert MATCHES[1]["proj"] == ["tanh", 4, 6]


def test_config_from_json(tmp_path):
    path = tmp_path / "distil.json"
    values = {"temperature": 8, "temperature_scheduler": ["flsw", 1, 2], "intermediate_matches": MATCHES}
    path.write_text(json.dumps(values))
    assert DistillationConfig.from_json_file(path) == DistillationConfig.from_dict(values)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"distil\.json is not JSON"):
        DistillationConfig.from_json_file(str(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a dictionary; got list"):
        DistillationConfig.from_json_file(path)


MATCH = MATCHES[0]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"temprature": 3}, ValueError, "unknown keys temprature; a DistillationConfig has temperature"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"temperature": "4"}, TypeError, "temperature must be a number"),
        ({"min_temperature": -1}, ValueError, "min_temperature must be positive"),
        ({"kd_loss_weight": float("nan")}, ValueError, "kd_loss_weight must be finite"),
        ({"hard_label_weight": "1"}, TypeError, "hard_label_weight must be a number"),
        ({"kd_loss_weight_scheduler": "cosine"}, ValueError, "must be 'none' or one of linear_decay, linear_growth"),
        ({"temperature_scheduler": "hot"}, ValueError, "temperature_scheduler must be 'none' or among constant, flsw"),
        ({"temperature_scheduler": "flsw"}, ValueError, r"needs parameters: \['flsw', beta, gamma\]"),
        ({"temperature_scheduler": ["flsw", 1]}, TypeError, "gamma"),
        ({"intermediate_matches": [3]}, TypeError, r"intermediate_matches\[0\] must be a dictionary"),
        ({"intermediate_matches": [{"layer_T": 0}]}, ValueError, "missing: layer_S, feature, loss, weight"),
        ({"intermediate_matches": [MATCH | {"wieght": 1}]}, ValueError, "unknown: wieght"),
        ({"intermediate_matches": [MATCH | {"feature": "logits"}]}, ValueError, "feature must be one of hidden"),
        ({"intermediate_matches": [MATCH | {"layer_T": "0"}]}, TypeError, "layer_T must be an int or a list"),
        ({"intermediate_matches": [MATCH | {"layer_T": [0, 1]}]}, ValueError, "both be ints or both lists"),
        ({"intermediate_matches": [MATCH | {"proj": ["linear", 4]}]}, ValueError, "proj must be"),
        (
            {"intermediate_matches": [MATCH | {"proj": ["gelu", 4, 6]}]},
            ValueError,
            "proj must start with one of linear",
        ),
        ({"intermediate_matches": [MATCH | {"proj": ["linear", 4, 6, 0.1]}]}, TypeError, "options in proj"),
        ({"kd_loss_type": "kl"}, ValueError, "kd_loss_type must be one of mse, ce; got 'kl'"),
        (
            {"intermediate_matches": [MATCH | {"loss": "l1"}]},
            ValueError,
            r"intermediate_matches\[0\]: loss must be one of",
        ),
        ({"kd_loss_weight": 0}, ValueError, "nothing to minimise"),
    ],
)
def test_config_errors(values, error, message):
    with pytest.raises(error, match=message):
        DistillationLoss(DistillationConfig.from_dict(values))


S, T = outputs(0, 4), outputs(1, 6)


@pytest.mark.parametrize(
    ("student", "teacher", "config", "error", "message"),
    [
        (S["logits"], T, {}, TypeError, "student_outputs must be a dictionary"),
        ({}, T, {}, ValueError, "nothing to compute"),
        (S | {"logits": [S["logits"]] * 2}, T, {}, ValueError, "2 heads of logits, the teacher 1"),
        (S | {"logits_mask": torch.ones(3)}, T, {}, ValueError, "logits_mask must have shape"),
        (S | {"logits_mask": [torch.ones(3, 5)] * 2}, T, {}, ValueError, "one for each of 1 heads; got 2"),
        (S, T, {"probability_shift": True}, ValueError, "needs 'labels'"),
        (S | {"labels": torch.zeros(3)}, T, {"probability_shift": True}, ValueError, "labels must have shape"),
        (
            {"logits": S["logits"]},
            T,
            {"intermediate_matches": [MATCH]},
            ValueError,
            "student's outputs have no 'hidden'",
        ),
        (S, T | {"hidden": []}, {"intermediate_matches": [MATCH]}, ValueError, "teacher's 'hidden' has 0 layers; got"),
        (T, T, {"intermediate_matches": [MATCH]}, ValueError, "proj expects a student width of 4"),
    ],
)
def test_outputs_errors(student, teacher, config, error, message):
    with pytest.raises(error, match=message):
        DistillationLoss(DistillationConfig(**config))(student, teacher)
