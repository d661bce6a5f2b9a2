"""Seeded noise: standard normals, and their application to embeddings in one read and one write.

``standard_normal``   the stream itself
``noise_forward``     where(n, clamp(where(k, input + std·eps, 0) + mean), input)

eps is ``standard_normal`` by linear element number, rounded once to the input's dtype. Four neighbouring elements share
one Philox call. A program without a selected row draws nothing and reads neither mean nor std. Rows may begin at an
element number that is no multiple of four (odd widths, under a mask or a broadcast operand); each element then makes a
Philox call of its own.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import LAUNCH_OPTIONS, on_device_of
from .layout import Walk, columns_of, noise_walk, row_offsets, row_strides
from .philox import grouped_normals, single_normals

# Eight draws a thread, and sixteen 16-bit elements: two 16-byte loads of each tensor.
NORMAL_COLUMNS, TILE_ELEMENTS = 1024, 2048


def standard_normal(seed: Tensor, shape: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    """Return the stream's first elements as a contiguous tensor on the seed's device.

    Args:
        seed: one int64 element.
        shape: of the result.
        offset: how many groups of four draws to skip.
        dtype: float32, bfloat16, float16 or float64.
    """
    values = torch.empty(shape, dtype=dtype, device=seed.device)
    count = values.numel()
    if count > 0:
        with on_device_of(values):
            _normal_kernel[(triton.cdiv(count, NORMAL_COLUMNS),)](
                values, seed, offset, count, BD=NORMAL_COLUMNS, num_warps=4, **LAUNCH_OPTIONS
            )
    return values


def noise_forward(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: Tensor,
    offset: int,
    noise_mask: Tensor | None,
    keep_mask: Tensor | None,
    lowest: float | None,
    highest: float | None,
) -> Tensor:
    """Return the input with its selected elements transformed, contiguous (see the module).

    Args:
        input: any shape, float32, bfloat16 or float16, laid out as ``noise_walk`` can describe.
        mean: broadcastable to the input; float32, bfloat16 or float16.
        std: likewise.
        seed: one int64 element on the input's device.
        offset: how many groups of four draws to skip.
        noise_mask: bool, broadcastable to the input; True = transform; None = everything.
        keep_mask: likewise; where False, the mean alone.
        lowest: lower bound of transformed elements, or None.
        highest: upper bound.
    """
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    if input.numel() > 0:
        walk = noise_walk(input, mean, std, noise_mask, keep_mask)
        assert isinstance(walk, Walk), walk
        outer, inner, width = walk.sizes
        tile = tile_of(walk, input)
        programs = outer * triton.cdiv(inner, tile["BN"]) * triton.cdiv(width, tile["BD"])
        with on_device_of(input):
            _forward_kernel[(programs,)](
                input,
                mean,
                std,
                bytes_of(noise_mask),
                bytes_of(keep_mask),
                output,
                seed,
                offset,
                lowest,
                highest,
                inner,
                width,
                *row_strides(walk, "input", "mean", "std", "noise_mask", "keep_mask"),
                **each_column(walk),
                GROUPED=walk.grouped,
                **tile,
                **LAUNCH_OPTIONS,
            )
    return output


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """Return a mask as bytes, as Triton reads it."""
    return None if mask is None else mask.view(torch.uint8)


def each_column(walk: Walk) -> dict[str, bool]:
    """Return, for each operand, True if it has a value for each column. A stride of 0 repeats one value."""
    names = ("mean", "std", "noise_mask", "keep_mask")
    return {f"{name.upper()}_COLUMNS": walk.strides.get(name, (0, 0, 0))[2] == 1 for name in names}


def tile_of(walk: Walk, input: Tensor, sums_rows: bool = False) -> dict[str, int]:
    """Return rows and columns of a program's tile, and its warps.

    The tile is halved for float32, for sums that are kept in registers, and for draws that are made one by one. Narrow
    rows share a program. Sizes depend on powers of two alone, so that shapes share compiled kernels.
    """
    _, inner, width = walk.sizes
    halved = sums_rows or input.dtype == torch.float32 or not walk.grouped
    elements = TILE_ELEMENTS // 2 if halved else TILE_ELEMENTS
    columns = min(max(triton.next_power_of_2(width), 16), elements)
    rows = min(triton.next_power_of_2(inner), elements // columns)
    return {"BN": rows, "BD": columns, "num_warps": max(1, rows * columns // (elements // 4))}


@triton.jit(do_not_specialize=["offset"])
def _normal_kernel(values_ptr, seed_ptr, offset, count, BD: tl.constexpr):
    i_block = tl.program_id(0).to(tl.int64)
    counter = i_block * (BD // 4) + offset + tl.arange(0, BD // 4)[None, :]
    b_eps = grouped_normals(counter, tl.load(seed_ptr), 1, BD)
    o_col = tl.arange(0, BD)[None, :]
    b_eps = b_eps.to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + i_block * BD + o_col, b_eps, mask=o_col < count - i_block * BD)


@triton.jit
def tile_normals(i_row, start, width, offset, seed, GROUPED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """eps of the rows ``i_row`` [BN], columns ``start`` and on: [BN, BD]."""
    if GROUPED:
        first = (i_row * width + start) // 4 + offset
        return grouped_normals(first[:, None] + tl.arange(0, BD // 4)[None, :], seed, BN, BD)
    return single_normals((i_row * width + start)[:, None] + tl.arange(0, BD)[None, :], offset, seed)


@triton.jit(do_not_specialize=["offset", "inner"])
def _forward_kernel(
    x_ptr,
    mean_ptr,
    std_ptr,
    n_ptr,
    k_ptr,
    out_ptr,
    seed_ptr,
    offset,
    lowest,
    highest,
    inner,
    width,
    x_strides,
    mean_strides,
    std_strides,
    n_strides,
    k_strides,
    MEAN_COLUMNS: tl.constexpr,
    STD_COLUMNS: tl.constexpr,
    NOISE_MASK_COLUMNS: tl.constexpr,
    KEEP_MASK_COLUMNS: tl.constexpr,
    GROUPED: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    column_tiles, row_tiles = tl.cdiv(width, BD), tl.cdiv(inner, BN)
    i_tile = tl.program_id(0) // column_tiles
    start = tl.program_id(0) % column_tiles * BD
    i_outer = (i_tile // row_tiles).to(tl.int64)
    o_inner = (i_tile % row_tiles).to(tl.int64) * BN + tl.arange(0, BN)
    o_col = start + tl.arange(0, BD)[None, :]
    m_row = (o_inner < inner)[:, None]
    m_tile = m_row & (o_col < width)
    i_row = i_outer * inner + o_inner

    b_raw = tl.load(x_ptr + row_offsets(i_outer, o_inner, x_strides) + o_col, mask=m_tile, other=0.0)
    m_noise, m_any = m_tile, True
    if n_ptr is not None:
        o_n = row_offsets(i_outer, o_inner, n_strides)
        m_selected = columns_of(n_ptr, o_n, o_col, m_row, m_tile, 0, NOISE_MASK_COLUMNS) != 0
        m_noise &= m_selected
        if not NOISE_MASK_COLUMNS:
            m_row &= m_selected
            m_any = tl.max(m_row.to(tl.int32)) != 0
    o_mean = row_offsets(i_outer, o_inner, mean_strides)
    o_std = row_offsets(i_outer, o_inner, std_strides)
    b_mean = columns_of(mean_ptr, o_mean, o_col, m_row, m_noise, 0.0, MEAN_COLUMNS).to(tl.float32)
    b_std = columns_of(std_ptr, o_std, o_col, m_row, m_noise, 0.0, STD_COLUMNS).to(tl.float32)

    b_eps = tl.zeros([BN, BD], tl.float32)
    if m_any:
        b_eps = tile_normals(i_row, start, width, offset, tl.load(seed_ptr), GROUPED, BN, BD)
    b_x = b_raw.to(tl.float32) + b_std * b_eps.to(b_raw.dtype).to(tl.float32)
    if k_ptr is not None:
        o_k = row_offsets(i_outer, o_inner, k_strides)
        b_x = tl.where(columns_of(k_ptr, o_k, o_col, m_row, m_noise, 0, KEEP_MASK_COLUMNS) != 0, b_x, 0.0)
    b_x += b_mean
    # A NaN compares as false and stays.
    if lowest is not None:
        b_x = tl.where(b_x < lowest, lowest, b_x)
    if highest is not None:
        b_x = tl.where(b_x > highest, highest, b_x)
    b_x = tl.where(m_noise, b_x.to(b_raw.dtype), b_raw)
    tl.store(out_ptr + (i_row * width)[:, None] + o_col, b_x, mask=m_tile)
