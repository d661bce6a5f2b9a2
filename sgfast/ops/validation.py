"""Checks at the door, shared by the operations: shapes, dtypes and devices only, never values on a GPU."""

import torch
from torch import Tensor

from sgfast.ops.rows import DEFAULT_CHUNK_BYTES

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Check two floating tensors of one shape (at least one dimension) on one device."""
    for name, tensor in ((first_name, first), (second_name, second)):
        check_floating(name, tensor)
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have one shape; got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if first.dim() == 0 or first.shape[-1] == 0:
        raise ValueError(f"{first_name} needs a last dimension of at least 1; got shape {tuple(first.shape)}")
    check_device(second_name, second, first_name, first)


def check_floating(name: str, tensor: Tensor) -> None:
    """Check for a float32, bfloat16, float16 or float64 tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors lie on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on one device; got {tensor.device} and {other.device}")


def row_mask(mask: Tensor | None, name: str, like_name: str, like: Tensor) -> Tensor | None:
    """Check a mask of ``like``'s shape without its last dimension and return it as bool (nonzero = selected)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None; got {type(mask).__name__}")
    if mask.shape != like.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of {like_name} without its last dimension, "
            f"{tuple(like.shape[:-1])}; got {tuple(mask.shape)}"
        )
    check_device(name, mask, like_name, like)
    return mask if mask.dtype == torch.bool else mask != 0


def check_number(name: str, value: float) -> None:
    """Check for an int or a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def chunk_bytes(max_chunk_bytes: int | None) -> int:
    """Check the bound on temporaries and fill in the default."""
    if max_chunk_bytes is None:
        return DEFAULT_CHUNK_BYTES
    if isinstance(max_chunk_bytes, bool) or not isinstance(max_chunk_bytes, int):
        raise TypeError(f"max_chunk_bytes must be an int or None; got {type(max_chunk_bytes).__name__}")
    if max_chunk_bytes < 1:
        raise ValueError(f"max_chunk_bytes must be positive; got {max_chunk_bytes}")
    return max_chunk_bytes
