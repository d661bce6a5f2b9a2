"""Sizes and ranks that do not fit raise; TextBrewer broadcasts many of them."""

import pytest
import torch

from sgfast.loss.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, TEMPERATURE_SCHEDULER, register_new
from tests.loss.presets.test_parity import ATTENTION

A = torch.rand(3, 2, 4, 4)
FLAT = torch.rand(3, 4, 4)
H = torch.rand(3, 4, 5)
MASK = torch.ones(3, 4)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(
    ("student", "teacher", "mask", "message"),
    [
        (A, FLAT, None, "attention_S and attention_T|needs attention_T"),
        (FLAT[:1], A[:1], None, "attention_S and attention_T|needs attention_S"),
        (A, A[:1], None, "got .* and .*1, 2, 4, 4"),
        (A, A[:, :, :, :1], None, "got .* and .*3, 2, 4, 1"),
        (A[0, 0], A[0, 0], None, r"of shape .*; got \(4, 4\)"),
        (A[:, :, :, :0], A[:, :, :, :0], None, "attention_S and attention_T"),
        (A, A, torch.ones(3), r"mask must have shape \(3, 4\).*; got \(3,\)"),
        (A, A, torch.ones(1, 4), r"mask must have shape \(3, 4\).*; got \(1, 4\)"),
        (A, A, torch.ones(3, 1), r"mask must have shape \(3, 4\).*; got \(3, 1\)"),
        (A[:, :, :2], A[:, :, :2], MASK, "as many queries as keys"),
        (A, A, [1], "mask must be a torch.Tensor or None"),
        (A.long(), A, None, "attention_S must be float32"),
        (A, A.to("meta"), None, "one device"),
        (A, A, MASK.to("meta"), "one device"),
    ],
)
def test_attention(name, student, teacher, mask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MATCH_LOSS_MAP[name](student, teacher, mask)


@pytest.mark.parametrize("name", ["attention_mse", "attention_ce"])
def test_attention_by_head_needs_heads_where_there_is_a_mask(name):
    """TextBrewer broadcasts the batch against the mask where B = L, and takes a lone sample."""
    for batch in (1, 4):
        with pytest.raises(ValueError, match=r"of shape \(B, H, L, L\); got"):
            MATCH_LOSS_MAP[name](torch.rand(batch, 4, 4), torch.rand(batch, 4, 4), torch.ones(batch, 4))
    with pytest.raises(ValueError, match="must have one shape"):
        MATCH_LOSS_MAP[name](A, torch.rand(3, 1, 4, 4))


@pytest.mark.parametrize("name", ["hidden_mse", "cos"])
@pytest.mark.parametrize(
    ("student", "teacher", "mask", "message"),
    [
        (H, H[:, :, :1], None, r"one shape; got \(3, 4, 5\) and \(3, 4, 1\)"),
        (H, H[:1], None, "one shape"),
        (H, H[0], None, "one shape"),
        (H, H, torch.ones(3), "mask must have shape"),
        (H, H, torch.ones(1, 4), "mask must have shape"),
        (H[0], H[0], MASK, "mask must have shape"),
        (H.long(), H, None, "state_S must be float32"),
        (H, [1.0], None, "state_T must be a torch.Tensor"),
    ],
)
def test_hidden(name, student, teacher, mask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MATCH_LOSS_MAP[name](student, teacher, mask)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (H, H[:, :, :1], "one shape"),
        (H, H[:1, 0], "one shape"),
        (H[0, 0], H[0, 0], r"of shape \(B, L, D\) or \(B, D\); got \(5,\)"),
        (H[:, :0], H, "pkd needs state_S"),
    ],
)
def test_pkd(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        MATCH_LOSS_MAP["pkd"](student, teacher)


@pytest.mark.parametrize("name", ["fsp", "nst"])
@pytest.mark.parametrize(
    ("student", "teacher", "mask", "message"),
    [
        (H, [H, H], None, "state_S as a list of two layers; got a tensor"),
        ([H, H], [H], None, "state_T as a list of two layers; got 1 layers"),
        ([H, H[:, :2]], [H, H], None, r"state_S\[1\] has \(3, 2, 5\)"),
        ([H, H], [H[:1], H], None, r"state_T\[0\] has \(1, 4, 5\)"),
        ([H, H], [H, H[0]], None, r"state_T\[1\] has \(4, 5\)"),
        ([H, H], [H, H], torch.ones(3), "mask must have shape"),
        ([H, H], [H, H.int()], None, r"state_T\[1\] must be float32"),
    ],
)
def test_pairs(name, student, teacher, mask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MATCH_LOSS_MAP[name](student, teacher, mask)


def test_widths_of_pairs():
    with pytest.raises(ValueError, match=r"state_S\[0\] and state_T\[0\] must have one shape"):
        MATCH_LOSS_MAP["fsp"]([H, H], [H[:, :, :1], H])
    with pytest.raises(ValueError, match=r"state_S\[0\] and state_S\[1\] must have one shape"):
        MATCH_LOSS_MAP["nst"]([H, H[:, :, :1]], [H, H])


@pytest.mark.parametrize("name", ["mse", "ce"])
@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        (H, H[..., :1], 1, "one shape"),
        (H, H[:1], 1, "one shape"),
        (H, H, torch.ones(4), r"temperature must be a number or have the row shape \(3, 4\); got \(4,\)"),
        (H, H, torch.ones(3, 4, 1), "temperature must be"),
        (H, H, 0, "temperature must be positive and finite; got 0"),
        (H, H, -1.0, "temperature must be positive"),
        (H.long(), H, 1, "logits_S must be float32"),
    ],
)
def test_logits(name, student, teacher, temperature, message):
    with pytest.raises((ValueError, TypeError), match=message):
        KD_LOSS_MAP[name](student, teacher, temperature)
    with pytest.raises(ValueError, match="mask must have the shape"):
        KD_LOSS_MAP[name](H, H, mask=torch.ones(3))


def test_schedulers():
    with pytest.raises(TypeError, match="beta"):
        TEMPERATURE_SCHEDULER["flsw",]
    with pytest.raises(ValueError, match="min_temperature must be positive"):
        TEMPERATURE_SCHEDULER["cwsm", {"beta": 1, "min_temperature": 0}]
    with pytest.raises(ValueError, match="one shape"):
        TEMPERATURE_SCHEDULER["cwsm", 1](H, H[:1], 4)
    with pytest.raises(KeyError):
        TEMPERATURE_SCHEDULER["linear"]


def test_register_new():
    with pytest.raises(ValueError, match="map_name must be one of kd_loss"):
        register_new("kd", "mine", len)
    with pytest.raises(TypeError, match="func must be callable"):
        register_new("kd_loss", "mine", 3)
    for map_name in ("match_loss", "match_Loss"):
        register_new(map_name, "mine", len)
        assert MATCH_LOSS_MAP.pop("mine") is len
    register_new("temperature_scheduler", "mine", len)
    assert "mine" in TEMPERATURE_SCHEDULER
    assert ["mine", 3] in TEMPERATURE_SCHEDULER
    assert TEMPERATURE_SCHEDULER.pop("mine") is len
