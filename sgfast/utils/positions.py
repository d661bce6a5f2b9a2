"""Positions of tokens in padded batches."""

from torch import Tensor


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Return positions (B, T) that count attended tokens from 0, correct for left and for right padding.

    Example:
        >>> import torch
        >>> position_ids_of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
        tensor([[0, 0, 0, 1],
                [0, 1, 2, 2]])
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
