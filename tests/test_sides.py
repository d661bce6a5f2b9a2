"""Values that stand for logits: what they refuse when they are made."""

import dataclasses

import pytest
import torch

import sgfast
from sgfast import LinearLogits, divergences

HIDDEN, WEIGHT, BIAS = torch.ones(2, 3, 4), torch.ones(7, 4), torch.ones(7)


def test_shape_and_representation():
    side = LinearLogits(HIDDEN, WEIGHT, BIAS, scale=2.0, softcap=30.0)
    assert side.shape == (2, 3, 7)
    assert repr(side) == "LinearLogits(hidden=(2, 3, 4), weight=(7, 4), bias=(7,), scale=2.0, softcap=30.0)"
    assert repr(LinearLogits(HIDDEN, WEIGHT)) == "LinearLogits(hidden=(2, 3, 4), weight=(7, 4))"
    with pytest.raises(dataclasses.FrozenInstanceError):
        side.scale = 1.0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3.0, WEIGHT), {}, TypeError, "hidden must be a torch.Tensor; got float"),
        ((HIDDEN.long(), WEIGHT), {}, TypeError, "hidden must be float32"),
        ((torch.ones(()), WEIGHT), {}, ValueError, r"hidden must have shape \(\.\.\., D\)"),
        ((HIDDEN, WEIGHT[0]), {}, ValueError, r"weight must have shape \(V, D\)"),
        ((HIDDEN, WEIGHT.T), {}, ValueError, r"weight must be as wide as hidden, \(V, 4\); got \(4, 7\)"),
        ((HIDDEN, WEIGHT, BIAS[:3]), {}, ValueError, r"bias must have shape \(7,\); got \(3,\)"),
        ((HIDDEN, WEIGHT, BIAS.to("meta")), {}, ValueError, "bias and hidden must be on one device"),
        ((HIDDEN, WEIGHT), {"scale": 0}, ValueError, "scale must be finite and not 0; got 0"),
        ((HIDDEN, WEIGHT), {"scale": float("inf")}, ValueError, "scale must be finite"),
        ((HIDDEN, WEIGHT), {"scale": "2"}, TypeError, "scale must be a number; got str"),
        ((HIDDEN, WEIGHT), {"softcap": 0.0}, ValueError, "softcap must be None, or positive and finite; got 0.0"),
        ((HIDDEN, WEIGHT), {"softcap": True}, TypeError, "softcap must be a number; got bool"),
    ],
)
def test_what_a_linear_side_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message) as raised:
        LinearLogits(*arguments, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (LinearLogits(HIDDEN[:1], WEIGHT), r"logits of one shape; got \(2, 3, 7\) and \(1, 3, 7\)"),
        (LinearLogits(HIDDEN, WEIGHT[:5]), r"logits of one shape; got \(2, 3, 7\) and \(2, 3, 5\)"),
        (torch.ones(2, 3, 8), r"logits of one shape; got \(2, 3, 7\) and \(2, 3, 8\)"),
        (LinearLogits(HIDDEN, WEIGHT).hidden.to("meta").new_ones(2, 3, 7), "must hold values; got a meta tensor"),
    ],
)
def test_sides_that_do_not_fit(clean, message):
    with pytest.raises((ValueError, TypeError), match=message):
        divergences(LinearLogits(HIDDEN, WEIGHT), clean, "jeffreys")


def test_arguments_fit_the_rows_of_hidden_states():
    side = LinearLogits(HIDDEN, WEIGHT)
    with pytest.raises(
        ValueError, match=r"mask must have the shape of noisy_logits without its last dimension, \(2, 3\)"
    ):
        divergences(side, side, "jeffreys", mask=torch.ones(3))
    with pytest.raises(ValueError, match="labels must be less than the vocabulary's size, 7; got 9"):
        divergences(side, side, "jeffreys", labels=torch.full((2, 3), 9))
    with pytest.raises(ValueError, match="top_k"):
        divergences(side, side, "jeffreys", top_k=8)
    with pytest.raises(ValueError, match="student and teacher have 7 and 5 columns"):
        sgfast.DivergenceLoss("jeffreys")(side, LinearLogits(HIDDEN, WEIGHT[:5]))
