r"""Divergences between two distributions, atom by atom, in forms that keep their digits.

Atoms carry probabilities p (noisy) and q (clean) and d = log p − log q, which is formed from the logits and never from
the rounded probabilities. With w = 1 − e^−|d| and the larger of p and q,

    p − q = ± max(p, q) · w                 exact to one rounding however close p and q are, and free of overflow
    KL(q‖λq + (1−λ)p) = Σ (1−λ)(p − q) − q·log(m/q),    each term ≥ 0;  λ = 0 is KL(q‖p)

The linear part (1−λ)(p − q) sums to 0 over a whole distribution; a truncated sum takes it off again. Jensen–Shannon is
beta·KL(q‖m) + (1−beta)·KL(p‖m) with the linear parts cancelled.

Partials with respect to log p and log q (not the logits) are given the same way: for whole distributions a multiple
of p (of q) may be added to them without changing the gradient, because Σ p = 1; it is chosen so that nothing cancels
near p = q.
"""

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "total_variation",
    "squared_hellinger",
    "cross_entropy",
    "skew_forward_kl",
    "skew_reverse_kl",
)


class Atoms(NamedTuple):
    """Both distributions over the same atoms; every field is (rows, atoms)."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_ratio: Tensor  # d = log p − log q; ±inf where one side is 0, 0 where both are
    shrinkage: Tensor  # w = 1 − e^−|d|, in [0, 1]
    difference: Tensor  # p − q


def make_atoms(p: Tensor, q: Tensor, log_p: Tensor, log_ratio: Tensor) -> Atoms:
    """Complete the atoms from probabilities and log-ratio (NaN where both sides are 0)."""
    log_ratio = log_ratio.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    shrinkage = -torch.expm1(-log_ratio.abs())
    difference = torch.copysign(torch.maximum(p, q) * shrinkage, log_ratio)
    return Atoms(p, q, log_p, log_ratio, shrinkage, difference)


def divergence(kind: str, atoms: Atoms, beta: float, skew: float, truncated: bool) -> Tensor:
    """Row sums (rows,) of one kind; never negative, the KL and skew kinds of a truncated sum excepted."""
    terms = _terms(kind, atoms, beta, skew)
    if truncated and (linear := _linear_part(kind, skew)):
        return (terms - linear * atoms.difference).sum(-1)
    return terms.sum(-1).clamp(min=0)  # ≥ 0 already but for the last rounding


def _linear_part(kind: str, skew: float) -> float:
    """The multiple of (p − q) that `_terms` added to each atom of the definition."""
    return {
        "forward_kl": 1.0,
        "reverse_kl": -1.0,
        "skew_forward_kl": 1 - skew,
        "skew_reverse_kl": skew - 1,
    }.get(kind, 0.0)


def _terms(kind: str, atoms: Atoms, beta: float, skew: float) -> Tensor:
    forward = (atoms.q, atoms.difference, atoms.log_ratio, atoms.shrinkage)
    reverse = (atoms.p, -atoms.difference, -atoms.log_ratio, atoms.shrinkage)
    match kind:
        case "forward_kl":
            return _skew_kl(*forward, 0.0)
        case "reverse_kl":
            return _skew_kl(*reverse, 0.0)
        case "skew_forward_kl":
            return _skew_kl(*forward, skew)
        case "skew_reverse_kl":
            return _skew_kl(*reverse, skew)
        case "jeffreys":
            return _times(atoms.difference, atoms.log_ratio)
        case "jensen_shannon":
            log_m_over_q = _log_mixture_ratio(atoms.log_ratio, atoms.shrinkage, beta)
            log_m_over_p = _log_mixture_ratio(-atoms.log_ratio, atoms.shrinkage, 1 - beta)
            return -beta * _times(atoms.q, log_m_over_q) - (1 - beta) * _times(atoms.p, log_m_over_p)
        case "total_variation":
            return atoms.difference.abs() / 2
        case "squared_hellinger":
            return torch.maximum(atoms.p, atoms.q) * _half_shrinkage(atoms).square() / 2
        case "cross_entropy":
            return -_times(atoms.q, atoms.log_p)
    raise AssertionError(kind)


def partials(kind: str, atoms: Atoms, beta: float, skew: float, truncated: bool) -> tuple[Tensor, Tensor]:
    """Partial derivatives of one kind's row sum with respect to log p and log q, (rows, atoms) each.

    A row whose divergence is infinite (q > 0 where p = 0, or the reverse) gives 0 on the side where the partial is
    infinite: a step in that direction does not exist.
    """
    to_p, to_q = _partials(kind, atoms, beta, skew)
    if truncated and (linear := _linear_part(kind, skew)):
        to_p, to_q = to_p - linear * atoms.p, to_q + linear * atoms.q
    elif truncated and kind == "cross_entropy":
        to_p = to_p - atoms.p
    return _finite_rows(to_p), _finite_rows(to_q)


def _partials(kind: str, atoms: Atoms, beta: float, skew: float) -> tuple[Tensor, Tensor]:
    forward = (atoms.q, atoms.difference, atoms.log_ratio, atoms.shrinkage)
    reverse = (atoms.p, -atoms.difference, -atoms.log_ratio, atoms.shrinkage)
    match kind:
        case "forward_kl":
            return _skew_kl_partials(*forward, 0.0)
        case "reverse_kl":
            return _skew_kl_partials(*reverse, 0.0)[::-1]
        case "skew_forward_kl":
            return _skew_kl_partials(*forward, skew)
        case "skew_reverse_kl":
            return _skew_kl_partials(*reverse, skew)[::-1]
        case "jeffreys":
            return (
                _times(atoms.p, atoms.log_ratio) + atoms.difference,
                -_times(atoms.q, atoms.log_ratio) - atoms.difference,
            )
        case "jensen_shannon":
            log_m_over_q = _log_mixture_ratio(atoms.log_ratio, atoms.shrinkage, beta)
            log_m_over_p = _log_mixture_ratio(-atoms.log_ratio, atoms.shrinkage, 1 - beta)
            return (beta - 1) * _times(atoms.p, log_m_over_p), -beta * _times(atoms.q, log_m_over_q)
        case "total_variation":
            sign = atoms.log_ratio.sign() / 2
            return sign * atoms.p, -sign * atoms.q
        case "squared_hellinger":
            # ½(p − √pq) and ½(q − √pq), with √pq = max(p, q)·(1 − h).
            half = _half_shrinkage(atoms)
            larger = torch.maximum(atoms.p, atoms.q) * half / 2
            smaller = larger * (half - 1)
            noisy_is_larger = atoms.log_ratio > 0
            return torch.where(noisy_is_larger, larger, smaller), torch.where(noisy_is_larger, smaller, larger)
        case "cross_entropy":
            return atoms.difference, -_times(atoms.q, atoms.log_p)
    raise AssertionError(kind)


def _skew_kl(q: Tensor, difference: Tensor, log_ratio: Tensor, shrinkage: Tensor, skew: float) -> Tensor:
    """Terms of KL(q‖m), m = skew·q + (1−skew)·p, each ≥ 0."""
    return (1 - skew) * difference - _times(q, _log_mixture_ratio(log_ratio, shrinkage, skew))


def _skew_kl_partials(
    q: Tensor, difference: Tensor, log_ratio: Tensor, shrinkage: Tensor, skew: float
) -> tuple[Tensor, Tensor]:
    """Partials of those terms with respect to log p and log q."""
    if skew == 0:
        return difference, -_times(q, log_ratio)
    noisy_is_larger = log_ratio > 0
    # m over the larger of p and q, then p/m and q/m.
    m = 1 - torch.where(noisy_is_larger, skew * shrinkage, (1 - skew) * shrinkage)
    p_over_m = torch.where(noisy_is_larger, 1, 1 - shrinkage) / m
    q_over_m = torch.where(noisy_is_larger, 1 - shrinkage, 1) / m
    to_p = (1 - skew) ** 2 * p_over_m * difference
    to_q = (1 - skew) * skew * q_over_m * difference
    return to_p, to_q - _times(q, _log_mixture_ratio(log_ratio, shrinkage, skew))


def _log_mixture_ratio(log_ratio: Tensor, shrinkage: Tensor, weight: float) -> Tensor:
    """log(m/q) for m = weight·q + (1−weight)·p, from log p − log q."""
    if weight == 0:
        return log_ratio
    loss_of_larger = torch.where(log_ratio > 0, weight * shrinkage, (1 - weight) * shrinkage)
    return log_ratio.clamp(min=0) + torch.log1p(-loss_of_larger)


def _half_shrinkage(atoms: Atoms) -> Tensor:
    """h = 1 − e^(−|d|/2), so that |√p − √q| = √max(p, q) · h."""
    return -torch.expm1(-atoms.log_ratio.abs() / 2)


def _times(probability: Tensor, factor: Tensor) -> Tensor:
    """Probability · factor with 0 · (±inf) = 0; a NaN probability stays NaN."""
    return torch.where(probability == 0, 0, probability * factor)


def _finite_rows(partial: Tensor) -> Tensor:
    return torch.where(partial.sum(-1, keepdim=True).isinf(), 0, partial)
