"""From rows of logits to the atoms that divergences are summed over, and from partials back to logit gradients.

One chunk of rows at a time: what `divergence` runs, eagerly or through torch.compile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.ops import rows
from sgfast.ops.divergence_terms import Atoms, divergence, make_atoms, partials

# The name under which hard labels' cross-entropy travels among the kinds, always the last.
LABEL_KIND = "label_cross_entropy"


class Settings(NamedTuple):
    """What a chunk's arithmetic depends on besides tensors; hashable, so that torch.compile can guard on it."""

    kinds: tuple[str, ...]
    support: str  # "full" or one of SUPPORTS
    beta: float
    skew: float


class _Side(NamedTuple):
    """One side's rows: logits over temperature (rows, V), their maximum and e^(logits − maximum)."""

    logits: Tensor
    maximum: Tensor
    weights: Tensor


def _side(logits: Tensor, temperature: Tensor, dtype: torch.dtype) -> _Side:
    scaled = logits.to(dtype) / temperature
    maximum = scaled.amax(-1, keepdim=True)
    return _Side(scaled, maximum, (scaled - maximum).exp())


def _gathered(side: _Side, indices: Tensor, valid: Tensor) -> _Side:
    weights = side.weights.gather(-1, indices).masked_fill(~valid, 0)
    return _Side(side.logits.gather(-1, indices), side.maximum, weights)


def _outside(side: _Side, indices: Tensor) -> Tensor:
    """The weights with those in the support set to 0: summed, they are the tail, with none of its digits lost."""
    return side.weights.scatter(-1, indices, 0)


def _log_quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.log1p((numerator - denominator) / denominator)


def _atoms(noisy: _Side, clean: _Side, support: str, indices: Tensor, valid: Tensor) -> tuple[Atoms, Tensor, Tensor]:
    """The support's atoms, and both sides' sums of weights."""
    inside = (noisy, clean)
    if support != "full":
        inside = (_gathered(noisy, indices, valid), _gathered(clean, indices, valid))
    whole = inside if support == "renormalize" else (noisy, clean)
    noisy_sum, clean_sum = (side.weights.sum(-1, keepdim=True) for side in whole)
    p, q = inside[0].weights / noisy_sum, inside[1].weights / clean_sum
    log_p = inside[0].logits - noisy.maximum - noisy_sum.log()
    # Differences before sums: x − y is exact where the sides are close, and so is what is subtracted from it.
    log_ratio = (inside[0].logits - inside[1].logits) - (noisy.maximum - clean.maximum)
    log_ratio = log_ratio - _log_quotient(noisy_sum, clean_sum)
    if support != "full":
        log_ratio = log_ratio.masked_fill(~valid, 0)
    if support == "tail":
        noisy_tail, clean_tail = (_outside(side, indices).sum(-1, keepdim=True) for side in (noisy, clean))
        p, q = torch.cat([p, noisy_tail / noisy_sum], -1), torch.cat([q, clean_tail / clean_sum], -1)
        log_p = torch.cat([log_p, (noisy_tail / noisy_sum).log()], -1)
        tail_ratio = _log_quotient(noisy_tail, clean_tail) - _log_quotient(noisy_sum, clean_sum)
        log_ratio = torch.cat([log_ratio, tail_ratio], -1)
    return make_atoms(p, q, log_p, log_ratio), noisy_sum, clean_sum


def forward_rows(
    noisy: Tensor,
    clean: Tensor,
    temperature: Tensor,
    settings: Settings,
    indices: Tensor,
    valid: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """(rows, V) twice → values (kinds, rows)."""
    dtype = rows.compute_dtype(noisy, clean)
    sides = (_side(noisy, temperature, dtype), _side(clean, temperature, dtype))
    atoms, _, _ = _atoms(*sides, settings.support, indices, valid)
    truncated = settings.support == "truncate"
    values = [
        divergence(kind, atoms, settings.beta, settings.skew, truncated)
        for kind in settings.kinds
        if kind != LABEL_KIND
    ]
    if labels is not None:
        values.append(_label_cross_entropy(noisy.to(dtype), labels))
    return torch.stack(values)


def _label_cross_entropy(noisy: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(noisy)[label], (rows,): 0 for a negative label, NaN for one outside the vocabulary."""
    at_label = noisy.gather(-1, labels.clamp(0, noisy.shape[-1] - 1))
    values = noisy.logsumexp(-1, keepdim=True) - at_label
    return (torch.where(labels < 0, 0, values) + _nan_outside(labels, noisy)).squeeze(-1)


def _label_gradient(noisy: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    """upstream · (softmax(noisy) − onehot(label)), (rows, V)."""
    weight = torch.where(labels < 0, 0, upstream[:, None] + _nan_outside(labels, noisy))
    return (noisy.softmax(-1) * weight).scatter_add(-1, labels.clamp(0, noisy.shape[-1] - 1), -weight)


def _nan_outside(labels: Tensor, noisy: Tensor) -> Tensor:
    """NaN where a label lies outside the vocabulary, else 0, (rows, 1)."""
    return torch.zeros_like(labels, dtype=noisy.dtype).masked_fill(labels >= noisy.shape[-1], torch.nan)


def backward_rows(
    noisy: Tensor,
    clean: Tensor,
    temperature: Tensor,
    settings: Settings,
    indices: Tensor,
    valid: Tensor,
    upstream: Tensor,
    sides_wanted: tuple[bool, bool],
    labels: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients (rows, V) to the sides wanted, in the arithmetic's dtype; ``upstream`` is (kinds, rows)."""
    dtype = rows.compute_dtype(noisy, clean)
    sides = (_side(noisy, temperature, dtype), _side(clean, temperature, dtype))
    atoms, *sums = _atoms(*sides, settings.support, indices, valid)
    totals = [torch.zeros_like(atoms.p), torch.zeros_like(atoms.q)]
    for kind, kind_upstream in zip(settings.kinds, upstream, strict=True):
        if kind == LABEL_KIND:
            continue
        for side, partial in enumerate(
            partials(kind, atoms, settings.beta, settings.skew, settings.support == "truncate")
        ):
            if sides_wanted[side]:
                totals[side] = totals[side] + kind_upstream[:, None] * partial
    gradients = [
        _logit_gradient(sides[side], sums[side], (atoms.p, atoms.q)[side], totals[side], settings.support, indices)
        / temperature
        if sides_wanted[side]
        else None
        for side in (0, 1)
    ]
    if labels is not None and gradients[0] is not None:
        gradients[0] = gradients[0] + _label_gradient(noisy.to(dtype), labels, upstream[-1])
    return gradients


def _logit_gradient(
    side: _Side, weights_sum: Tensor, probability: Tensor, partial: Tensor, support: str, indices: Tensor
) -> Tensor:
    """From partials with respect to the atoms' log-probabilities to the gradient of the side's scaled logits."""
    partial_sum = partial.sum(-1, keepdim=True)
    if support == "full":
        return partial - probability * partial_sum
    if support == "truncate":
        return (-side.weights / weights_sum * partial_sum).scatter_add(-1, indices, partial)
    if support == "renormalize":
        return torch.zeros_like(side.weights).scatter_add(-1, indices, partial - probability * partial_sum)
    inside, tail = (probability[:, :-1], partial[:, :-1]), (probability[:, -1:], partial[:, -1:])
    # The tail's partial is shared among its logits in proportion to their weights.
    tail_rate = torch.where(tail[0] == 0, 0, tail[1] / tail[0]) - partial_sum
    outside = _outside(side, indices) / weights_sum * tail_rate
    return outside.scatter_add(-1, indices, inside[1] - inside[0] * partial_sum)
