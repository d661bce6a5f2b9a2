"""From rows of logits to the atoms that divergences are summed over, and from partials back to logit gradients.

One chunk of rows at a time: what `divergence` runs, eagerly or through torch.compile. Tensors made here are reused in
place where they are needed no more; the rows that come in are never written to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.ops import rows
from sgfast.ops.divergence_terms import (
    Atoms,
    finish,
    finite_rows,
    may_be_infinite,
    nan_to_zero,
    partial_derivative,
    row_sum,
)

# The name under which hard labels' cross-entropy travels among the kinds, always the last.
LABEL_KIND = "label_cross_entropy"


class Settings(NamedTuple):
    """What a chunk's arithmetic depends on besides tensors; hashable, so that torch.compile can guard on it."""

    kinds: tuple[str, ...]
    support: str  # "full" or one of SUPPORTS
    beta: float
    skew: float
    unit_temperature: bool = False  # the temperature is known to be 1: the labels' softmax is that of the kinds
    label_smoothing: float = 0.0

    @property
    def divergences(self) -> tuple[str, ...]:
        """The kinds that compare the two sides."""
        return tuple(kind for kind in self.kinds if kind != LABEL_KIND)


class _Side(NamedTuple):
    """One side's rows: logits and probabilities (rows, V), maximum and Σ e^((logits − maximum) / T) (rows, 1)."""

    logits: Tensor
    probabilities: Tensor
    maximum: Tensor
    sum: Tensor


def _side(
    logits: Tensor, inverse_temperature: Tensor | float, dtype: torch.dtype, kept: Sequence[Tensor] | None = None
) -> _Side:
    """One side of the rows; its maximum and sum, unless they were kept, are taken from the logits."""
    logits = logits.to(dtype)
    maximum, total = kept or (logits.amax(-1, keepdim=True), None)
    # exp2 is the cheapest exponential; where its argument is large, and its rounding felt, the weight is next to 0.
    # log2 e is written out: torch.compile would take a constant of the module for an input.
    weights = (logits - maximum).mul_(inverse_temperature * 1.4426950408889634).exp2_()
    total = weights.sum(-1, keepdim=True) if total is None else total
    return _Side(logits, weights.div_(total), maximum, total)


def _gathered(side: _Side, indices: Tensor, valid: Tensor, support: str) -> _Side:
    """The side over the support's logits; under ``renormalize`` its probabilities sum to 1 there."""
    probabilities = side.probabilities.gather(-1, indices).masked_fill_(~valid, 0)
    total = side.sum
    if support == "renormalize":
        mass = probabilities.sum(-1, keepdim=True)
        probabilities, total = probabilities.div_(mass), total * mass
    return _Side(side.logits.gather(-1, indices), probabilities, side.maximum, total)


def _tail(side: _Side, indices: Tensor) -> Tensor:
    """The probability outside the support, summed, so that none of the tail's digits are lost, (rows, 1)."""
    return side.probabilities.scatter(-1, indices, 0).sum(-1, keepdim=True)


def _log_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.log1p((numerator - denominator) / denominator)


def _ordered_probabilities(
    noisy: _Side, clean: _Side, log_ratio: Tensor, inverse_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """The larger of p and q is one exponential, the smaller that times e^−|d|: what compiled code computes anew.

    With `exp`: Inductor takes that for costly and computes it once, where all sums over a row, then one loop, find it.
    """
    noisy_is_larger = log_ratio > 0
    exponent = torch.where(noisy_is_larger, noisy.logits - noisy.maximum, clean.logits - clean.maximum)
    larger = (exponent * inverse_temperature).exp() * torch.where(noisy_is_larger, 1 / noisy.sum, 1 / clean.sum)
    root = (log_ratio.abs() * -0.5).exp()
    return larger, larger * (root * root)


def _atoms(
    noisy: _Side, clean: _Side, inverse_temperature: Tensor, settings: Settings, indices: Tensor, valid: Tensor
) -> tuple[Atoms, _Side, _Side]:
    """The support's atoms, and both sides over the logits among them."""
    whole = (noisy, clean)
    if settings.support != "full":
        noisy, clean = (_gathered(side, indices, valid, settings.support) for side in whole)
    # Differences before sums: x − y is exact where the sides are close, and so is what is subtracted from it.
    offset = noisy.maximum - clean.maximum + _log_quotient(noisy.sum, clean.sum) / inverse_temperature
    log_ratio = (noisy.logits - clean.logits).sub_(offset).mul_(inverse_temperature)
    log_ratio = nan_to_zero(log_ratio)
    p, q, ordered = noisy.probabilities, clean.probabilities, None
    if torch.compiler.is_compiling() and settings.support == "full":
        ordered = larger, smaller = _ordered_probabilities(noisy, clean, log_ratio, inverse_temperature)
        p, q = torch.where(log_ratio > 0, larger, smaller), torch.where(log_ratio > 0, smaller, larger)
    log_p = None
    if "cross_entropy" in settings.kinds:
        log_p = (noisy.logits - noisy.maximum).mul_(inverse_temperature).sub_(noisy.sum.log())
    if settings.support != "full":
        log_ratio.masked_fill_(~valid, 0)
    if settings.support == "tail":
        noisy_tail, clean_tail = (_tail(side, indices) for side in whole)
        p, q = torch.cat([p, noisy_tail], -1), torch.cat([q, clean_tail], -1)
        log_ratio = torch.cat([log_ratio, nan_to_zero(_log_quotient(noisy_tail, clean_tail))], -1)
        if log_p is not None:
            log_p = torch.cat([log_p, noisy_tail.log()], -1)
    return Atoms(p, q, log_ratio, log_p, settings.kinds, ordered), noisy, clean


def softmax_scalars(noisy: Tensor, clean: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, ...]:
    """Maximum and sum of both sides' rows, (rows, 1)."""
    dtype = rows.compute_dtype(noisy, clean)
    sides = (_side(logits, inverse_temperature, dtype) for logits in (noisy, clean))
    return tuple(scalar for side in sides for scalar in (side.maximum, side.sum))


def forward_rows(
    noisy: Tensor,
    clean: Tensor,
    inverse_temperature: Tensor,
    settings: Settings,
    indices: Tensor,
    valid: Tensor,
    labels: Tensor | None = None,
    sides_wanted: tuple[bool, bool] = (False, False),
    kept: Sequence[Tensor] | None = None,
) -> Tensor:
    """(rows, V) twice → what `finish_values` takes: for each row and kind a sum, then row scalars, (rows, 3·kinds + 4).

    The scalars are both sides' maximum and sum and, over the whole vocabulary, two for each kind that backward needs;
    0 stands for what is not computed. The reciprocal of the temperature is (rows, 1); ``kept`` are the
    `softmax_scalars`, where they are at hand.
    """
    dtype = rows.compute_dtype(noisy, clean)
    noisy_side = _side(noisy, inverse_temperature, dtype, kept and kept[:2])
    none = torch.zeros_like(noisy_side.sum)
    sums, row_scalars = [], [noisy_side.maximum, noisy_side.sum, none, none]
    if settings.divergences:
        clean_side = _side(clean, inverse_temperature, dtype, kept and kept[2:])
        row_scalars[2:] = clean_side.maximum, clean_side.sum
        atoms, *_ = _atoms(noisy_side, clean_side, inverse_temperature, settings, indices, valid)
        for kind in settings.divergences:
            sums.append(row_sum(kind, atoms, settings.beta, settings.skew, settings.support == "truncate"))
            for side, wanted in enumerate(sides_wanted):
                # Uncompiled, a partial only to be summed would cost more than its sum does in backward.
                kept_sum = wanted and settings.support == "full" and torch.compiler.is_compiling()
                row_scalars.append(_partial(kind, side, atoms, settings).sum(-1, keepdim=True) if kept_sum else none)
    if labels is not None:
        at_temperature_1 = _at_temperature_1(noisy_side, settings)
        sums.append(_label_cross_entropy(at_temperature_1, labels, settings.label_smoothing))
        row_scalars += [at_temperature_1.sum, none]
    return torch.cat(sums + row_scalars, -1)


def finish_values(found: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Values (kinds, rows) and row scalars (4 + 2·kinds, rows) from all that `forward_rows` found, (rows, …)."""
    parts = found.tensor_split([len(settings.kinds)], -1)
    sums, row_scalars = (part.T.clone(memory_format=torch.contiguous_format) for part in parts)
    # A row with a NaN (or with two infinities of one sign) has a NaN sum; its terms may have lost it.
    nan = torch.where((row_scalars[1] >= 0) & (row_scalars[3] >= 0), 0.0, torch.nan).to(sums.dtype)
    for kind, kind_sums in zip(settings.divergences, sums, strict=False):
        finish(kind, kind_sums, settings.beta, settings.skew, settings.support == "truncate").add_(nan)
    return sums, row_scalars


def backward_rows(
    noisy: Tensor,
    clean: Tensor,
    inverse_temperature: Tensor,
    settings: Settings,
    indices: Tensor,
    valid: Tensor,
    upstream: Tensor,
    sides_wanted: tuple[bool, bool],
    labels: Tensor | None = None,
    row_scalars: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients (rows, V) to the sides wanted, in the arithmetic's dtype; ``upstream`` is (kinds, rows).

    ``row_scalars`` are those of the same implementation's `forward_rows`; what is not given is computed again.
    """
    dtype = rows.compute_dtype(noisy, clean)
    kept = None if row_scalars is None else row_scalars[:, :, None].unbind(0)
    noisy_side = _side(noisy, inverse_temperature, dtype, kept and kept[0:2])
    gradients: list[Tensor | None] = [None, None]
    if settings.divergences:
        sides = noisy_side, _side(clean, inverse_temperature, dtype, kept and kept[2:4])
        atoms, *_ = _atoms(*sides, inverse_temperature, settings, indices, valid)
        weights = (upstream[:, :, None] * inverse_temperature + _nan_rows(*sides)).unbind(0)
        for i in (0, 1):
            if sides_wanted[i]:
                sums = kept[4 + i :: 2] if kept and torch.compiler.is_compiling() else None
                partial, partial_sum = _weighted_partial(i, atoms, settings, weights, sums)
                probability = (atoms.p, atoms.q)[i]
                gradients[i] = _logit_gradient(sides[i], probability, partial, partial_sum, settings, indices)
    else:  # labels alone
        gradients = [
            torch.zeros_like(logits, dtype=dtype) if wanted else None
            for logits, wanted in zip((noisy, clean), sides_wanted, strict=True)
        ]
    if labels is not None and gradients[0] is not None:
        at_temperature_1 = _at_temperature_1(noisy_side, settings, None if kept is None else kept[-2])
        _add_label_gradient(gradients[0], at_temperature_1, labels, upstream[-1], settings.label_smoothing)
    return gradients


def _nan_rows(noisy: _Side, clean: _Side) -> Tensor:
    """NaN where a side's sum is, else 0, (rows, 1). Inductor takes a product with 0 for 0, so it has to be chosen."""
    return torch.where((noisy.sum >= 0) & (clean.sum >= 0), 0.0, torch.nan).to(noisy.sum.dtype)


def _partial(kind: str, side: int, atoms: Atoms, settings: Settings) -> Tensor:
    return partial_derivative(kind, side, atoms, settings.beta, settings.skew, settings.support == "truncate")


def _weighted_partial(
    side: int, atoms: Atoms, settings: Settings, weights: Sequence[Tensor], sums: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Σ over kinds of weight · partial towards one side, a new tensor, and its row sum; from each partial's if kept."""
    total, total_sum = None, torch.zeros_like(weights[0])
    for i, kind in enumerate(settings.divergences):
        partial = _partial(kind, side, atoms, settings)
        partial_sum = None if sums is None else sums[i]
        if may_be_infinite(kind, side, settings.skew):
            partial, partial_sum = finite_rows(partial, partial_sum)
        if partial_sum is not None:
            total_sum = total_sum + weights[i] * partial_sum
        total = partial * weights[i] if total is None else total.addcmul_(partial, weights[i])
    assert total is not None
    return total, total.sum(-1, keepdim=True) if sums is None else total_sum


def write_gradients(
    noisy: Tensor,
    clean: Tensor,
    inverse_temperature: Tensor,
    settings: Settings,
    indices: Tensor,
    valid: Tensor,
    upstream: Tensor,
    targets: Sequence[Tensor | None],
    labels: Tensor | None = None,
    row_scalars: Tensor | None = None,
) -> None:
    """`backward_rows`, written to one target a side (None if not wanted): compiled code then needs no other copy."""
    sides_wanted = (targets[0] is not None, targets[1] is not None)
    gradients = backward_rows(
        noisy, clean, inverse_temperature, settings, indices, valid, upstream, sides_wanted, labels, row_scalars
    )
    for target, gradient in zip(targets, gradients, strict=True):
        if target is not None and gradient is not None:
            target.copy_(gradient)


def _logit_gradient(
    side: _Side,
    atom_probabilities: Tensor,
    partial: Tensor,
    partial_sum: Tensor,
    settings: Settings,
    indices: Tensor,
) -> Tensor:
    """From partials with respect to the atoms' log-probabilities, a new tensor, to the gradient of the logits."""
    if settings.support == "full":
        return partial.addcmul_(atom_probabilities, -partial_sum)
    if settings.support == "truncate":
        return (side.probabilities * -partial_sum).scatter_add_(-1, indices, partial)
    if settings.support == "renormalize":
        inside = partial.addcmul_(atom_probabilities, -partial_sum)
        return torch.zeros_like(side.probabilities).scatter_add_(-1, indices, inside)
    tail_probability, tail_partial = atom_probabilities[:, -1:], partial[:, -1:]
    # The tail's partial is shared among its logits in proportion to their probabilities.
    tail_rate = torch.where(tail_probability == 0, 0, tail_partial / tail_probability) - partial_sum
    outside = side.probabilities.scatter(-1, indices, 0).mul_(tail_rate)
    return outside.scatter_add_(-1, indices, partial[:, :-1] - atom_probabilities[:, :-1] * partial_sum)


def _at_temperature_1(side: _Side, settings: Settings, kept_sum: Tensor | None = None) -> _Side:
    if settings.unit_temperature:
        return side
    kept = None if kept_sum is None else (side.maximum, kept_sum)
    return _side(side.logits, 1.0, side.logits.dtype, kept)


def _label_cross_entropy(noisy: _Side, labels: Tensor, smoothing: float) -> Tensor:
    """−log softmax(noisy)[label], (rows, 1): 0 for a negative label, NaN for one outside the vocabulary.

    A part of it, ``smoothing``, is the mean over the vocabulary in place of the label's.
    """
    at_label = noisy.logits.gather(-1, labels.clamp(0, noisy.logits.shape[-1] - 1))
    distance = noisy.maximum - at_label
    if smoothing > 0:
        mean_distance = (noisy.maximum - noisy.logits).mean(-1, keepdim=True)
        distance = mean_distance if smoothing == 1 else (1 - smoothing) * distance + smoothing * mean_distance
    values = noisy.sum.log() + distance
    return torch.where(labels < 0, 0, values) + _nan_outside(labels, noisy)


def _add_label_gradient(gradient: Tensor, noisy: _Side, labels: Tensor, upstream: Tensor, smoothing: float) -> None:
    """Add upstream · (softmax(noisy) − (1 − smoothing)·onehot(label) − smoothing / V)."""
    weight = torch.where(labels < 0, 0, upstream[:, None] + _nan_outside(labels, noisy))
    gradient.addcmul_(noisy.probabilities, weight)
    if smoothing > 0:
        gradient.sub_(weight * (smoothing / gradient.shape[-1]))
    gradient.scatter_add_(-1, labels.clamp(0, gradient.shape[-1] - 1), weight * (smoothing - 1))


def _nan_outside(labels: Tensor, noisy: _Side) -> Tensor:
    """NaN where a label lies outside the vocabulary, else 0, (rows, 1)."""
    return torch.zeros_like(noisy.maximum).masked_fill(labels >= noisy.logits.shape[-1], torch.nan)
