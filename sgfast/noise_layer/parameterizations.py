"""Maps from an unbounded parameter rho to a standard deviation sigma inside a scale, and back.

Both parameterizations compute in float32 (float64 stays float64) whatever the parameter's dtype. In bfloat16 the
saturating function would round to its ends long before it reaches them, and its gradient would be 0.
"""

import math

import torch
from torch import Tensor

from sgfast.noise_layer.arguments import Scale, check_scale
from sgfast.ops.validation import check_real


def _wide(rho: Tensor) -> Tensor:
    return rho if rho.dtype == torch.float64 else rho.float()


class CloakStandardDeviationParameterization:
    """sigma = min + (max − min) · (1 + tanh(rho / shallow)) / 2, onto the open interval (min, max).

    The code computes min + (max − min) · sigmoid(2 rho / shallow). If |rho| / shallow is above about 9, float32 rounds
    to the ends of the interval, never past them. ``shallow`` acts as a temperature, by default 1. Its place as a
    divisor of rho is our choice. The tanh form comes from the published Cloak code (Mireshghallah et al. 2021).

    Args:
        scale: (min, max), 0 ≤ min < max.
        shallow: positive.

    Raises:
        ValueError: scale or shallow out of range.
        TypeError: scale is no pair of numbers, shallow no number.

    Example:
        >>> import torch
        >>> parameterization = CloakStandardDeviationParameterization((0.0, 2.0))
        >>> parameterization(torch.zeros(1))
        tensor([1.])
        >>> parameterization.inverse(parameterization(torch.tensor([-1.5])))
        tensor([-1.5000])
    """

    def __init__(self, scale: Scale = (1e-4, 2.0), shallow: float = 1.0) -> None:
        self.scale = check_scale(scale)
        self.shallow = check_real("shallow", shallow)
        if not 0 < self.shallow < math.inf:
            raise ValueError(f"shallow must be positive; got {shallow}")

    def __call__(self, rho: Tensor) -> Tensor:
        """Return sigma of rho's shape, in float32 (float64)."""
        minimum, maximum = self.scale
        sigma = minimum + (maximum - minimum) * torch.sigmoid(2 / self.shallow * _wide(rho))
        # The sum can round to the number after max. The sigmoid is flat there, so the clamp costs no gradient.
        return sigma.clamp(minimum, maximum)

    def inverse(self, sigma: Tensor) -> Tensor:
        """Return the rho of a sigma: ±inf at the ends of the interval, NaN outside the interval."""
        minimum, maximum = self.scale
        return self.shallow / 2 * ((_wide(sigma) - minimum) / (maximum - _wide(sigma))).log()


class DirectStandardDeviationParameterization:
    """sigma = clamp(rho, min, max): rho is the standard deviation itself; no gradient outside the interval.

    Args:
        scale: (min, max), 0 ≤ min < max.

    Raises:
        ValueError: scale out of range.
        TypeError: scale is no pair of numbers.

    Example:
        >>> import torch
        >>> DirectStandardDeviationParameterization((0.5, 2.0))(torch.tensor([0.1, 1.0, 9.0]))
        tensor([0.5000, 1.0000, 2.0000])
    """

    def __init__(self, scale: Scale = (1e-4, 2.0)) -> None:
        self.scale = check_scale(scale)

    def __call__(self, rho: Tensor) -> Tensor:
        """Return sigma of rho's shape, in float32 (float64)."""
        return _wide(rho).clamp(*self.scale)

    def inverse(self, sigma: Tensor) -> Tensor:
        """Return the rho of a sigma: sigma itself."""
        return _wide(sigma)
