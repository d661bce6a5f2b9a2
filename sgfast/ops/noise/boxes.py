"""Boxes of a tensor that are contiguous in the linear order: how `operator` bounds its memory.

A draw belongs to an element's place in the linear order, and means and stds may be broadcast. Chunks of rows are
therefore not enough. A box is a view of tensors of any strides.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sgfast.ops import rows
from sgfast.ops.noise import philox
from sgfast.ops.noise.definitions import noised_values

Index = tuple[int | slice, ...]


def boxes_of(shape: Sequence[int]) -> Iterator[tuple[Index, int, int]]:
    """Cut a tensor into boxes that are contiguous in the linear order: (index, first element, number of elements).

    A box fixes the leading dimensions, takes a range of the next one and all of the rest, so that it is a view of a
    tensor of any strides, broadcast ones included.
    """
    split, inner, most = len(shape), 1, philox.chunk_elements()
    while split > 0 and inner * shape[split - 1] <= most:
        split -= 1
        inner *= shape[split]
    if split == 0:
        if inner > 0:
            yield (), 0, inner
        return
    length, step = shape[split - 1], max(1, most // inner)
    for position, outer in enumerate(itertools.product(*map(range, shape[: split - 1]))):
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield (*outer, slice(start, stop)), (position * length + start) * inner, (stop - start) * inner


def new_sum(like: Tensor, shape: Sequence[int], needed: bool) -> Tensor:
    """Make the tensor that collects the gradient of ``like``, which was broadcast to ``shape``; (0,) if not needed.

    The gradient of a tensor of the full shape is written once, in its own dtype. A smaller gradient gets a contribution
    from each box, many thousand perhaps: the sum is kept in float64.
    """
    if not needed:
        return like.new_empty(0)
    if like.shape == torch.Size(shape):
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    padded = (1,) * (len(shape) - like.dim()) + tuple(like.shape)
    return like.new_zeros(padded, dtype=torch.float64)


def add_box(total: Tensor, index: Index, gradient: Tensor, full: Sequence[int]) -> None:
    """Add a box of the ``full``-shaped gradient, summed over the dimensions that were broadcast."""
    if total.shape == torch.Size(full):
        total[index] = gradient
        return
    # In a dimension of size 1 every position of the box belongs to the one element.
    within = (
        position if size > 1 else 0 if isinstance(position, int) else slice(None)
        for position, size in zip(index, total.shape, strict=False)
    )
    part = total[tuple(within)]
    part += gradient.sum_to_size(part.shape)


def box_gradients(
    upstream: Tensor,
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    eps: Tensor | None,
    noise_mask: Tensor | None,
    keep_mask: Tensor | None,
    lowest: float | None,
    highest: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gradients to input, mean and std, before any sum, in the arithmetic's dtype.

    Without ``eps`` the gradient to std is None; nothing may be clamped then.
    """
    of_mean = upstream = upstream.to(rows.compute_dtype(input))
    if noise_mask is not None:
        of_mean = torch.where(noise_mask, of_mean, 0)
    if eps is not None and not (lowest is None and highest is None):
        noised = noised_values(input, mean, std, eps, keep_mask)
        low, high = -math.inf if lowest is None else lowest, math.inf if highest is None else highest
        of_mean = torch.where((noised >= low) & (noised <= high), of_mean, 0)
    kept = of_mean if keep_mask is None else torch.where(keep_mask, of_mean, 0)
    of_input = kept if noise_mask is None else torch.where(noise_mask, kept, upstream)
    return of_input, of_mean, None if eps is None else kept * eps.to(input.dtype).to(kept.dtype)
