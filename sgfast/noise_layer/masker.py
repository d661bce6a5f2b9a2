"""Suppress the features that tolerate the most noise."""

import math

import torch
from torch import Tensor

from sgfast.ops.topk import top_k_indices


class PercentMasker:
    """Mask exactly floor(percent · F + 1e-9) features of largest standard deviation; ties go to the lower index.

    Args:
        percent: fraction of the features, in [0, 1].
        feature_dimensions: how many trailing dimensions make up the features F of one unit; None for all but the
            first (one unit is a sample).

    Raises:
        ValueError: percent outside [0, 1].

    Example:
        >>> import torch
        >>> PercentMasker(0.5)(torch.tensor([[0.1, 0.4, 0.2, 0.4]]))
        tensor([[False,  True, False,  True]])
    """

    def __init__(self, percent: float, feature_dimensions: int | None = None) -> None:
        if not 0 <= percent <= 1:
            raise ValueError(f"percent_to_mask must lie in [0, 1]; got {percent}")
        self.percent = float(percent)
        self.feature_dimensions = feature_dimensions

    def __call__(self, std: Tensor) -> Tensor:
        """The boolean mask of ``std``'s shape, True = suppressed."""
        dimensions = std.dim() - 1 if self.feature_dimensions is None else self.feature_dimensions
        units = std.detach().flatten(std.dim() - dimensions).flatten(0, -2)
        masked = math.floor(self.percent * units.shape[-1] + 1e-9)
        mask = torch.zeros_like(units, dtype=torch.bool)
        if masked:
            mask.scatter_(-1, top_k_indices(units, masked), True)
        return mask.view(std.shape)
