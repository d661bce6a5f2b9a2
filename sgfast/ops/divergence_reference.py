"""The divergences' definitions in plain PyTorch, for autograd: what double backward differentiates."""

import torch
from torch import Tensor

from sgfast.ops.divergence_rows import LABEL_KIND, Settings


def reference(
    noisy: Tensor,
    clean: Tensor,
    settings: Settings,
    indices: Tensor,
    valid: Tensor,
    temperature: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """The definitions of `divergence`, by autograd: (kinds, ...). Keeps several temporaries per logit."""
    a, b = (
        _reference_log_probabilities(logits / temperature[..., None], settings.support, indices, valid)
        for logits in (noisy, clean)
    )
    values = [_definition(kind, a, b, settings).sum(-1) for kind in settings.kinds if kind != LABEL_KIND]
    if labels is not None:
        at_label = noisy.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        if settings.label_smoothing > 0:
            at_label = (1 - settings.label_smoothing) * at_label + settings.label_smoothing * noisy.mean(-1)
        values.append(torch.where(labels < 0, 0, noisy.logsumexp(-1) - at_label))
    return torch.stack(values)


def _reference_log_probabilities(logits: Tensor, support: str, indices: Tensor, valid: Tensor) -> Tensor:
    """Log-probabilities of the support's atoms; finite, so that 0 · log 0 = 0 also in gradients."""
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
    """Terms from a = log p and b = log q."""
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
