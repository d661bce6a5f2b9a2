"""Distances of a chunk of rows and their gradients, by formula."""

import torch
from torch import Tensor

from sgfast.ops import rows
from sgfast.ops.hidden.definitions import both_nonzero, far_apart


def forward_rows(noisy: Tensor, clean: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute values (4, rows) and the row scalars (4, rows) for backward from two tensors (rows, D)."""
    a, b = (side.to(rows.compute_dtype(noisy, clean)) for side in (noisy, clean))
    difference = a - b
    # sum() adds in pairs; vector_norm and vecdot add in sequence, which costs a digit by D = 16384.
    l2, a_norm, b_norm = (side.square().sum(-1).sqrt() for side in (difference, a, b))
    both = both_nonzero(a_norm, b_norm)
    norm_difference = (difference * (a + b)).sum(-1) / torch.where(both, a_norm + b_norm, 1)
    norm_difference = torch.where(both, norm_difference, 0)
    # The numerator is ≥ 0 by the triangle inequality; rounding may leave −1 ulp.
    numerator = (l2.square() - norm_difference.square()).clamp(min=0)
    product = torch.where(both, 2 * a_norm * b_norm, 1)
    cosine_distance = numerator / product
    far = far_apart(l2, a_norm, b_norm)
    similarity = torch.where(far, (2 * (a * b).sum(-1) / product).clamp(-1, 1), 1 - cosine_distance)
    cosine_distance = torch.where(far, 1 - similarity, cosine_distance)
    similarity, cosine_distance = torch.where(both, similarity, 0), torch.where(both, cosine_distance, 1)
    values = torch.stack([cosine_distance, l2, l2 / b_norm.clamp(min=eps), similarity])
    return values, torch.stack([l2, a_norm, b_norm, norm_difference])


def _row_coefficients(upstream: Tensor, row_scalars: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (t, r, s): the gradients are t·(a − b) + r·a to a and t·(b − a) + s·b to b."""
    g_cosine, g_l2, g_normalized, g_similarity = upstream
    l2, a_norm, b_norm, norm_difference = row_scalars
    both, apart = both_nonzero(a_norm, b_norm), l2 > 0
    a_safe, b_safe, l2_safe = (torch.where(ok, norm, 1) for ok, norm in ((both, a_norm), (both, b_norm), (apart, l2)))
    g_cosine = torch.where(both, g_cosine - g_similarity, 0)
    inverse = 1 / (a_safe * b_safe)
    cosine_distance = (l2.square() - norm_difference.square()).clamp(min=0) * inverse / 2
    clamped = b_norm.clamp(min=eps)
    towards = torch.where(apart, (g_l2 + g_normalized / clamped) / l2_safe, 0) + g_cosine * inverse
    along_a = -g_cosine * (norm_difference * inverse + cosine_distance / a_safe) / a_safe
    along_b = -g_cosine * (-norm_difference * inverse + cosine_distance / b_safe) / b_safe
    shrinking = torch.where(b_norm > eps, g_normalized * l2 / clamped / clamped / clamped, 0)
    return towards, along_a, along_b - shrinking


def backward_rows(
    noisy: Tensor,
    clean: Tensor,
    upstream: Tensor,
    row_scalars: Tensor,
    eps: float,
    needs_noisy: bool,
    needs_clean: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute gradients (rows, D) to the sides that need one, in the arithmetic's dtype."""
    a, b = (side.to(rows.compute_dtype(noisy, clean)) for side in (noisy, clean))
    towards, along_a, along_b = (one[:, None] for one in _row_coefficients(upstream, row_scalars, eps))
    step = towards * (a - b)
    return step + along_a * a if needs_noisy else None, along_b * b - step if needs_clean else None
