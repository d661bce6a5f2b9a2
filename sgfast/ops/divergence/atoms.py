"""The atoms that divergences are summed over, computed from rows of logits.

The code runs on one chunk of rows at a time, eagerly or through torch.compile. Tensors that are made here may be reused
in place; the incoming rows are never written to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.ops import rows
from sgfast.ops.divergence.kinds import KIND_TABLE, LABEL_KIND
from sgfast.ops.divergence.terms import Atoms, nan_to_zero, total_of_rows


class Settings(NamedTuple):
    """Settings of a chunk's arithmetic; hashable, so that torch.compile can guard on them."""

    kinds: tuple[str, ...]
    support: str  # "full" or one of SUPPORTS
    beta: float
    skew: float
    unit_temperature: bool = False  # the temperature is known to be 1: labels and kinds share one softmax
    paired: bool = False  # each side has a temperature of its own
    label_smoothing: float = 0.0

    @property
    def divergences(self) -> tuple[str, ...]:
        """The kinds that compare the two sides."""
        return tuple(kind for kind in self.kinds if kind != LABEL_KIND)

    @property
    def reads_log_p(self) -> bool:
        """A kind reads log p, not only log p − log q."""
        return any(KIND_TABLE[kind].reads_log_p for kind in self.divergences)

    @property
    def reads_half_gaps(self) -> bool:
        """A kind reads 1 − e^(−|log p − log q| / 2)."""
        return any(KIND_TABLE[kind].reads_half_gaps for kind in self.divergences)


# The reciprocals of both sides' temperatures, (rows, 1). Unless ``Settings.paired`` both are the same tensor.
Scales = tuple[Tensor, Tensor]


class Chunk(NamedTuple):
    """A chunk of rows with everything its arithmetic reads."""

    noisy: Tensor  # logits (rows, V)
    clean: Tensor  # logits (rows, V)
    scales: Scales
    settings: Settings
    indices: Tensor  # of the support, padded, (rows, width); without columns where the sums run over all logits
    valid: Tensor  # bool, (rows, width)
    labels: Tensor | None = None  # (rows, 1)
    difference: Tensor | None = None  # noisy − clean (rows, V), where it has more digits than the two logits give


class Side(NamedTuple):
    """One side's rows: logits and probabilities (rows, V), maximum and Σ e^((logits − maximum) / T) (rows, 1).

    Under ``tail`` the probabilities are still to be divided by that sum.
    """

    logits: Tensor
    probabilities: Tensor
    maximum: Tensor
    sum: Tensor


class Rest(NamedTuple):
    """One side's part outside the support: its weights, their maximum logit, their sum.

    The weights are e^((logits − maximum) / T), (rows, V), 0 inside the support.

    The part has its own maximum. Its sum therefore keeps all digits, however small the part is.
    """

    weights: Tensor
    maximum: Tensor
    sum: Tensor


def one_side(
    logits: Tensor,
    scale: Tensor | float,
    dtype: torch.dtype,
    kept: Sequence[Tensor] | None = None,
    divided: bool = True,
) -> Side:
    """Compute one side of the rows. ``kept`` holds its maximum and sum if forward has kept them."""
    logits = logits.to(dtype)
    maximum, total = kept or (logits.amax(-1, keepdim=True), None)
    weights = _weights(logits, maximum, scale)
    total = total_of_rows(weights, precise=True) if total is None else total
    return Side(logits, weights.div_(total) if divided else weights, maximum, total)


def _weights(logits: Tensor, maximum: Tensor, scale: Tensor | float) -> Tensor:
    """e^((logits − maximum) / T)."""
    # exp2 is the cheapest exponential. The rounding of a large argument does not matter: the weight is next to 0 there.
    # The number log2 e is written out because torch.compile would treat a constant of the module as an input.
    return (logits - maximum).mul_(scale * 1.4426950408889634).exp2_()


def _atom_side(logits: Tensor, scale: Tensor, dtype: torch.dtype, indices: Tensor, valid: Tensor) -> Side:
    """Compute one side under ``renormalize``: the softmax is taken over the support's logits alone."""
    return one_side(logits.to(dtype).gather(-1, indices).masked_fill_(~valid, -torch.inf), scale, dtype)


def _gathered(side: Side, indices: Tensor, valid: Tensor, divided: bool) -> Side:
    """The side over the support's logits."""
    probabilities = side.probabilities.gather(-1, indices).masked_fill_(~valid, 0)
    probabilities = probabilities if divided else probabilities.div_(side.sum)
    return Side(side.logits.gather(-1, indices), probabilities, side.maximum, side.sum)


def _rest(side: Side, scale: Tensor, indices: Tensor) -> Rest:
    weights = side.probabilities.scatter(-1, indices, 0)
    total = total_of_rows(weights, precise=True)
    # Digits are lost if the rest lies far below the maximum. Such a rest is rare and costs four more passes, so a CPU
    # looks for it first.
    if total.device.type == "cpu" and not torch.compiler.is_compiling() and (total > 1e-20).all():
        return Rest(weights, side.maximum, total)
    logits = side.logits.scatter(-1, indices, -torch.inf)
    maximum = logits.amax(-1, keepdim=True)
    maximum = torch.where(maximum == -torch.inf, side.maximum, maximum)
    weights = _weights(logits, maximum, scale)
    return Rest(weights, maximum, total_of_rows(weights, precise=True))


def _log_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Compute log(a/b) = ±log1p(|a − b| / min(a, b)), which keeps its digits for close and for distant a and b."""
    difference = numerator - denominator
    return torch.copysign((difference.abs() / torch.minimum(numerator, denominator)).log1p_(), difference)


def _log_ratio(noisy: Side, clean: Side, scales: Scales, paired: bool, difference: Tensor | None) -> Tensor:
    """Compute log p − log q of two sides over the same logits; 0 where both are 0. A new tensor."""
    quotient = _log_quotient(noisy.sum, clean.sum)
    if difference is not None:
        apart = noisy.maximum - clean.maximum + quotient / scales[0]
        return nan_to_zero((difference - apart).mul_(scales[0]))
    if paired:
        x, y = ((side.logits - side.maximum).mul_(scale) for side, scale in zip((noisy, clean), scales, strict=True))
        return nan_to_zero(x.sub_(y).sub_(quotient))
    # Differences are taken before sums. x − y is exact if the sides are close, and the subtracted term is exact too. If
    # the sides lie apart, x − y would be rounded at the size of the shift. Each side is then first taken relative to
    # its own maximum.
    x, y, apart = noisy.logits, clean.logits, noisy.maximum - clean.maximum
    shifted = (apart * scales[0]).abs_() > 4
    if torch.compiler.is_compiling() or shifted.device.type != "cpu" or shifted.any():
        x, y = (side.logits - torch.where(shifted, side.maximum, 0) for side in (noisy, clean))
        apart = torch.where(shifted, 0, apart)
    return nan_to_zero((x - y).sub_(apart + quotient / scales[0]).mul_(scales[0]))


def _ordered_probabilities(noisy: Side, clean: Side, log_ratio: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """Compute the larger of p and q as one exponential, and the smaller as the larger times e^−|d|, in compiled code.

    Inductor rates `exp` as costly and computes each `exp` once. One loop then finds all sums over a row.
    """
    noisy_is_larger = log_ratio > 0
    x, y = ((side.logits - side.maximum) * scale for side, scale in zip((noisy, clean), scales, strict=True))
    larger = torch.where(noisy_is_larger, x, y).exp() * torch.where(noisy_is_larger, 1 / noisy.sum, 1 / clean.sum)
    root = (log_ratio.abs() * -0.5).exp()
    return larger, larger * (root * root)


def _atoms(
    noisy: Side,
    clean: Side,
    rests: tuple[Rest, Rest] | None,
    chunk: Chunk,
) -> Atoms:
    """Make the support's atoms: its logits and, under ``tail``, one more atom for the rest of the mass."""
    _, _, scales, settings, indices, valid, _, difference = chunk
    whole = (noisy, clean)
    if difference is not None and settings.support != "full":
        difference = difference.gather(-1, indices)
    if settings.support in ("truncate", "tail"):
        noisy, clean = (_gathered(side, indices, valid, settings.support == "truncate") for side in whole)
    log_ratio = _log_ratio(noisy, clean, scales, settings.paired, difference)
    p, q, ordered = noisy.probabilities, clean.probabilities, None
    if torch.compiler.is_compiling() and settings.support == "full":
        ordered = larger, smaller = _ordered_probabilities(noisy, clean, log_ratio, scales)
        p, q = torch.where(log_ratio > 0, larger, smaller), torch.where(log_ratio > 0, smaller, larger)
    log_p = None
    if settings.reads_log_p:
        log_p = (noisy.logits - noisy.maximum).mul_(scales[0]).sub_(noisy.sum.log())
    if settings.support != "full":
        log_ratio.masked_fill_(~valid, 0)
    if rests is not None:
        below = [(rest.maximum - side.maximum) * scale for rest, side, scale in zip(rests, whole, scales, strict=True)]
        rest_p, rest_q = (
            distance.exp() * (rest.sum / side.sum) for distance, rest, side in zip(below, rests, whole, strict=True)
        )
        rest_ratio = below[0] - below[1] + _log_quotient(rests[0].sum, rests[1].sum)
        rest_ratio = nan_to_zero(rest_ratio - _log_quotient(noisy.sum, clean.sum))
        p, q, log_ratio = torch.cat([p, rest_p], -1), torch.cat([q, rest_q], -1), torch.cat([log_ratio, rest_ratio], -1)
        if log_p is not None:
            log_p = torch.cat([log_p, below[0] + (rests[0].sum / noisy.sum).log()], -1)
    return Atoms(p, q, log_ratio, log_p, settings.reads_half_gaps, ordered)


def softmax_scalars(noisy: Tensor, clean: Tensor, scales: Scales) -> tuple[Tensor, ...]:
    """Maximum and sum of both sides' rows, (rows, 1)."""
    dtype = rows.compute_dtype(noisy, clean)
    sides = (one_side(logits, scale, dtype) for logits, scale in zip((noisy, clean), scales, strict=True))
    return tuple(scalar for side in sides for scalar in (side.maximum, side.sum))


class Rows(NamedTuple):
    """Both sides of a chunk's rows, whole (under ``renormalize`` the support's logits), and their atoms."""

    sides: tuple[Side, Side]
    rests: tuple[Rest, Rest] | None
    atoms: Atoms


def read_sides(chunk: Chunk, kept: Sequence[Tensor] | None) -> Rows:
    """Read a chunk's rows; ``kept`` holds the `softmax_scalars` if they are known."""
    noisy, clean, scales, settings, indices, valid, *_ = chunk
    dtype = rows.compute_dtype(noisy, clean)
    pairs = list(zip((noisy, clean), scales, strict=True))
    if settings.support == "renormalize":
        first, second = (_atom_side(logits, scale, dtype, indices, valid) for logits, scale in pairs)
    else:
        divided = settings.support != "tail"
        first, second = (
            one_side(*pair, dtype, kept and kept[2 * i : 2 * i + 2], divided) for i, pair in enumerate(pairs)
        )
    rests = None
    if settings.support == "tail":
        rests = _rest(first, scales[0], indices), _rest(second, scales[1], indices)
    return Rows((first, second), rests, _atoms(first, second, rests, chunk))
