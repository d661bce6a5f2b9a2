"""Checks of the presets' arguments, and means that stay finite. Sizes are compared, never broadcast."""

import torch
from torch import Tensor

from sgfast.ops import rows, validation


def check_mask(mask: Tensor | None, shape: torch.Size, like_name: str, *states: Tensor) -> None:
    """Check an inputs mask against the (batch, length) of the masked tensor."""
    if mask is None:
        return
    validation.check_tensor("mask", mask, "a torch.Tensor or None", *states[:1])
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)} for this {like_name}; got {tuple(mask.shape)}")
    for state in states:
        validation.check_device("mask", mask, like_name, state)
    validation.as_bool("mask", mask)


def mask_weights(mask: Tensor, *states: Tensor) -> Tensor:
    """Return the mask as weights in the arithmetic's dtype, because counts of tokens do not fit half precision."""
    return mask.to(rows.compute_dtype(*states)).contiguous()


def over(total: Tensor, count: Tensor) -> Tensor:
    """Return total / count, and 0 · total if the count is 0, which has a value and gradients of exactly 0."""
    return total / torch.where(count == 0, 1, count)


def mean(values: Tensor) -> Tensor:
    """Return the mean, and 0 for no values."""
    return values.sum() / max(values.numel(), 1)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of the values where the mask is 1. Other values must be 0. An empty selection gives 0."""
    return mean(values) if mask is None else over(values.sum(), (mask != 0).sum())
