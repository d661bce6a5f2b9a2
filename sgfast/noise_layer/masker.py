"""Suppress the features that tolerate the most noise."""

import math

import torch
from torch import Tensor

from sgfast.ops.topk.selection import top_k_indices
from sgfast.ops.validation import check_count, check_real


class PercentMasker:
    """Mask exactly floor(percent · F + 1e-9) features of largest standard deviation; ties go to the lower index.

    Args:
        percent: fraction of the features, in [0, 1].
        feature_dimensions: number of trailing dimensions that make up the features F of one unit; None for all
            dimensions but the first (one unit is a sample).

    Raises:
        ValueError: percent outside [0, 1], feature_dimensions below 1 or more than the standard deviations have.
        TypeError: percent is no number, feature_dimensions no int.

    Example:
        >>> import torch
        >>> PercentMasker(0.5)(torch.tensor([[0.1, 0.4, 0.2, 0.4]]))
        tensor([[False,  True, False,  True]])
    """

    def __init__(self, percent: float, feature_dimensions: int | None = None) -> None:
        self.percent = check_real("percent_to_mask", percent)
        if not 0 <= self.percent <= 1:
            raise ValueError(f"percent_to_mask must lie in [0, 1]; got {percent}")
        if feature_dimensions is not None:
            check_count("feature_dimensions", feature_dimensions)
        self.feature_dimensions = feature_dimensions

    def __call__(self, std: Tensor) -> Tensor:
        """Return the boolean mask of ``std``'s shape, True = suppressed."""
        dimensions = std.dim() - 1 if self.feature_dimensions is None else self.feature_dimensions
        if not 0 < dimensions <= std.dim():
            raise ValueError(f"std must have at least {max(dimensions, 2)} dimensions; got shape {tuple(std.shape)}")
        features = math.prod(std.shape[std.dim() - dimensions :])
        units = std.detach().reshape(-1, features)
        masked = math.floor(self.percent * features + 1e-9)
        mask = torch.zeros_like(units, dtype=torch.bool)
        if masked:
            mask.scatter_(-1, top_k_indices(units, masked), True)
        return mask.view(std.shape)
