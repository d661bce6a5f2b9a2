"""The noise operation for given draws, in plain PyTorch; autograd differentiates it for double backward."""

import torch
from torch import Tensor

from sgfast.ops import rows


def definition_values(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    eps: Tensor,
    noise_mask: Tensor | None,
    keep_mask: Tensor | None,
    lowest: float | None,
    highest: float | None,
) -> Tensor:
    """The operation for given draws, differentiable by autograd."""
    noised = noised_values(input, mean, std, eps, keep_mask)
    if lowest is not None or highest is not None:
        noised = noised.clamp(lowest, highest)
    noised = noised.to(input.dtype)
    return noised if noise_mask is None else torch.where(noise_mask, noised, input)


def noised_values(input: Tensor, mean: Tensor, std: Tensor, eps: Tensor, keep_mask: Tensor | None) -> Tensor:
    """Every element's value before clamp and selection, in the arithmetic's dtype."""
    dtype = rows.compute_dtype(input)
    noised = (std.to(dtype) * eps.to(input.dtype).to(dtype)).add_(input.to(dtype))
    if keep_mask is not None:
        noised = torch.where(keep_mask, noised, 0)
    return noised.add_(mean.to(dtype))
