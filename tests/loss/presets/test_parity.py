"""The same values and gradients as TextBrewer itself, to 1e-9 in float64, over random cases."""

import random

import pytest
import torch
from torch import Tensor

from sgfast.loss.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, PROJ_MAP, TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER
from tests.loss.presets import real

ATTENTION = ["attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"]
HIDDEN = ["hidden_mse", "cos", "pkd"]
PAIRS = ["fsp", "gram", "nst", "mmd"]
CASES = 40


def random_case(name: str, seed: int) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """The student's and the teacher's tensors and a mask of some kind."""
    torch.manual_seed(seed)
    chance = random.Random(f"{name} {seed}")
    batch, length, width, heads = (chance.randint(1, limit) for limit in (4, 9, 12, 5))
    width += name in ("cos", "pkd")  # a cosine of one dimension has no gradient but rounding
    kinds = (None, "bool", "int", "float", "double", "full")
    kind = chance.choice(kinds)
    scale = 10 ** chance.uniform(-3, 2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64) * scale

    if name in ATTENTION:
        by_heads = name in ("attention_mse_sum", "attention_ce_mean")
        flat = chance.random() < 0.4 and (by_heads or kind is None)
        teacher_heads = chance.randint(1, 5) if by_heads else heads
        student, teacher = (
            [draw(batch, length, length) if flat else draw(batch, count, length, length)]
            for count in (heads, teacher_heads)
        )
        if chance.random() < 0.3:
            student, teacher = [student[0].softmax(-1)], [teacher[0].softmax(-1)]
    elif name in PAIRS:
        widths = (width, chance.randint(1, 12))
        if name in ("fsp", "gram"):
            shapes = [widths, widths]
        else:
            shapes = [(width, width), (widths[1], widths[1])] if chance.random() < 0.5 else [(width, width)] * 2
        student, teacher = ([draw(batch, length, one) for one in shape] for shape in shapes)
    else:
        flat = name == "pkd" and chance.random() < 0.5
        student, teacher = ([draw(*((batch, width) if flat else (batch, length, width)))] for _ in range(2))
    same_shapes = [one.shape for one in student] == [one.shape for one in teacher]
    if same_shapes and chance.random() < 0.2:  # nearly equal sides, where differences of sums lose digits
        teacher = [one + 1e-3 * other for one, other in zip(student, teacher, strict=True)]
    return student, teacher, random_mask(kind, batch, length)


def random_mask(kind: str | None, batch: int, length: int) -> Tensor | None:
    """At least one token of every sample is selected: TextBrewer's own limit."""
    if kind is None:
        return None
    mask = torch.rand(batch, length) < 0.6
    mask[torch.arange(batch), torch.randint(length, (batch,))] = True
    if kind == "full":
        mask[:] = True
    return mask.to({"int": torch.long, "float": torch.float32, "double": torch.float64}.get(kind, torch.bool))


def value_and_gradients(loss, student: list[Tensor], teacher: list[Tensor], *arguments) -> list[Tensor]:
    leaves = [one.detach().clone().requires_grad_() for one in (*student, *teacher)]
    sides = leaves[: len(student)], leaves[len(student) :]
    if len(student) == 1:
        sides = sides[0][0], sides[1][0]
    value = loss(*sides, *arguments)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [
        value,
        *(torch.zeros_like(leaf) if one is None else one for one, leaf in zip(gradients, leaves, strict=True)),
    ]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert other.isfinite().all()
        # The second term is TextBrewer's own rounding where everything cancels (a saturated softmax, equal sides).
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * other.abs().max().item() + 1e-14)


@pytest.mark.parametrize("name", ATTENTION + HIDDEN + PAIRS)
def test_match_losses(name):
    for seed in range(CASES):
        student, teacher, mask = random_case(name, seed)
        expected = value_and_gradients(real.match_loss(name), student, teacher, mask)
        assert_close(value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, mask), expected)


@pytest.mark.parametrize("name", [name for name in MATCH_LOSS_MAP if name != "pkd"])  # which has no use for a mask
def test_a_mask_selects_and_does_not_weigh(name):
    """TextBrewer multiplies by some masks and compares others with 0: a fraction would mean two things."""
    student, teacher, _ = random_case(name, 1)
    sides = (student[0], teacher[0]) if len(student) == 1 else (student, teacher)
    mask = torch.full((student[0].shape[0], student[0].shape[-2]), 0.5)
    with pytest.raises(ValueError, match=r"mask must be bool, or numbers equal to 0 or 1; got 0\.5"):
        MATCH_LOSS_MAP[name](*sides, mask)


def random_temperature(chance: random.Random, rows: tuple[int, ...]) -> float | Tensor:
    return chance.choice([1, 4.0, torch.tensor(2.5), torch.rand(rows, dtype=torch.float64) + 0.5])


@pytest.mark.parametrize("name", ["mse", "ce"])
def test_kd_losses(name):
    for seed in range(CASES):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        shape = [chance.randint(1, 6) for _ in range(chance.choice([2, 3]))]
        student, teacher = ([torch.randn(shape, dtype=torch.float64) * 5] for _ in range(2))
        temperature = random_temperature(chance, tuple(shape[:-1]))
        expected = value_and_gradients(real.KD_LOSS_MAP[name], student, teacher, temperature)
        assert_close(value_and_gradients(KD_LOSS_MAP[name], student, teacher, temperature), expected)


@pytest.mark.parametrize("name", ["mse", "ce"])
def test_masked_kd_losses_equal_those_of_the_selected_rows(name):
    torch.manual_seed(0)
    student, teacher = ([torch.randn(3, 5, 7, dtype=torch.float64)] for _ in range(2))
    mask = torch.rand(3, 5) < 0.5
    temperature = torch.rand(3, 5, dtype=torch.float64) + 0.5
    expected = value_and_gradients(
        lambda s, t: real.KD_LOSS_MAP[name](s[mask], t[mask], temperature[mask]), student, teacher
    )
    student[0][~mask] = float("nan")
    found = value_and_gradients(lambda s, t: KD_LOSS_MAP[name](s, t, temperature, mask=mask), student, teacher)
    assert_close(found, expected)


@pytest.mark.parametrize(
    "scheduler", [["constant"], ["flsw", 1.5, 2], ["flsw", {"beta": 1, "gamma": 0.5}], ["cwsm", 3]]
)
def test_temperature_schedulers(scheduler):
    key = scheduler[0] if len(scheduler) == 1 else scheduler
    for seed in range(CASES):
        torch.manual_seed(seed)
        shape = (3, 5, 6) if seed % 2 else (4, 6)
        student, teacher = (torch.randn(shape, dtype=torch.float64) * 3 for _ in range(2))
        expected = real.TEMPERATURE_SCHEDULER[key](student, teacher, 4)
        found = TEMPERATURE_SCHEDULER[key](student, teacher, 4)
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-9, atol=1e-9)
        if seed % 2 and isinstance(found, Tensor):
            mask = torch.rand(3, 5) < 0.6
            masked = TEMPERATURE_SCHEDULER[key](student, teacher, 4, mask=mask)
            expected = real.TEMPERATURE_SCHEDULER[key](student[mask], teacher[mask], 4)
            torch.testing.assert_close(masked[mask], expected, rtol=1e-9, atol=1e-9)
            assert masked[~mask].eq(4).all()


def test_negative_temperatures_of_cwsm_reach_the_loss_as_they_are():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(16, 1000, dtype=torch.float64)] for _ in range(2))
    temperature = TEMPERATURE_SCHEDULER["cwsm", 1](*student, *teacher, 1)
    assert temperature.min() < 0
    for name in ("ce", "mse"):
        expected = value_and_gradients(real.KD_LOSS_MAP[name], student, teacher, temperature)
        assert_close(value_and_gradients(KD_LOSS_MAP[name], student, teacher, temperature), expected)


@pytest.mark.parametrize("name", ["linear", "relu", "tanh"])
def test_projections_start_from_the_same_weights(name):
    import textbrewer

    torch.manual_seed(0)
    expected = textbrewer.PROJ_MAP[name](5, 7)
    torch.manual_seed(0)
    found = PROJ_MAP[name](5, 7)
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    states = torch.randn(2, 3, 5)
    torch.testing.assert_close(found(states), expected(states), rtol=0, atol=0)


def test_weight_schedulers():
    import textbrewer

    assert WEIGHT_SCHEDULER.keys() == textbrewer.WEIGHT_SCHEDULER.keys()
    for name, scheduler in textbrewer.WEIGHT_SCHEDULER.items():
        assert [WEIGHT_SCHEDULER[name](x) for x in (0, 0.3, 1, 1.5)] == [scheduler(x) for x in (0, 0.3, 1, 1.5)]


def test_the_maps_have_textbrewers_keys():
    import textbrewer

    from sgfast.loss import presets

    assert textbrewer.ADAPTOR_KEYS == presets.ADAPTOR_KEYS
    for name in ("KD_LOSS_MAP", "MATCH_LOSS_MAP", "PROJ_MAP"):
        assert getattr(presets, name).keys() == getattr(textbrewer, name).keys()
    assert presets.TEMPERATURE_SCHEDULER.keys() == textbrewer.TEMPERATURE_SCHEDULER.store.keys()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["fsp", "nst"])
@pytest.mark.parametrize(("length", "width"), [(5, 70), (70, 5), (40, 40)], ids=["long", "wide", "square"])
def test_both_gram_forms_in_several_blocks(name, length, width, masked, monkeypatch):
    """Few bytes make many blocks; the sizes take the direct form or the dual one."""
    monkeypatch.setattr("sgfast.ops.rows.DEFAULT_CHUNK_BYTES", 4096)
    torch.manual_seed(length)
    student, teacher = ([torch.randn(2, length, width, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    mask = random_mask("double", 2, length) if masked else None
    expected = value_and_gradients(real.match_loss(name), student, teacher, mask)
    assert_close(value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, mask), expected)
