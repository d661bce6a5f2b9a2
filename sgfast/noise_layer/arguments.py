"""Checks of the arguments that only noise layers have: scale, value range and input shape."""

import math
from collections.abc import Sequence
from typing import Any

from sgfast.ops.validation import check_real

Scale = tuple[float, float]
ValueRange = tuple[float | None, float | None]


def check_scale(scale: Any) -> Scale:
    """Check ``(min, max)`` with 0 ≤ min < max, a pair of numbers or a tensor of two, and return it as floats."""
    try:
        # A string is a sequence too, and each of its digits would be a bound.
        bounds = [] if isinstance(scale, str | bytes) else list(scale)
        if not bounds or any(isinstance(bound, str | bytes | bool) for bound in bounds):
            raise TypeError
        bounds = [float(bound) for bound in bounds]
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"scale must be a pair of numbers, (min, max); got {repr(scale)[:100]}") from error
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"scale must be (min, max) with 0 <= min < max; got {scale}")
    return bounds[0], bounds[1]


def check_log_scale(scale: Scale) -> None:
    """Check that log sigma and 1/sigma are finite over a noise layer's scale."""
    if not scale[0] > 0:
        raise ValueError(
            f"a loss with log sigma or 1/sigma needs a noise layer whose scale starts above 0; got {scale}"
        )


def check_value_range(value_range: Any) -> ValueRange | None:
    """Check ``(low or None, high or None)`` with low ≤ high."""
    if value_range is None:
        return None
    if not isinstance(value_range, Sequence) or isinstance(value_range, str):
        raise TypeError(f"value_range must be (low or None, high or None), or None; got {type(value_range).__name__}")
    if len(value_range) != 2:
        raise ValueError(f"value_range must be (low or None, high or None); got {value_range}")
    low, high = (None if bound is None else check_real("a bound of value_range", bound) for bound in value_range)
    if low is not None and high is not None and not low <= high:
        raise ValueError(f"value_range must have low <= high; got {value_range}")
    return low, high


def check_input_shape(input_shape: Any) -> tuple[int, ...] | None:
    """Check a shape. The first dimension, the batch, may be any int (−1, say); the other dimensions are positive."""
    if input_shape is None:
        return None
    if not isinstance(input_shape, Sequence) or not all(
        isinstance(size, int) and not isinstance(size, bool) for size in input_shape
    ):
        raise TypeError(f"input_shape must be a tuple of ints, or None; got {input_shape!r}")
    if len(input_shape) == 0 or not all(size > 0 for size in input_shape[1:]):
        raise ValueError(
            f"input_shape must be the batch dimension followed by positive sizes; got {tuple(input_shape)}"
        )
    return tuple(input_shape)
