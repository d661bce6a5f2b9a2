"""Every divergence and its gradients in float64, from log-probabilities, as plainly as the definitions read.

Rows are (rows, V) float64 logits. A support is a boolean mask (rows, V), or None for the whole vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Exact(NamedTuple):
    """Values (rows,), gradients to both sides (rows, V), and what a sign that rounding decides may change in them."""

    value: Tensor
    gradients: tuple[Tensor, Tensor]
    undecided: tuple[Tensor, Tensor]


def top_k_mask(side: Tensor, k: int) -> Tensor:
    """The k largest of each row; of equal ones the lower index."""
    order = side.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(side, dtype=torch.bool).scatter(-1, order, True)


def exact(
    kind: str,
    noisy: Tensor,
    clean: Tensor,
    support_mask: Tensor | None,
    support: str,
    temperatures: tuple[Tensor, Tensor],
    beta: float,
    skew: float,
    smallest: float = 0.0,
) -> Exact:
    """Value and gradients of one kind. A gradient is 0 in a row whose partial derivatives are infinite.

    ``smallest`` is the smallest positive number of the arithmetic that is measured.
    """
    x, y = noisy / temperatures[0][:, None], clean / temperatures[1][:, None]
    a, b = x.log_softmax(-1), y.log_softmax(-1)
    tails = None
    if support_mask is not None and support == "renormalize":
        a, b = (z.masked_fill(~support_mask, -torch.inf).log_softmax(-1) for z in (x, y))
    elif support_mask is not None:
        whole = a, b
        if support == "tail":
            tails = [one.masked_fill(support_mask, -torch.inf).logsumexp(-1, keepdim=True) for one in whole]
        a, b = (one.masked_fill(~support_mask, -torch.inf) for one in whole)
    atoms_a, atoms_b = (a, b) if tails is None else (torch.cat([a, tails[0]], -1), torch.cat([b, tails[1]], -1))
    terms, partials = _terms_and_partials(kind, atoms_a, atoms_b, beta, skew, smallest)
    gradients, undecided = [], []
    for side, partial in enumerate(partials):
        total = partial.sum(-1, keepdim=True)
        partial, total = (one.masked_fill(~total.isfinite(), 0) for one in (partial, total))
        atom_p = (atoms_a, atoms_b)[side].exp()
        if support_mask is None or support == "renormalize":
            gradient = partial - atom_p * total
        else:
            whole_p = whole[side].exp()
            gradient = partial[:, : a.shape[-1]] - whole_p * total
            if tails is not None:
                share = (whole[side] - tails[side]).exp().masked_fill(support_mask, 0).nan_to_num(nan=0.0)
                gradient = gradient + share * partial[:, -1:]
        gradients.append(gradient / temperatures[side][:, None])
        close = (atoms_a - atoms_b).abs() < 1e-4
        near = atom_p.masked_fill(~close, 0).sum(-1)
        undecided.append(near / temperatures[side] if kind == "total_variation" else torch.zeros_like(near))
    return Exact(terms.sum(-1), tuple(gradients), tuple(undecided))


def _terms_and_partials(
    kind: str, a: Tensor, b: Tensor, beta: float, skew: float, smallest: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    p, q = a.exp(), b.exp()

    def times(weight: Tensor, log: Tensor) -> Tensor:
        # A probability that the arithmetic does not have is 0, also beside an infinite logarithm.
        return torch.where((weight == 0) | (weight < smallest) & (log.abs() == torch.inf), 0, weight * log)

    def log_mixture(weight: float) -> Tensor:
        return torch.logaddexp(b + math.log(weight) if weight else b - torch.inf, a + math.log1p(-weight))

    def skewed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL(q‖m) with m = skew·q + (1−skew)·p: terms, partials towards log p, towards log q."""
        lm = torch.logaddexp(b + math.log(skew) if skew else b - torch.inf, a + math.log1p(-skew))
        terms = times(q_of(b), b - lm)
        q_over_m = torch.where(b == -torch.inf, 0, (b - lm).exp())
        p_over_m = torch.where(a == -torch.inf, 0, (a - lm).exp())
        return terms, -(1 - skew) * times(q_of(b), p_over_m), terms + q_of(b) - skew * times(q_of(b), q_over_m)

    def q_of(log: Tensor) -> Tensor:
        return log.exp()

    match kind.removeprefix("skew_") if skew == 0 else kind:
        case "forward_kl":
            terms = times(q, b - a)
            return terms, (-q, terms + q)
        case "reverse_kl":
            terms = times(p, a - b)
            return terms, (terms + p, -p)
        case "jeffreys":
            forward, reverse = times(q, b - a), times(p, a - b)
            return forward + reverse, (reverse + p - q, forward + q - p)
        case "jensen_shannon":
            lm = log_mixture(beta)
            to_p, to_q = (1 - beta) * times(p, a - lm), beta * times(q, b - lm)
            return to_p + to_q, (to_p, to_q)
        case "total_variation":
            sign = torch.where(a == b, 0, (a - b).sign()).nan_to_num(nan=0.0)
            return (p - q).abs() / 2, (sign * p / 2, -sign * q / 2)
        case "squared_hellinger":
            root = ((a + b) / 2).exp()
            return ((a / 2).exp() - (b / 2).exp()).square() / 2, ((p - root) / 2, (q - root) / 2)
        case "cross_entropy":
            terms = -times(q, a)
            return terms, (-q, terms)
        case "skew_forward_kl":
            terms, to_p, to_q = skewed(a, b)
            return terms, (to_p, to_q)
        case "skew_reverse_kl":
            terms, to_q, to_p = skewed(b, a)
            return terms, (to_p, to_q)
    raise AssertionError(kind)
