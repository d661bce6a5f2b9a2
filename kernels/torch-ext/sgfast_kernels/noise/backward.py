"""Gradients of seeded noise: eps drawn again, one read of the upstream gradient, one write per gradient.

For an upstream gradient g, zero where unselected or outside the clamp's range:

    ∂mean = g,   ∂std = where(k, g·eps, 0),   ∂input = where(k, g, 0), and the untouched upstream where unselected

The gradient of a broadcast mean or std is a sum in two stages and in a fixed order, without atomics. Every program adds
up to ``_MOST_TRIPS`` tiles of rows and writes its partial sums in float32. torch adds the sums of the programs. Input,
mean and std are read only where a clamp's range must be checked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import LAUNCH_OPTIONS, RowStrides, on_device_of
from .forward import bytes_of, each_column, tile_normals, tile_of
from .layout import Walk, columns_of, noise_walk, row_offsets, row_strides

# Longer sums leave fewer partial sums to write, but also fewer programs. 2048 programs fill a large GPU.
_MOST_TRIPS, _ENOUGH_PROGRAMS = 64, 2048


def noise_backward(
    upstream: Tensor,
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: Tensor,
    offset: int,
    noise_mask: Tensor | None,
    keep_mask: Tensor | None,
    lowest: float | None,
    highest: float | None,
    needs_input: bool,
    needs_mean: bool,
    needs_std: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients to ``input``, ``mean`` and ``std`` that are needed, contiguous, each in its tensor's dtype.

    Args:
        upstream: the gradient of the output, of the input's shape.
        input: as in ``noise_forward``.
        mean: as in ``noise_forward``.
        std: as in ``noise_forward``.
        seed: as in ``noise_forward``.
        offset: as in ``noise_forward``.
        noise_mask: as in ``noise_forward``.
        keep_mask: as in ``noise_forward``.
        lowest: as in ``noise_forward``.
        highest: as in ``noise_forward``.
        needs_input: whether to compute the gradient to ``input``.
        needs_mean: whether to compute the gradient to ``mean``.
        needs_std: whether to compute the gradient to ``std``.
    """
    walk = noise_walk(input, mean, std, noise_mask, keep_mask, upstream)
    if isinstance(walk, str):
        upstream = upstream.contiguous()
        walk = noise_walk(input, mean, std, noise_mask, keep_mask, upstream)
        assert isinstance(walk, Walk), walk
    summed = [name for name, needed in (("mean", needs_mean), ("std", needs_std)) if needed]
    turned = any(walk.sums(name)[0] and not walk.sums(name)[1] for name in summed)
    if turned:
        # Programs add up inner rows. A sum over outer rows alone exchanges outer and inner rows.
        walk = walk.transposed()
    outer, inner, width = walk.sizes
    over_rows = any(walk.sums(name)[1] for name in summed)
    tile = tile_of(walk, input, over_rows)
    column_tiles = triton.cdiv(width, tile["BD"])
    trips = _trips(triton.cdiv(inner, tile["BN"]), outer * column_tiles) if over_rows else 1
    row_tiles = triton.cdiv(inner, tile["BN"] * trips)
    partial = (row_tiles, column_tiles)

    input_gradient = torch.empty_like(input, memory_format=torch.contiguous_format) if needs_input else None
    mean_gradient = _target(mean, walk, "mean", partial) if needs_mean else None
    std_gradient = _target(std, walk, "std", partial) if needs_std else None
    reads = lowest is not None or highest is not None
    if input.numel() > 0 and (needs_input or needs_mean or needs_std):
        with on_device_of(input):
            _backward_kernel[(outer * row_tiles * column_tiles,)](
                upstream,
                input if reads else None,
                mean if reads else None,
                std if reads else None,
                bytes_of(noise_mask),
                bytes_of(keep_mask),
                input_gradient,
                mean_gradient,
                std_gradient,
                seed,
                offset,
                lowest,
                highest,
                inner,
                width,
                *(stride // width for stride in walk.strides["output"][:2]),
                *row_strides(walk, "upstream", "input", "mean", "std", "noise_mask", "keep_mask"),
                _target_strides(walk, "mean", partial),
                _target_strides(walk, "std", partial),
                **each_column(walk),
                MEAN_OVER_ROWS=walk.sums("mean")[1],
                MEAN_OVER_COLUMNS=walk.sums("mean")[2],
                STD_OVER_ROWS=walk.sums("std")[1],
                STD_OVER_COLUMNS=walk.sums("std")[2],
                GROUPED=walk.grouped,
                TRIPS=trips,
                **tile,
                **LAUNCH_OPTIONS,
            )
    return (
        input_gradient,
        _total(mean_gradient, mean, walk.sums("mean"), turned),
        _total(std_gradient, std, walk.sums("std"), turned),
    )


def _trips(row_tiles: int, others: int) -> int:
    """Return the number of tiles of rows that a program adds up, a power of two."""
    wanted = min(_MOST_TRIPS, row_tiles, row_tiles * others // _ENOUGH_PROGRAMS)
    return int(max(1, triton.next_power_of_2(wanted + 1) // 2))


def _target(operand: Tensor, walk: Walk, name: str, partial: tuple[int, int]) -> Tensor:
    """Return what the kernel writes to: the gradient, or float32 partial sums over rows or columns of tiles."""
    sums = walk.sums(name)
    if not any(sums):
        return torch.empty(operand.shape, dtype=operand.dtype, device=operand.device)
    outer, inner, width = walk.sizes
    shape = (outer, partial[0] if sums[1] else inner, partial[1] if sums[2] else width)
    return torch.empty(shape, dtype=torch.float32, device=operand.device)


def _target_strides(walk: Walk, name: str, partial: tuple[int, int]) -> RowStrides:
    """Return the strides of ``_target`` over outer rows, and over inner rows or their tiles."""
    sums = walk.sums(name)
    if not any(sums):
        return RowStrides(*walk.strides[f"{name}_gradient"][:2])
    _, inner, width = walk.sizes
    columns = partial[1] if sums[2] else width
    return RowStrides((partial[0] if sums[1] else inner) * columns, columns)


def _total(values: Tensor | None, operand: Tensor, sums: tuple[bool, ...], turned: bool) -> Tensor | None:
    """Add up partial sums to the operand's gradient."""
    if values is None or not any(sums):
        return values
    values = values.sum([dimension for dimension in range(3) if sums[dimension]], keepdim=True)
    values = values.transpose(0, 1) if turned else values
    return values.reshape(operand.shape).to(operand.dtype)


@triton.jit
def _store_rows(ptr, o_row, o_col, i_column_tile, m_row, m_tile, b_gradient, OVER_COLUMNS: tl.constexpr):
    """Store the gradient of every row, or the sum of the row's tile."""
    if OVER_COLUMNS:
        tl.store(ptr + o_row + i_column_tile, tl.sum(b_gradient, axis=1, keep_dims=True), mask=m_row)
    else:
        tl.store(ptr + o_row + o_col, b_gradient.to(ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def _store_sums(ptr, o_col, i_column_tile, width, b_sums, OVER_COLUMNS: tl.constexpr):
    """Store the sum over the program's rows: one for each column, or one for all columns of the tile."""
    b_sums = tl.sum(b_sums, axis=0, keep_dims=True)
    if OVER_COLUMNS:
        tl.store(ptr + i_column_tile, tl.sum(tl.sum(b_sums, axis=1), axis=0))
    else:
        tl.store(ptr + o_col, b_sums, mask=o_col < width)


@triton.jit(do_not_specialize=["offset", "inner", "row_outer", "row_inner"])
def _backward_kernel(
    g_ptr,
    x_ptr,
    mean_ptr,
    std_ptr,
    n_ptr,
    k_ptr,
    x_gradient_ptr,
    mean_gradient_ptr,
    std_gradient_ptr,
    seed_ptr,
    offset,
    lowest,
    highest,
    inner,
    width,
    row_outer,
    row_inner,
    g_strides,
    x_strides,
    mean_strides,
    std_strides,
    n_strides,
    k_strides,
    mean_gradient_strides,
    std_gradient_strides,
    MEAN_COLUMNS: tl.constexpr,
    STD_COLUMNS: tl.constexpr,
    NOISE_MASK_COLUMNS: tl.constexpr,
    KEEP_MASK_COLUMNS: tl.constexpr,
    MEAN_OVER_ROWS: tl.constexpr,
    MEAN_OVER_COLUMNS: tl.constexpr,
    STD_OVER_ROWS: tl.constexpr,
    STD_OVER_COLUMNS: tl.constexpr,
    GROUPED: tl.constexpr,
    TRIPS: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    column_tiles, row_tiles = tl.cdiv(width, BD), tl.cdiv(inner, BN * TRIPS)
    i_column_tile = tl.program_id(0) % column_tiles
    i_program = tl.program_id(0) // column_tiles
    i_outer, i_row_tile = (i_program // row_tiles).to(tl.int64), (i_program % row_tiles).to(tl.int64)
    start = i_column_tile * BD
    o_col = start + tl.arange(0, BD)[None, :]

    b_mean_sum = tl.zeros([BN, BD], tl.float32)
    b_std_sum = tl.zeros([BN, BD], tl.float32)
    for trip in range(TRIPS):
        o_inner = (i_row_tile * TRIPS + trip) * BN + tl.arange(0, BN)
        m_inside = (o_inner < inner)[:, None]
        m_row, m_tile = m_inside, m_inside & (o_col < width)
        i_row = i_outer * row_outer + o_inner * row_inner
        b_raw = tl.load(g_ptr + row_offsets(i_outer, o_inner, g_strides) + o_col, mask=m_tile, other=0.0)
        m_noise, m_any = m_tile, True
        if n_ptr is not None:
            o_n = row_offsets(i_outer, o_inner, n_strides)
            m_selected = columns_of(n_ptr, o_n, o_col, m_row, m_tile, 0, NOISE_MASK_COLUMNS) != 0
            m_noise &= m_selected
            if not NOISE_MASK_COLUMNS:
                m_row &= m_selected
                m_any = tl.max(m_row.to(tl.int32)) != 0
        m_keep = m_noise
        if k_ptr is not None:
            o_k = row_offsets(i_outer, o_inner, k_strides)
            m_keep &= columns_of(k_ptr, o_k, o_col, m_row, m_noise, 0, KEEP_MASK_COLUMNS) != 0

        b_eps = tl.zeros([BN, BD], tl.float32)
        if (std_gradient_ptr is not None) or (x_ptr is not None):
            if m_any:
                b_eps = tile_normals(i_row, start, width, offset, tl.load(seed_ptr), GROUPED, BN, BD)
            b_eps = b_eps.to(b_raw.dtype).to(tl.float32)
        b_g = tl.where(m_noise, b_raw.to(tl.float32), 0.0)
        if x_ptr is not None:
            o_x = row_offsets(i_outer, o_inner, x_strides)
            o_mean = row_offsets(i_outer, o_inner, mean_strides)
            o_std = row_offsets(i_outer, o_inner, std_strides)
            b_x = tl.load(x_ptr + o_x + o_col, mask=m_noise, other=0.0).to(tl.float32)
            b_mean = columns_of(mean_ptr, o_mean, o_col, m_row, m_noise, 0.0, MEAN_COLUMNS).to(tl.float32)
            b_std = columns_of(std_ptr, o_std, o_col, m_row, m_noise, 0.0, STD_COLUMNS).to(tl.float32)
            b_x = tl.where(m_keep, b_x + b_std * b_eps, 0.0) + b_mean
            if lowest is not None:
                b_g = tl.where(b_x >= lowest, b_g, 0.0)
            if highest is not None:
                b_g = tl.where(b_x <= highest, b_g, 0.0)
        b_kept = tl.where(m_keep, b_g, 0.0)

        if x_gradient_ptr is not None:
            b_gx = tl.where(m_noise, b_kept.to(b_raw.dtype), b_raw)
            tl.store(x_gradient_ptr + (i_row * width)[:, None] + o_col, b_gx, mask=m_tile)
        if mean_gradient_ptr is not None:
            if MEAN_OVER_ROWS:
                b_mean_sum += b_g
            else:
                o_gm = row_offsets(i_outer, o_inner, mean_gradient_strides)
                _store_rows(mean_gradient_ptr, o_gm, o_col, i_column_tile, m_inside, m_tile, b_g, MEAN_OVER_COLUMNS)
        if std_gradient_ptr is not None:
            if STD_OVER_ROWS:
                b_std_sum += b_kept * b_eps
            else:
                o_gs = row_offsets(i_outer, o_inner, std_gradient_strides)
                _store_rows(
                    std_gradient_ptr, o_gs, o_col, i_column_tile, m_inside, m_tile, b_kept * b_eps, STD_OVER_COLUMNS
                )
    if mean_gradient_ptr is not None and MEAN_OVER_ROWS:
        o_gm = i_outer * mean_gradient_strides.outer + i_row_tile * mean_gradient_strides.inner
        _store_sums(mean_gradient_ptr + o_gm, o_col, i_column_tile, width, b_mean_sum, MEAN_OVER_COLUMNS)
    if std_gradient_ptr is not None and STD_OVER_ROWS:
        o_gs = i_outer * std_gradient_strides.outer + i_row_tile * std_gradient_strides.inner
        _store_sums(std_gradient_ptr + o_gs, o_col, i_column_tile, width, b_std_sum, STD_OVER_COLUMNS)
