"""Helpers for tensors."""

import torch
from torch import Tensor


def split_2d(tensor: Tensor, max_batch_size: int | None, max_sequence_length: int | None) -> list[list[Tensor]]:
    """Split a tensor along its first two dimensions, without copying.

    Args:
        tensor: (B, T, ...).
        max_batch_size: the number of rows of a piece. The last pieces may have fewer. None does not split the rows.
        max_sequence_length: the same for the second dimension.

    Returns:
        Views of ``tensor``: a list for each range of rows, which holds a view for each range of columns.

    Raises:
        ValueError: the tensor has fewer than two dimensions, or a size is below 1.
        TypeError: ``tensor`` is not a tensor, or a size is not an int.

    Example:
        >>> import torch
        >>> from sgfast.utils.torch import split_2d
        >>> [[piece.tolist() for piece in row] for row in split_2d(torch.arange(6).view(2, 3), 1, 2)]
        [[[[0, 1]], [[2]]], [[[3, 4]], [[5]]]]
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dim() < 2:
        raise ValueError(f"tensor must have at least two dimensions; got shape {tuple(tensor.shape)}")
    sizes = []
    limits = (("max_batch_size", max_batch_size), ("max_sequence_length", max_sequence_length))
    for (name, limit), length in zip(limits, tensor.shape, strict=False):
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
            raise TypeError(f"{name} must be an int or None; got {type(limit).__name__}")
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1 or None; got {limit}")
        # A dimension of length 0 is one piece of length 0.
        sizes.append(max(length, 1) if limit is None else limit)
    batch_size, sequence_length = sizes
    return [list(torch.split(rows, sequence_length, dim=1)) for rows in torch.split(tensor, batch_size, dim=0)]
