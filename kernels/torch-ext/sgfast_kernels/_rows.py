"""Addresses of the rows of a tensor of any rank, and the options that every launch shares."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton up to 3.9 contracts a·b + c into one instruction by default; Triton 3.10 and later do not. The stated accuracy
# and instruction counts of the kernels hold with contraction.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


class RowStrides(NamedTuple):
    """Elements from one outer row to the next, and from one inner row to the next."""

    outer: int
    inner: int


class RowLayout(NamedTuple):
    """Row ``i`` starts at element ``i // inner * strides.outer + i % inner * strides.inner``.

    A kernel takes ``inner`` and ``strides`` as two arguments. Triton compiles a kernel again when an integer of a tuple
    becomes 1 or a multiple of 16, and ``do_not_specialize`` does not reach into tuples. Aligned loads need this
    specialisation of the strides. ``inner`` is a number of rows, which must not compile a kernel again, and stays
    outside the tuple.
    """

    inner: int
    strides: RowStrides


def row_layout(tensor: Tensor) -> RowLayout | None:
    """Return the layout of the rows of a (..., D) tensor, or None if two strides over the rows do not describe them.

    Two strides cover contiguous tensors, slices such as ``logits[:, :-1]`` and one transposition of the leading
    dimensions. The elements of a row must be contiguous.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    levels: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    inner, inner_stride = levels[-1] if levels else (1, 0)
    return RowLayout(inner, RowStrides(levels[0][1] if len(levels) == 2 else 0, inner_stride))


def required_layout(tensor: Tensor) -> RowLayout:
    """Return the layout of a tensor. The caller knows that its rows have a layout."""
    layout = row_layout(tensor)
    assert layout is not None, f"strides {tensor.stride()}"
    return layout


def vector_columns(*tensors: Tensor) -> int:
    """Return how many columns one 16-byte load covers if every row of every tensor starts aligned, else 1."""
    for tensor in tensors:
        layout = required_layout(tensor)
        # Triton takes an integer argument as aligned when it is a multiple of 16.
        if tensor.data_ptr() % 16 or any(n % 16 for n in (tensor.shape[-1], *layout.strides)):
            return 1
    return 16 // max(tensor.element_size() for tensor in tensors)


def row_count(tensor: Tensor) -> int:
    """Return how many rows a (..., D) tensor has."""
    return tensor.shape[:-1].numel()


def mask_rows(mask: Tensor | None) -> Tensor | None:
    """Return a mask of rows as one byte per row, as Triton reads it."""
    return None if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which kernels launch on the tensor's device: Triton launches on the current one."""
    if tensor.device.type in ("cuda", "xpu"):
        found: AbstractContextManager[None] = torch.get_device_module(tensor.device).device(tensor.device)
        return found
    return nullcontext()


@triton.jit
def row_start(i_row, inner, strides):
    """Offset of a row's first element; ``i_row`` is int64, since a tensor may hold more than 2³¹ elements."""
    return i_row // inner * strides.outer + i_row % inner * strides.inner


@triton.jit
def to_float32(b_x):
    """A block as float32.

    bfloat16 is shifted. The compiler joins a shift with the unpacking of loaded words, and does not join a conversion.
    This holds for blocks that are loaded into registers. A conversion is better for blocks that are staged through
    shared memory.
    """
    if b_x.dtype == tl.bfloat16:
        b_x = (b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return b_x.to(tl.float32)


@triton.jit
def sum_neighbours(b_x, BN: tl.constexpr, BD: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Sum the neighbouring columns of a thread, [BN, BD] → [BN, BD // NEIGHBOURS]; the thread then keeps one sum."""
    return tl.sum(tl.reshape(b_x, [BN, BD // NEIGHBOURS, NEIGHBOURS]), axis=2)


@triton.jit
def columns(b_x, LAST: tl.constexpr):
    """The slices of a 2-D block along its last dimension, or its first, as a tuple. Their number is a power of two."""
    if not LAST:
        b_x = tl.trans(b_x)
    return _slices(b_x)


@triton.jit
def _slices(b_x):
    return (tl.reshape(b_x, [b_x.shape[0]]),) if b_x.shape[1] == 1 else _slices_of_halves(b_x)


@triton.jit
def _slices_of_halves(b_x):
    b_even, b_odd = tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]))
    return _slices(b_even) + _slices(b_odd)
