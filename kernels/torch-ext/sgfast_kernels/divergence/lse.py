"""Row maxima and sums of both sides from one read.

For logits x (noisy) and y (clean) over a temperature T, in units of bits: k = log2(e) / T.

``lse_pair``  per row and side the maximum m and S = Σ 2^(kx − fl(k·m)): (4, ...) = m_x, S_x, m_y, S_y. A log-sum-exp
              would be rounded at its own size. The largest term of S is 1, up to the last bit.

If few rows would leave processors idle, programs share a row, and a small kernel joins their parts. A row with a NaN or
+inf logit, or of −inf alone, has a sum that is NaN, infinite or 0. Masked rows are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import LAUNCH_OPTIONS, mask_rows, on_device_of, required_layout, row_count, row_start
from .terms import LEAST_EXPONENT, LOG2_E, reference
from .tiles import neighbours, split_rows, temperature_rows, tile

# Fields of `lse_pair`: m and S of the noisy side, then of the clean side.
LSE_FIELDS = 4


def lse_pair(
    noisy: Tensor, clean: Tensor, mask: Tensor | None, temperature: Tensor, untempered: bool = False
) -> Tensor:
    """Return (4, ...) float32: per row m and S of the noisy side, then of the clean side (see the module).

    Args:
        noisy: (..., V) in float32, bfloat16 or float16, laid out as ``row_layout`` can describe.
        clean: of the same shape.
        mask: (...) bool, True = selected, or None.
        temperature: (...), positive; a number expanded to that shape is read as a number.
        untempered: return (5, ...), the noisy side's S at temperature 1 behind the others.
    """
    rows, width = row_count(noisy), noisy.shape[-1]
    fields = LSE_FIELDS + untempered
    scalars = noisy.new_empty((fields, *noisy.shape[:-1]), dtype=torch.float32)
    if rows > 0:
        sizes = tile(noisy, clean, 0, backward=False)
        shares, span = split_rows(noisy, rows, sizes["BV"])
        parts = scalars if shares == 1 else noisy.new_empty((fields, shares, rows), dtype=torch.float32)
        with on_device_of(noisy):
            _lse_kernel[(rows, shares)](
                noisy,
                clean,
                mask_rows(mask),
                *temperature_rows(temperature),
                parts,
                rows,
                width,
                span,
                *required_layout(noisy),
                *required_layout(clean),
                UNTEMPERED=untempered,
                **sizes,
                **LAUNCH_OPTIONS,
            )
            if shares > 1:
                _merge_kernel[(triton.cdiv(rows, 128),)](
                    *temperature_rows(temperature),
                    parts,
                    scalars,
                    rows,
                    shares,
                    UNTEMPERED=untempered,
                    BN=128,
                    num_warps=4,
                    **LAUNCH_OPTIONS,
                )
    return scalars


@triton.jit
def _accumulate(b_x, b_m, b_c, b_s, slope, BV: tl.constexpr, NEIGHBOURS: tl.constexpr, ADJACENT: tl.constexpr):
    """Add a tile of one side to the running maxima m, the c = fl(k·m), and the sums. Neighbouring columns share these.

    c is a maximum of products, not a product of the maximum. The compiler would fuse such a product into the
    differences below, and the rounding error of c would multiply S again with every tile.
    """
    axis: tl.constexpr = 1 if ADJACENT else 0
    b_x = neighbours(b_x, BV, NEIGHBOURS, ADJACENT)
    b_highest = tl.max(b_x, axis=axis)
    b_next = tl.maximum(b_c, b_highest * slope)
    # This is fused, so that the rounding error of c stays in S.
    b_e = tl.exp2(tl.fma(b_x, slope, -tl.expand_dims(b_next, axis)))
    return tl.maximum(b_m, b_highest), b_next, tl.fma(b_s, tl.exp2(b_c - b_next), tl.sum(b_e, axis=axis))


@triton.jit(do_not_specialize=["rows", "t_step", "a_inner", "b_inner"])
def _lse_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    parts_ptr,
    rows,
    width,
    span,
    a_inner,
    a_strides,
    b_inner,
    b_strides,
    UNTEMPERED: tl.constexpr,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ADJACENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, width)
    if mask_ptr is not None:
        # A masked row has no trip and no tail.
        stop = tl.where(tl.load(mask_ptr + i_row) != 0, stop, start)
    slope = LOG2_E / tl.load(t_ptr + i_row * t_step)
    a_row = a_ptr + row_start(i_row, a_inner, a_strides)
    b_row = b_ptr + row_start(i_row, b_inner, b_strides)
    o_col = tl.arange(0, BV)

    b_low = tl.full([BV // NEIGHBOURS], -1e30, tl.float32)
    b_least = tl.full([BV // NEIGHBOURS], LEAST_EXPONENT, tl.float32)
    b_0 = tl.zeros([BV // NEIGHBOURS], tl.float32)
    b_ma, b_ca, b_sa = b_low, b_least, b_0
    b_mb, b_cb, b_sb = b_low, b_least, b_0
    b_c1, b_s1 = b_least, b_0
    tail = start + (stop - start) // BV * BV
    for i_col in tl.range(start, tail, BV, num_stages=STAGES):
        b_a = tl.load(a_row + i_col + o_col).to(tl.float32)
        b_b = tl.load(b_row + i_col + o_col).to(tl.float32)
        b_ma, b_ca, b_sa = _accumulate(b_a, b_ma, b_ca, b_sa, slope, BV, NEIGHBOURS, ADJACENT)
        b_mb, b_cb, b_sb = _accumulate(b_b, b_mb, b_cb, b_sb, slope, BV, NEIGHBOURS, ADJACENT)
        if UNTEMPERED:
            _, b_c1, b_s1 = _accumulate(b_a, b_ma, b_c1, b_s1, LOG2_E, BV, NEIGHBOURS, ADJACENT)
    if tail < stop:
        m_col = tail + o_col < stop
        b_a = tl.load(a_row + tail + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        b_b = tl.load(b_row + tail + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        b_ma, b_ca, b_sa = _accumulate(b_a, b_ma, b_ca, b_sa, slope, BV, NEIGHBOURS, ADJACENT)
        b_mb, b_cb, b_sb = _accumulate(b_b, b_mb, b_cb, b_sb, slope, BV, NEIGHBOURS, ADJACENT)
        if UNTEMPERED:
            _, b_c1, b_s1 = _accumulate(b_a, b_ma, b_c1, b_s1, LOG2_E, BV, NEIGHBOURS, ADJACENT)

    m_a, m_b = tl.max(b_ma), tl.max(b_mb)
    field = tl.num_programs(1) * rows.to(tl.int64)
    o_part = parts_ptr + tl.program_id(1) * rows.to(tl.int64) + i_row
    tl.store(o_part, m_a)
    tl.store(o_part + field, tl.sum(b_sa * tl.exp2(b_ca - tl.max(b_ca))))
    tl.store(o_part + 2 * field, m_b)
    tl.store(o_part + 3 * field, tl.sum(b_sb * tl.exp2(b_cb - tl.max(b_cb))))
    if UNTEMPERED:
        tl.store(o_part + 4 * field, tl.sum(b_s1 * tl.exp2(b_c1 - tl.max(b_c1))))


@triton.jit(do_not_specialize=["t_step", "rows", "splits"])
def _merge_kernel(t_ptr, t_step, parts_ptr, scalars_ptr, rows, splits, UNTEMPERED: tl.constexpr, BN: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_row = o_row < rows
    field = rows.to(tl.int64)
    b_slope = LOG2_E / tl.load(t_ptr + o_row * t_step, mask=m_row, other=1.0)
    for side in tl.static_range(2):
        b_m, b_s = _merge(parts_ptr, 2 * side, 2 * side + 1, b_slope, splits, field, o_row, m_row)
        tl.store(scalars_ptr + 2 * side * field + o_row, b_m, mask=m_row)
        tl.store(scalars_ptr + (2 * side + 1) * field + o_row, b_s, mask=m_row)
    if UNTEMPERED:
        _, b_s = _merge(parts_ptr, 0, 4, LOG2_E, splits, field, o_row, m_row)
        tl.store(scalars_ptr + 4 * field + o_row, b_s, mask=m_row)


@triton.jit
def _merge(parts_ptr, i_m, i_s, slope, splits, field, o_row, m_row):
    b_m = tl.full(o_row.shape, -1e30, tl.float32)
    # Parts were summed against references with the same lower bound.
    b_c = tl.full(o_row.shape, LEAST_EXPONENT, tl.float32)
    b_s = tl.zeros(o_row.shape, tl.float32)
    for i_split in range(splits):
        b_part = tl.load(parts_ptr + (i_m * splits + i_split) * field + o_row, mask=m_row, other=0.0)
        b_sum = tl.load(parts_ptr + (i_s * splits + i_split) * field + o_row, mask=m_row, other=0.0)
        b_part_c = reference(b_part, slope)
        b_next = tl.maximum(b_c, b_part_c)
        b_s = b_s * tl.exp2(b_c - b_next) + b_sum * tl.exp2(b_part_c - b_next)
        b_m, b_c = tl.maximum(b_m, b_part), b_next
    return b_m, b_s
