"""Checks at the door, shared by the operations: shapes, dtypes and devices only, never values on a GPU."""

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sgfast.ops.rows import DEFAULT_CHUNK_BYTES

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_TYPES = (Tensor, nn.Parameter)
# Classes of tensors that PyTorch makes from plain tensors while it traces, and until a collective has ended.
_STAND_INS = ("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor")
# No name is longer. A longer text is no misspelt name, and the search for close names costs memory by its length.
_LONGEST_NAME = 100


def check_tensor(name: str, tensor: Any, wanted: str = "a torch.Tensor", beside: Tensor | None = None) -> None:
    """Check for a tensor of plain numbers in strided memory. Every tensor argument must be such a tensor.

    A tensor ``beside`` another tensor may be a meta tensor here. `check_device` compares the two devices with a better
    message.

    Raises:
        TypeError: not a tensor, or a tensor that is sparse, nested, quantised, complex, without values, or of a class
            that computes in its own way.
        ValueError: a DTensor, whatever its placements.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {wanted}; got {type(tensor).__name__}")
    if type(tensor) not in _PLAIN_TYPES:
        _check_class(name, tensor)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got one of layout {tensor.layout}: give {name}.to_dense()")
    if tensor.is_nested:
        raise TypeError(f"{name} must be one rectangular tensor; got a nested one: give a padded tensor and a mask")
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers; got {tensor.dtype}")
    if tensor.is_quantized:
        raise TypeError(f"{name} must not be quantised; got {tensor.dtype}: give {name}.dequantize()")
    if beside is None and tensor.device.type == "meta":
        raise TypeError(f"{name} must hold values; got a meta tensor")


def check_tensors(**arguments: Any) -> None:
    """Run `check_tensor` on the arguments that are tensors. Arguments of other types have checks of their own."""
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            check_tensor(name, argument)


def _check_class(name: str, tensor: Tensor) -> None:
    """Check a tensor whose class is neither Tensor nor Parameter."""
    if hasattr(tensor, "placements"):
        raise ValueError(
            f"{name} must be a plain tensor; got a DTensor with the placements {tuple(tensor.placements)}: "
            f"give {name}.full_tensor()"
        )
    kind = type(tensor)
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        raise TypeError(f"{name} must hold values; got an {kind.__name__}")
    # A class without its own dispatch adds names or attributes to a tensor. It changes no operation.
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and kind.__name__ not in _STAND_INS:
        raise TypeError(f"{name} must be a plain tensor; got a {kind.__name__}")


def check_pair(first_name: str, first: Tensor, second_name: str, second: Tensor, beside: Tensor | None = None) -> None:
    """Check two floating tensors of one shape (at least one dimension) on one device; ``beside``: `check_tensor`."""
    check_floating(first_name, first, beside)
    check_floating(second_name, second, first)
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have one shape; got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if first.dim() == 0 or first.shape[-1] == 0:
        raise ValueError(f"{first_name} needs a last dimension of at least 1; got shape {tuple(first.shape)}")
    check_device(second_name, second, first_name, first)


def check_floating(name: str, tensor: Tensor, beside: Tensor | None = None) -> None:
    """Check for a float32, bfloat16, float16 or float64 tensor; ``beside``: see `check_tensor`."""
    check_tensor(name, tensor, beside=beside)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors lie on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on one device; got {tensor.device} and {other.device}")


def row_mask(mask: Tensor | None, name: str, like_name: str, like: Tensor) -> Tensor | None:
    """Check a mask of ``like``'s shape without its last dimension and return it as bool."""
    if mask is None:
        return None
    check_tensor(name, mask, "a torch.Tensor or None", like)
    if mask.shape != like.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of {like_name} without its last dimension, "
            f"{tuple(like.shape[:-1])}; got {tuple(mask.shape)}"
        )
    check_device(name, mask, like_name, like)
    return as_bool(name, mask)


def as_bool(name: str, mask: Tensor) -> Tensor:
    """Return a mask as bool. This function alone defines a mask: bool, or numbers equal to 0 or 1.

    Other numbers are refused if a look at the values costs nothing (`values_are_at_hand`). Elsewhere every number but 0
    selects.

    Raises:
        TypeError: not a tensor, or of complex numbers.
        ValueError: a number that is neither 0 nor 1.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(mask).__name__}")
    if mask.dtype == torch.bool:
        return mask
    if mask.is_complex():
        raise TypeError(f"{name} must be bool or real numbers; got {mask.dtype}")
    selected = mask != 0
    if values_are_at_hand(mask):
        wrong = selected & (mask != 1)
        if wrong.any():
            raise ValueError(
                f"{name} must be bool, or numbers equal to 0 or 1; got {mask[wrong][0].item():.6g}. "
                "A mask selects positions; numbers that weigh them are DivergenceLoss's weights"
            )
    return selected


def values_are_at_hand(tensor: Tensor) -> bool:
    """Return True if a look at a tensor's values is free: on a CPU, outside of tracing and of vectorized rows.

    On a GPU a look at the values would stop the queue.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None  # make_fx
        and type(tensor) in (Tensor, torch.nn.Parameter)  # a fake tensor has no values
        and not torch._C._functorch.is_batchedtensor(tensor)
    )


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Check for one of the allowed names. The message for a wrong name suggests close names."""
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}; got {value!r}{did_you_mean(value, names)}")


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """Return a sentence with the allowed names that are close to a wrong name, or an empty string."""
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME:
        return ""
    names, asked = {name.lower(): name for name in allowed}, value.lower()
    close = difflib.get_close_matches(asked, names, n=2) or [name for name in names if asked in name]
    return f". Did you mean {' or '.join(repr(names[name]) for name in close)}?" if close else ""


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


def check_real(name: str, value: Any) -> float:
    """Check for a number that is not NaN and return it as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be a number that a float can hold") from error
    if math.isnan(number):
        raise ValueError(f"{name} must be a number; got nan")
    return number


def check_finite(name: str, value: Any) -> float:
    """Check for a finite number and return it as a float."""
    number = check_real(name, value)
    if math.isinf(number):
        raise ValueError(f"{name} must be finite; got {value}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """Check for True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {type(value).__name__}")
    return value


def check_integer(name: str, value: Any) -> int:
    """Check for an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    return value


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Check for an int of at least ``least``."""
    count = check_integer(name, value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}; got {count}")
    return count


def check_seed(seed: Any) -> int | None:
    """Check for None or an int of 64 bits."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int or None; got {type(seed).__name__}")
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"seed must be None or lie in [0, 2**64); got {seed}")
    return seed


def check_table(name: str, table: Tensor) -> None:
    """Check for a floating tensor (V, D), both at least 1."""
    check_floating(name, table)
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"{name} must have shape (V, D), both at least 1; got {tuple(table.shape)}")
