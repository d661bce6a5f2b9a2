"""Schedules of the losses' weights over training, and of the temperature from row to row.

A temperature scheduler is ``f(logits_S, logits_T, base_temperature)`` → a number or a tensor of the row shape. `flsw`
and `cwsm` are from "Preparing Lessons: Improve Knowledge Distillation with Better Supervision" (arXiv:1911.07471). The
mean of their temperatures is the base temperature. A single temperature may fall below 0. With the vocabulary of a
language model, ``cwsm`` gives temperatures of several hundreds, of either sign. ``min_temperature`` is a lower bound.
Without it the numbers are TextBrewer's.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.loss.presets.checks import masked_mean
from sgfast.ops import rows, validation
from sgfast.ops.operator import define

TemperatureScheduler = Callable[..., float | Tensor]


def linear_growth_weight_scheduler(x: float) -> float:
    """Return x = step / steps, which grows from 0 to 1."""
    return x


def linear_decay_weight_scheduler(x: float) -> float:
    """Return 1 − x, which falls from 1 to 0 while x = step / steps grows from 0 to 1."""
    return 1 - x


def constant_temperature_scheduler(
    logits_S: Tensor, logits_T: Tensor, base_temperature: float, *, mask: Tensor | None = None
) -> float:
    """Return the base temperature."""
    return base_temperature


def flsw_temperature_scheduler_builder(
    beta: float, gamma: float, eps: float = 1e-4, *args: object, min_temperature: float | None = None
) -> TemperatureScheduler:
    """Build a scheduler of focal-loss-style weights: rows that agree less get a lower temperature.

    w = (1 − s·t / ((|s| + eps)(|t| + eps)))^gamma, temperature = base + (mean(w) − w) · beta.

    Args:
        beta: how far the temperature moves.
        gamma: the exponent. If rounding makes 1 − cos negative, the scheduler takes 0. TextBrewer gives NaN in every
            row then.
        eps: added to the norms.
        *args: ignored, as TextBrewer does.
        min_temperature: a floor of the result; None for none.

    Returns:
        ``scheduler(logits_S, logits_T, base_temperature, *, mask=None)`` for logits (..., V) → (...), a constant for
        the gradient. The mean is over the rows that ``mask`` (...) selects. Other rows get the base temperature.
    """
    _check_min_temperature(min_temperature)

    return partial(_focal_temperature, beta, gamma, eps, min_temperature)


def _focal_temperature(
    beta: float,
    gamma: float,
    eps: float,
    min_temperature: float | None,
    logits_S: Tensor,
    logits_T: Tensor,
    base_temperature: float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    disagreement = _row_statistic(logits_S, logits_T, mask, "disagreement", eps)
    return _around(disagreement.clamp(min=0) ** gamma, base_temperature, beta, mask, min_temperature)


def cwsm_temperature_scheduler_builder(
    beta: float, *args: object, min_temperature: float | None = None
) -> TemperatureScheduler:
    """Build a scheduler of confidence weights: rows of a surer student get a higher temperature.

    w = 1 / (max softmax(s) + 1e-3), temperature = base + (mean(w) − w) · beta.

    Args:
        beta: how far the temperature moves.
        *args: ignored, as TextBrewer does.
        min_temperature: a floor of the result; None for none.

    Returns:
        ``scheduler(logits_S, logits_T, base_temperature, *, mask=None)`` for logits (..., V) → (...), a constant for
        the gradient. The mean is over the rows that ``mask`` (...) selects. Other rows get the base temperature.
    """
    _check_min_temperature(min_temperature)

    return partial(_confidence_temperature, beta, min_temperature)


def _confidence_temperature(
    beta: float,
    min_temperature: float | None,
    logits_S: Tensor,
    logits_T: Tensor,
    base_temperature: float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    confidence = _row_statistic(logits_S, logits_T, mask, "confidence", 0.0)
    return _around(1 / (confidence + 1e-3), base_temperature, beta, mask, min_temperature)


def _around(
    weights: Tensor, base_temperature: float, beta: float, mask: Tensor | None, min_temperature: float | None
) -> Tensor:
    if mask is not None:
        weights = torch.where(mask != 0, weights, 0)
    temperature = base_temperature + (masked_mean(weights, mask) - weights) * beta
    if min_temperature is not None:
        temperature = temperature.clamp(min=min_temperature)
    return temperature if mask is None else torch.where(mask != 0, temperature, base_temperature)


def _check_min_temperature(min_temperature: float | None) -> None:
    if min_temperature is not None and not 0 < min_temperature < math.inf:
        raise ValueError(f"min_temperature must be positive and finite, or None; got {min_temperature}")


def _row_statistic(logits_S: Tensor, logits_T: Tensor, mask: Tensor | None, statistic: str, eps: float) -> Tensor:
    validation.check_pair("logits_S", logits_S, "logits_T", logits_T)
    mask = validation.row_mask(mask, "mask", "logits_S", logits_S)
    values: Tensor = _row_statistics(_Statistics(logits_S.detach(), logits_T.detach(), mask, statistic, eps))
    return values


# The temporaries of one row are both sides in the arithmetic's dtype and the products of both.
_TEMPORARIES = 6


class _Statistics(NamedTuple):
    """The arguments of ``sgfast::scheduler_statistics``, checked."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    statistic: str
    eps: float


@define("scheduler_statistics", _Statistics)
def _row_statistics(arguments: _Statistics) -> Tensor:
    """``disagreement`` 1 − s·t / ((|s| + eps)(|t| + eps)), or ``confidence`` max softmax(s), in chunks: (...).

    Infinite logits are left out of the products.
    """
    student, teacher, mask, statistic, eps = arguments
    dtype, shape = rows.compute_dtype(student, teacher), student.shape[:-1]
    values = student.new_ones(shape, dtype=dtype)
    row_bytes = student.shape[-1] * dtype.itemsize * _TEMPORARIES
    for chunk in rows.row_chunks(shape, mask, row_bytes, rows.DEFAULT_CHUNK_BYTES):
        s = rows.read_rows(student, chunk).to(dtype)
        if statistic == "confidence":
            values.view(-1)[chunk] = (s.amax(-1) - s.logsumexp(-1)).exp()
        else:
            s, t = (torch.where(side.isinf(), 0, side) for side in (s, rows.read_rows(teacher, chunk).to(dtype)))
            norms = (s.norm(dim=-1) + eps) * (t.norm(dim=-1) + eps)
            values.view(-1)[chunk] = 1 - (s * t).sum(-1) / norms
    return values


@_row_statistics.register_fake
def _(arguments: _Statistics) -> Tensor:
    student = arguments.student
    return student.new_empty(student.shape[:-1], dtype=rows.compute_dtype(student, arguments.teacher))
