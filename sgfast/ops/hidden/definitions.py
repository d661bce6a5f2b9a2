"""The distances' formulas in plain PyTorch, for autograd: double backward differentiates them."""

import torch
from torch import Tensor

from sgfast.ops import rows


def definition_values(noisy: Tensor, clean: Tensor, eps: float) -> Tensor:
    """Compute the four fields (4, ...) so that autograd can differentiate them."""
    a, b = (side.to(rows.compute_dtype(noisy, clean)) for side in (noisy, clean))
    difference = a - b
    squared_l2 = difference.square().sum(-1)
    a_norm, b_norm = _safe_sqrt(a.square().sum(-1)), _safe_sqrt(b.square().sum(-1))
    l2 = _safe_sqrt(squared_l2)
    both = both_nonzero(a_norm, b_norm)
    norm_difference = (difference * (a + b)).sum(-1) / torch.where(both, a_norm + b_norm, 1)
    product = torch.where(both, 2 * a_norm * b_norm, 1)
    cosine_distance = (squared_l2 - norm_difference.square()) / product
    far = far_apart(l2, a_norm, b_norm)
    similarity = torch.where(far, 2 * (a * b).sum(-1) / product, 1 - cosine_distance)
    cosine_distance = torch.where(far, 1 - similarity, cosine_distance)
    similarity, cosine_distance = torch.where(both, similarity, 0), torch.where(both, cosine_distance, 1)
    return torch.stack([cosine_distance, l2, l2 / b_norm.clamp(min=eps), similarity])


def far_apart(l2: Tensor, a_norm: Tensor, b_norm: Tensor) -> Tensor:
    """Mark the rows with ‖a − b‖ > min(‖a‖, ‖b‖)."""
    return l2 > torch.minimum(a_norm, b_norm)


def _safe_sqrt(squares: Tensor) -> Tensor:
    """√ with gradient 0 at 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def both_nonzero(a_norm: Tensor, b_norm: Tensor) -> Tensor:
    """Mark the rows whose squared norms are both normal numbers, so that 1/(‖a‖‖b‖) is finite and exact."""
    tiny = torch.finfo(a_norm.dtype).tiny
    return (a_norm.square() >= tiny) & (b_norm.square() >= tiny)
