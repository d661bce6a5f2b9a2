"""The divergences' formulas in plain PyTorch. Double backward differentiates them with autograd."""

import torch
from torch import Tensor

from sgfast.ops import rows
from sgfast.ops.divergence.atoms import Settings
from sgfast.ops.divergence.chunks import indices_of_mask, no_support, settings_of
from sgfast.ops.divergence.problem import Problem
from sgfast.ops.topk.selection import unpack_union


def definition_values(problem: Problem, kept_indices: Tensor | None = None) -> Tensor:
    """Compute the values (kinds, ...) so that autograd can differentiate them; keeps several temporaries per logit.

    ``kept_indices`` are the indices of a top-k support.
    """
    noisy, clean, mask = problem.noisy, problem.clean, problem.mask
    dtype = rows.compute_dtype(noisy, clean)
    indices, valid = no_support(noisy)
    if problem.support_mask is not None:
        indices, valid = indices_of_mask(problem.support_mask)
    elif problem.top_k:
        assert kept_indices is not None
        indices, valid = unpack_union(kept_indices)
    if mask is not None:
        # Masked rows are replaced before the arithmetic, so that a NaN in a masked row cannot reach a gradient.
        noisy, clean = (torch.where(mask[..., None], side, 0) for side in (noisy, clean))
        indices, valid = indices.clamp(min=0), valid | ~mask[..., None]
    clean_temperature = problem.temperature if problem.clean_temperature is None else problem.clean_temperature
    values = _values(
        noisy.to(dtype),
        clean.to(dtype),
        settings_of(problem),
        indices,
        valid,
        (problem.temperature, clean_temperature),
        problem.labels,
    )
    return values if mask is None else torch.where(mask, values, 0)


def _values(
    noisy: Tensor,
    clean: Tensor,
    settings: Settings,
    indices: Tensor,
    valid: Tensor,
    temperatures: tuple[Tensor, Tensor],
    labels: Tensor | None,
) -> Tensor:
    a, b = (
        _log_probabilities(logits / temperature[..., None], settings.support, indices, valid)
        for logits, temperature in zip((noisy, clean), temperatures, strict=True)
    )
    values = [_definition(kind, a, b, settings).sum(-1) for kind in settings.divergences]
    if labels is not None:
        at_label = noisy.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        if settings.label_smoothing > 0:
            at_label = (1 - settings.label_smoothing) * at_label + settings.label_smoothing * noisy.mean(-1)
        values.append(torch.where(labels < 0, 0, noisy.logsumexp(-1) - at_label))
    return torch.stack(values)


def _log_probabilities(logits: Tensor, support: str, indices: Tensor, valid: Tensor) -> Tensor:
    """Compute the log-probabilities of the support's atoms; finite, so that 0 · log 0 = 0 also in gradients."""
    if support == "full":
        return logits.log_softmax(-1).clamp(min=-1e30)
    if support == "renormalize":
        return logits.gather(-1, indices).masked_fill(~valid, -torch.inf).log_softmax(-1).clamp(min=-1e30)
    log_probabilities = logits.log_softmax(-1)
    atoms = log_probabilities.gather(-1, indices).masked_fill(~valid, -torch.inf)
    if support == "tail":
        outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, indices, False)
        # A finite floor: the log-sum-exp of an empty tail has no gradient.
        tail = log_probabilities.masked_fill(~outside, -1e30).logsumexp(-1, keepdim=True)
        atoms = torch.cat([atoms, tail], dim=-1)
    return atoms.clamp(min=-1e30)


def _definition(kind: str, a: Tensor, b: Tensor, settings: Settings) -> Tensor:
    """Compute the terms of one kind from a = log p and b = log q."""
    p, q, beta, skew = a.exp(), b.exp(), settings.beta, settings.skew

    def log_mixture(weight: float) -> Tensor:  # log(weight·q + (1−weight)·p)
        weights = torch.tensor([weight, 1 - weight], dtype=a.dtype, device=a.device).log()
        return torch.logaddexp(b + weights[0], a + weights[1]).clamp(min=-1e30)

    match kind:
        case "forward_kl":
            return q * (b - a)
        case "reverse_kl":
            return p * (a - b)
        case "jeffreys":
            return (p - q) * (a - b)
        case "jensen_shannon":
            m = log_mixture(beta)
            return beta * q * (b - m) + (1 - beta) * p * (a - m)
        case "total_variation":
            return (p - q).abs() / 2
        case "squared_hellinger":
            return ((a / 2).exp() - (b / 2).exp()).square() / 2
        case "cross_entropy":
            return -q * a
        case "skew_forward_kl":
            return q * (b - log_mixture(skew))
        case "skew_reverse_kl":
            return p * (a - log_mixture(1 - skew))
    raise AssertionError(kind)
