"""The walk of the noise kernels over tensors of one broadcast shape: two row dimensions and the columns.

Neighbouring dimensions are merged if every operand strides through them as through one dimension. Contiguous tensors of
any shape become one long row. A mask or mean that is broadcast over some dimensions adds one row dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import RowStrides

# Columns are counted in int32; a longer merged row stays two dimensions.
LONGEST_ROW = 2**30


class Walk(NamedTuple):
    """Sizes (outer, inner, columns), and each operand's strides over them: 0 where it is broadcast."""

    sizes: tuple[int, int, int]
    strides: dict[str, tuple[int, int, int]]

    def transposed(self) -> "Walk":
        """Return the walk with inner and outer rows exchanged."""
        outer, inner, columns = self.sizes
        return Walk((inner, outer, columns), {name: (b, a, c) for name, (a, b, c) in self.strides.items()})

    def sums(self, name: str) -> tuple[bool, ...]:
        """Return, for each dimension, True if the gradient of ``"mean"`` or ``"std"`` is a sum over the dimension."""
        strides = self.strides[f"{name}_gradient"]
        return tuple(size > 1 and stride == 0 for size, stride in zip(self.sizes, strides, strict=True))

    @property
    def grouped(self) -> bool:
        """True if every row begins with a counter of its own."""
        outer, inner, columns = self.sizes
        return columns % 4 == 0 or outer * inner == 1


def walk(shape: Sequence[int], strides: dict[str, Sequence[int]]) -> Walk | None:
    """Merge dimensions; return None if more than two row dimensions are left, or one row is too long."""
    sizes: list[int] = []
    merged: list[tuple[int, ...]] = []
    for i, size in enumerate(shape):
        if size == 1:
            continue
        steps = tuple(operand[i] for operand in strides.values())
        if (
            sizes
            and sizes[-1] * size <= LONGEST_ROW
            and all(before == size * step for before, step in zip(merged[-1], steps, strict=True))
        ):
            sizes[-1], merged[-1] = sizes[-1] * size, steps
        else:
            sizes.append(size)
            merged.append(steps)
    missing = 3 - len(sizes)
    if missing < 0 or (sizes and sizes[-1] > LONGEST_ROW):
        return None
    outer, inner, columns = [1] * missing + sizes
    nothing = (0,) * len(strides)
    by_operand = zip(*[nothing] * missing, *merged, strict=True)
    return Walk((outer, inner, columns), dict(zip(strides, by_operand, strict=True)))


def broadcast_strides(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of the tensor expanded to the shape."""
    return tensor.expand(shape).stride()


def gradient_strides(shape: Sequence[int], full_shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of a shape, expanded to the full shape: 0 where a gradient is a sum."""
    return torch.empty(shape, device="meta").expand(full_shape).stride()


def noise_walk(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    noise_mask: Tensor | None,
    keep_mask: Tensor | None,
    upstream: Tensor | None = None,
) -> Walk | str:
    """Return the kernels' walk over the operands (broadcastable to the input), or the reason why no walk exists."""
    operands = {"input": input, "mean": mean, "std": std}
    optional = {"noise_mask": noise_mask, "keep_mask": keep_mask, "upstream": upstream}
    operands |= {name: operand for name, operand in optional.items() if operand is not None}
    for name, operand in operands.items():
        if not name.endswith("mask") and operand.dtype == torch.float64:
            return f"{name} is float64 (the kernels compute in float32)"
    strides: dict[str, Sequence[int]] = {}
    for name, operand in operands.items():
        strides[name] = broadcast_strides(operand, input.shape)
    # Backward sums over the dimensions in which mean or std is broadcast. Forward does not merge these dimensions
    # either.
    for name in ("mean", "std"):
        strides[f"{name}_gradient"] = gradient_strides(operands[name].shape, input.shape)
    strides["output"] = gradient_strides(input.shape, input.shape)
    found = walk(input.shape, strides)
    if found is None:
        return (
            f"input of shape {tuple(input.shape)} and what is broadcast to it need more than two strides over the "
            "rows, or a row of more than 2**30 elements (.contiguous() operands need fewer)"
        )
    for name, (*_, column) in found.strides.items():
        must_be_rows = name in ("input", "upstream")
        if column not in (0, 1) or (must_be_rows and column == 0 and found.sizes[2] > 1):
            return (
                f"{name} has strides {operands[name].stride()} (the kernels read rows of contiguous elements; "
                ".contiguous() makes them so)"
            )
    return found


def row_strides(walk: Walk, *operands: str) -> list[RowStrides]:
    """Return each operand's strides over outer and inner rows, 0 where there is no operand."""
    return [RowStrides(*walk.strides.get(name, (0, 0, 0))[:2]) for name in operands]


@triton.jit
def row_offsets(i_outer, o_inner, strides):
    """Offsets of the first elements of an outer row's inner rows, [BN, 1]."""
    return (i_outer * strides.outer + o_inner * strides.inner)[:, None]


@triton.jit
def columns_of(ptr, o_row, o_col, m_row, m_tile, OTHER: tl.constexpr, EACH_COLUMN: tl.constexpr):
    """An operand's tile [BN, BD], or one value per row, [BN, 1], if the columns share a value."""
    if EACH_COLUMN:
        b_x = tl.load(ptr + o_row + o_col, mask=m_tile, other=OTHER)
    else:
        b_x = tl.load(ptr + o_row, mask=m_row, other=OTHER)
    return b_x
