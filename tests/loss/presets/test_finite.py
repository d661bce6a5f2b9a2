"""Finite, and right, where TextBrewer gives NaN."""

import math

import pytest
import torch
from torch import Tensor

from sgfast.loss.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, TEMPERATURE_SCHEDULER
from tests.loss.presets.test_parity import ATTENTION, HIDDEN, PAIRS, value_and_gradients

NAMES = ATTENTION + HIDDEN + PAIRS
INF = math.inf


def states(name: str, *, batch: int = 3, length: int = 6, width: int = 8, dtype=torch.float64):
    torch.manual_seed(0)
    shape = (batch, 2, length, length) if name in ATTENTION else (batch, length, width)
    count = 2 if name in PAIRS else 1
    student, teacher = ([torch.randn(shape).to(dtype) for _ in range(count)] for _ in range(2))
    return student, teacher


def assert_finite(found: list[Tensor]) -> None:
    assert all(one.isfinite().all() for one in found)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pkd"])
def test_a_mask_of_zeros_gives_zero_and_zero_gradients(name):
    student, teacher = states(name)
    for found in value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, torch.zeros(3, 6)):
        assert found.eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_samples_give_zero(name):
    student, teacher = states(name, batch=0)
    assert MATCH_LOSS_MAP[name](*((student, teacher) if name in PAIRS else (student[0], teacher[0]))) == 0


@pytest.mark.parametrize("name", ["mse", "ce"])
def test_no_rows_give_zero(name):
    value, *gradients = value_and_gradients(
        lambda s, t: KD_LOSS_MAP[name](s, t, mask=torch.zeros(2)), [torch.randn(2, 5)], [torch.randn(2, 5)]
    )
    assert value == 0
    assert all(gradient.eq(0).all() for gradient in gradients)
    assert KD_LOSS_MAP[name](torch.randn(0, 5), torch.randn(0, 5)) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pkd"])
def test_an_empty_sample_counts_as_if_it_were_not_there(name):
    student, teacher = states(name)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0] * 6, [1, 1, 0, 0, 0, 0]])
    found = value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, mask)
    kept = [[one[[0, 2]] for one in side] for side in (student, teacher)]
    expected = value_and_gradients(MATCH_LOSS_MAP[name], *kept, mask[[0, 2]])
    # The feature Gram matrices are averaged over all samples, an empty one being 0.
    share = 2 / 3 if name in ("fsp", "gram") else 1
    torch.testing.assert_close(found[0], expected[0] * share)
    for gradient, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient[[0, 2]], other * share)
        assert gradient[1].eq(0).all()


@pytest.mark.parametrize("planted", [float("nan"), INF, -INF])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "pkd"])
def test_nothing_at_a_masked_position_has_an_effect(name, planted):
    student, teacher = states(name)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0]]) != 0
    if name in ATTENTION:  # a masked key's score is in the softmax: −inf is one that takes no part
        for one in (*student, *teacher):
            one.permute(0, 3, 1, 2)[~mask] = -INF
    expected = value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, mask)
    assert_finite(expected)
    for one in (*student, *teacher):
        if name in ATTENTION:
            one.permute(0, 3, 1, 2)[~mask] = planted
            one.permute(0, 2, 1, 3)[~mask] = planted
        else:
            one[~mask] = planted
    torch.testing.assert_close(value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, mask), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_causal_scores(name, masked):
    """A score of −inf is compared on neither side, and the value is that of the columns that are left."""
    student, teacher = ([one.abs() for one in side] for side in states(name))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = torch.ones(3, 6) if masked else None
    found = value_and_gradients(
        MATCH_LOSS_MAP[name],
        *([one.masked_fill(~causal, -INF) for one in side] for side in (student, teacher)),
        mask,
    )
    assert_finite(found)
    s, t = student[0], teacher[0]
    if name.endswith("_sum"):
        s, t = s.sum(1), t.sum(1)
    if name.endswith("_mean"):
        s, t = s.mean(1), t.mean(1)
    rows = []
    for query in range(6):
        one, other = s[..., query, : query + 1], t[..., query, : query + 1]
        squares, surprise = (one - other).square().sum(-1) / 6, -(other.softmax(-1) * one.log_softmax(-1)).sum(-1)
        rows.append((squares if "mse" in name else surprise).mean())
    torch.testing.assert_close(found[0], torch.stack(rows).mean())


@pytest.mark.parametrize("name", ATTENTION)
def test_rows_of_nothing_but_minus_infinity(name):
    student, teacher = states(name)
    for one in (*student, *teacher):
        one[:, :, 2] = -INF
    for mask in (None, torch.ones(3, 6)):
        found = value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, mask)
        assert_finite(found)
        assert all(gradient[:, :, 2].eq(0).all() for gradient in found[1:])
        assert found[0] > 0


@pytest.mark.parametrize("name", ATTENTION)
def test_minus_infinity_on_one_side(name):
    student, teacher = states(name)
    student[0][:, :, :, 1], teacher[0][:, :, :, 3] = -INF, -INF
    for mask in (None, torch.ones(3, 6)):
        assert_finite(value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, mask))


def test_minus_infinity_in_logits():
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 6, dtype=torch.float64) for _ in range(2))
    both = torch.tensor([0, 0, 1, 0, 0, 1]) != 0
    found = {
        name: value_and_gradients(loss, [student.masked_fill(both, -INF)], [teacher.masked_fill(both, -INF)])
        for name, loss in KD_LOSS_MAP.items()
    }
    expected = {
        name: value_and_gradients(loss, [student[:, ~both]], [teacher[:, ~both]]) for name, loss in KD_LOSS_MAP.items()
    }
    torch.testing.assert_close(found["ce"][0], expected["ce"][0])
    torch.testing.assert_close(found["mse"][0], expected["mse"][0] * 4 / 6)
    for name, gradients in found.items():
        assert_finite(gradients)
        share = 1 if name == "ce" else 4 / 6
        torch.testing.assert_close(gradients[1][:, ~both], expected[name][1] * share)
        assert gradients[1][:, both].eq(0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_600_tokens(name, dtype):
    """Computed in float32, so as exact as the inputs: TextBrewer's counts overflow at 256 tokens in float16."""
    student, teacher = ([4 * one for one in side] for side in states(name, batch=2, length=600, dtype=dtype))
    mask = torch.ones(2, 600)
    mask[1, 500:] = 0
    found = value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, mask)
    wide = ([one.double() for one in side] for side in (student, teacher))
    expected = value_and_gradients(MATCH_LOSS_MAP[name], *wide, mask)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * len(student[0].flatten()) ** 0.5
    for gradient, other in zip(found[1:], expected[1:], strict=True):
        assert gradient.dtype == dtype
        # One rounding of the result, and what float32 leaves where large terms cancel.
        assert (gradient.double() - other).abs().max() <= torch.finfo(dtype).eps * other.abs().max() + smallest
        assert (gradient.double() - other).norm() <= torch.finfo(dtype).eps * other.norm() + smallest


@pytest.mark.parametrize("name", ["hidden_mse", "cos", "fsp", "nst"])
def test_large_half_precision_states(name):
    student, teacher = ([1000 * one for one in side] for side in states(name, dtype=torch.float16))
    value, *_ = value_and_gradients(MATCH_LOSS_MAP[name], student, teacher, torch.ones(3, 6))
    wide = ([one.double() for one in side] for side in (student, teacher))
    expected, *_ = value_and_gradients(MATCH_LOSS_MAP[name], *wide, torch.ones(3, 6))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "value"), [("cos", 1.0), ("pkd", 2.0)])
def test_zero_vectors(name, value):
    student, teacher = states(name)
    student[0].zero_()
    found = value_and_gradients(MATCH_LOSS_MAP[name], student, teacher)
    assert found[0] == value
    assert all(gradient.eq(0).all() for gradient in found[1:])
    teacher[0].zero_()
    assert_finite(value_and_gradients(MATCH_LOSS_MAP[name], student, teacher))


@pytest.mark.parametrize("name", [name for name in NAMES if "ce" not in name.split("_")])
def test_equal_sides_give_exactly_zero(name):
    student, _ = states(name, dtype=torch.float32)
    value, *gradients = value_and_gradients(MATCH_LOSS_MAP[name], student, student, torch.ones(3, 6))
    # What TextBrewer adds to the norms of a cosine keeps it this far from 0.
    assert 0 <= value < 1e-12 if name == "cos" else value == 0
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_flsw_survives_equal_rows_and_a_fractional_exponent():
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 1000
    temperature = TEMPERATURE_SCHEDULER["flsw", 1, 0.5](logits, logits, 4)
    torch.testing.assert_close(temperature, torch.full((64,), 4.0), atol=1e-2, rtol=0)


def test_schedulers_with_minus_infinity_and_empty_masks():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = -INF
    for key in (("flsw", 1, 1), ("cwsm", 1)):
        assert TEMPERATURE_SCHEDULER[key](logits, logits + 1, 4).isfinite().all()
        assert TEMPERATURE_SCHEDULER[key](logits, logits + 1, 4, mask=torch.zeros(4)).eq(4).all()


def test_min_temperature():
    logits = torch.randn(64, 32000, generator=torch.Generator().manual_seed(0))
    plain = TEMPERATURE_SCHEDULER["cwsm", 1](logits, logits, 4)
    assert plain.min() < 0
    floored = TEMPERATURE_SCHEDULER[["cwsm", {"beta": 1, "min_temperature": 0.5}]](logits, logits, 4)
    assert floored.equal(plain.clamp(min=0.5))
