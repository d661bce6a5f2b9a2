"""Divergences over the whole vocabulary: a second read of both sides, after ``lse_pair``'s.

``divergence_forward``  values (kinds, ...), and row scalars (4 + 2·kinds, ...): ``lse_pair``'s, then per kind ΣA and
                        ΣB, the row sums of the partials with respect to log p and log q, which backward needs.

Where few rows would leave processors idle, programs share a row. −inf logits are probability 0: KL is inf where the
other side is not 0. A row with a NaN or +inf logit, or of −inf alone, gives NaN. Masked rows are not read and give 0.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._divergence_launch import (
    CROSS_ENTROPY,
    FORWARD_KL,
    HELLINGER,
    JEFFREYS,
    JENSEN_SHANNON,
    KINDS,
    LOG2_E,
    REVERSE_KL,
    SKEW_FORWARD,
    SKEW_REVERSE,
    TOTAL_VARIATION,
    kind_bits,
    row_count,
    rows_of,
    split_rows,
    temperature_rows,
    tile,
)
from ._divergence_terms import (
    LN2,
    clamped,
    difference_of,
    mixture,
    offsets,
    probabilities,
    sign_of,
    skew_partials,
    times_ratio,
)
from ._rows import LAUNCH_OPTIONS, on_device_of, row_layout, row_start, sum_neighbours
from .lse import lse_pair

# What `_add_terms` sums.
_SUMS = 15
# Kinds whose partials hold p − q: its sum is 0 but for what the normalisers were rounded by, and takes that off again.
LINEAR = tl.constexpr(1 | 2 | 4 | 32 | 64)


def divergence_forward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    kinds: Sequence[str],
    beta: float,
    skew: float,
) -> tuple[Tensor, Tensor]:
    """Return values (kinds, ...) and row scalars (4 + 2·kinds, ...), float32.

    Args:
        noisy: as in ``lse_pair``.
        clean: as in ``lse_pair``.
        mask: as in ``lse_pair``.
        temperature: as in ``lse_pair``.
        kinds: names among ``KINDS``, each once; any number in one launch.
        beta: weight of the clean side in the Jensen–Shannon mixture.
        skew: weight of the first side in the mixtures of the skew kinds.
    """
    rows, width = row_count(noisy), noisy.shape[-1]
    row_scalars = noisy.new_empty((4 + 2 * len(kinds), *noisy.shape[:-1]), dtype=torch.float32)
    values = noisy.new_empty((len(kinds), *noisy.shape[:-1]), dtype=torch.float32)
    if rows > 0:
        lse = lse_pair(noisy, clean, mask, temperature)
        sizes = tile(noisy, clean, len(kinds), backward=False)
        shares, span = split_rows(noisy, rows, sizes["BV"])
        sums = noisy.new_empty((_SUMS, shares, rows), dtype=torch.float32)
        modes = {"KINDS": kind_bits(kinds), "SKEWED": skew > 0}
        with on_device_of(noisy):
            _forward_kernel[(rows, shares)](
                noisy,
                clean,
                rows_of(mask),
                *temperature_rows(temperature),
                lse,
                sums,
                rows,
                width,
                span,
                *row_layout(noisy),
                *row_layout(clean),
                beta,
                skew,
                **modes,
                **sizes,
                **LAUNCH_OPTIONS,
            )
            _finish_kernel[(triton.cdiv(rows, 128),)](
                rows_of(mask),
                lse,
                sums,
                values,
                row_scalars,
                rows,
                shares,
                *(list(kinds).index(kind) if kind in kinds else 0 for kind in KINDS),
                beta,
                **modes,
                BN=128,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return values, row_scalars


@triton.jit
def _add(b_sum, b_term, BV: tl.constexpr, NEIGHBOURS: tl.constexpr):
    return b_sum + sum_neighbours(b_term, 1, BV, NEIGHBOURS)


@triton.jit
def _add_terms(
    sums,
    b_x,
    b_y,
    x_offset,
    y_offset,
    x_log_sum,
    scale,
    slope,
    gap,
    shift,
    beta,
    skew,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Add a tile to the sums of the kinds asked for; what ``_finish_kernel`` makes of them is written there."""
    s_fkl, s_rkl, s_pd, s_qd, s_jsp, s_jsq, s_tv, s_tvp, s_h, s_ce, s_sf, s_sfp, s_sr, s_srp, s_d = sums
    b_u, b_v, b_half_log_p = probabilities(b_x, b_y, x_offset, y_offset, scale, 0.5 * slope)
    b_p, b_q = b_u * b_u, b_v * b_v
    b_d = tl.fma((b_x - b_y) - gap, slope, -shift)
    b_difference = difference_of(b_p, b_q, b_d)
    b_pd, b_qd = times_ratio(b_p, b_d), times_ratio(b_q, b_d)
    forward: tl.constexpr = (FORWARD_KL & KINDS != 0) or (SKEW_FORWARD & KINDS != 0 and not SKEWED)
    reverse: tl.constexpr = (REVERSE_KL & KINDS != 0) or (SKEW_REVERSE & KINDS != 0 and not SKEWED)
    if forward:
        s_fkl = _add(s_fkl, b_difference - b_qd * LN2, BV, NEIGHBOURS)
    if reverse:
        s_rkl = _add(s_rkl, b_pd * LN2 - b_difference, BV, NEIGHBOURS)
    if forward or reverse or LINEAR & KINDS != 0:
        s_d = _add(s_d, b_difference, BV, NEIGHBOURS)
    if JEFFREYS & KINDS:
        s_pd = _add(s_pd, b_pd, BV, NEIGHBOURS)
        s_qd = _add(s_qd, b_qd, BV, NEIGHBOURS)
    if TOTAL_VARIATION & KINDS:
        s_tv = _add(s_tv, tl.abs(b_difference), BV, NEIGHBOURS)
        s_tvp = _add(s_tvp, sign_of(b_d, b_p), BV, NEIGHBOURS)
    if HELLINGER & KINDS:
        s_h = _add(s_h, (b_u - b_v) * (b_u - b_v), BV, NEIGHBOURS)
    if CROSS_ENTROPY & KINDS:
        s_ce = _add(s_ce, times_ratio(b_q, x_log_sum - 2.0 * b_half_log_p), BV, NEIGHBOURS)
    b_finite = clamped(b_d)
    if JENSEN_SHANNON & KINDS:
        b_log_m, _ = mixture(b_p, b_q, b_finite, b_difference, beta)
        s_jsp = _add(s_jsp, b_p * (tl.maximum(-b_finite, 0.0) + b_log_m), BV, NEIGHBOURS)
        s_jsq = _add(s_jsq, b_q * (tl.maximum(b_finite, 0.0) + b_log_m), BV, NEIGHBOURS)
    if SKEWED and SKEW_FORWARD & KINDS != 0:
        b_term, b_to_p, _ = skew_partials(b_p, b_q, b_finite, b_difference, skew)
        s_sf = _add(s_sf, b_term, BV, NEIGHBOURS)
        s_sfp = _add(s_sfp, b_to_p, BV, NEIGHBOURS)
    if SKEWED and SKEW_REVERSE & KINDS != 0:
        b_term, _, b_to_p = skew_partials(b_q, b_p, -b_finite, -b_difference, skew)
        s_sr = _add(s_sr, b_term, BV, NEIGHBOURS)
        s_srp = _add(s_srp, b_to_p, BV, NEIGHBOURS)
    return s_fkl, s_rkl, s_pd, s_qd, s_jsp, s_jsq, s_tv, s_tvp, s_h, s_ce, s_sf, s_sfp, s_sr, s_srp, s_d


@triton.jit(do_not_specialize=["rows", "t_step", "a_inner", "b_inner", "beta", "skew"])
def _forward_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    lse_ptr,
    sums_ptr,
    rows,
    width,
    span,
    a_inner,
    a_outer_stride,
    a_inner_stride,
    b_inner,
    b_outer_stride,
    b_inner_stride,
    beta,
    skew,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    field = rows.to(tl.int64)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, width)
    if mask_ptr is not None:
        stop = tl.where(tl.load(mask_ptr + i_row) != 0, stop, start)
    slope = LOG2_E / tl.load(t_ptr + i_row * t_step)
    a_row = a_ptr + row_start(i_row, a_inner, a_outer_stride, a_inner_stride)
    b_row = b_ptr + row_start(i_row, b_inner, b_outer_stride, b_inner_stride)
    o_col = tl.arange(0, BV)[None, :]
    m_a, s_a = tl.load(lse_ptr + i_row), tl.load(lse_ptr + field + i_row)
    m_b, s_b = tl.load(lse_ptr + 2 * field + i_row), tl.load(lse_ptr + 3 * field + i_row)
    c_a, c_b, gap, shift = offsets(m_a, s_a, m_b, s_b, slope)
    scale, a_log_sum = tl.sqrt(s_b / s_a), tl.log2(s_a)

    b_0 = tl.zeros([1, BV // NEIGHBOURS], tl.float32)
    sums = (b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0)
    tail = start + (stop - start) // BV * BV
    for i_col in tl.range(start, tail, BV, num_stages=3):
        b_a = tl.load(a_row + i_col + o_col).to(tl.float32)
        b_b = tl.load(b_row + i_col + o_col).to(tl.float32)
        sums = _add_terms(
            sums, b_a, b_b, c_a, c_b, a_log_sum, scale, slope, gap, shift, beta, skew, KINDS, SKEWED, BV, NEIGHBOURS
        )
    if tail < stop:
        m_col = tail + o_col < stop
        b_a = tl.load(a_row + tail + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        b_b = tl.load(b_row + tail + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        sums = _add_terms(
            sums, b_a, b_b, c_a, c_b, a_log_sum, scale, slope, gap, shift, beta, skew, KINDS, SKEWED, BV, NEIGHBOURS
        )
    o_part = sums_ptr + tl.program_id(1) * field + i_row
    for i in tl.static_range(15):
        tl.store(o_part + i * tl.num_programs(1) * field, tl.sum(sums[i]))


@triton.jit
def _total(sums_ptr, i_sum, splits, field, o_row, m_row):
    b_sum = tl.zeros(o_row.shape, tl.float32)
    for i_split in range(splits):
        b_sum += tl.load(sums_ptr + (i_sum * splits + i_split) * field + o_row, mask=m_row, other=0.0)
    return b_sum


@triton.jit
def _store_kind(values_ptr, scalars_ptr, i_kind, field, o_row, m_row, m_read, b_valid, b_value, b_to_p, b_to_q):
    # Each value is a sum of terms that are ≥ 0 but for rounding.
    b_value = tl.where(b_valid, tl.maximum(b_value, 0.0), float("nan"))
    tl.store(values_ptr + i_kind * field + o_row, tl.where(m_read, b_value, 0.0), mask=m_row)
    tl.store(scalars_ptr + (4 + 2 * i_kind) * field + o_row, tl.where(m_read, b_to_p, 0.0), mask=m_row)
    tl.store(scalars_ptr + (5 + 2 * i_kind) * field + o_row, tl.where(m_read, b_to_q, 0.0), mask=m_row)


@triton.jit(
    do_not_specialize=["rows", "splits", "i_fkl", "i_rkl", "i_jef", "i_js", "i_tv", "i_h", "i_ce", "i_sf", "i_sr"]
)
def _finish_kernel(
    mask_ptr,
    lse_ptr,
    sums_ptr,
    values_ptr,
    scalars_ptr,
    rows,
    splits,
    i_fkl,
    i_rkl,
    i_jef,
    i_js,
    i_tv,
    i_h,
    i_ce,
    i_sf,
    i_sr,
    beta,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    BN: tl.constexpr,
):
    """From sums over logits to values, ΣA and ΣB, and the scalars of ``lse_pair`` beside them."""
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    field = rows.to(tl.int64)
    m_row = o_row < rows
    m_read = m_row
    if mask_ptr is not None:
        m_read = m_row & (tl.load(mask_ptr + o_row, mask=m_row, other=0) != 0)
    b_valid = m_row
    for i in tl.static_range(4):
        b_scalar = tl.load(lse_ptr + i * field + o_row, mask=m_row, other=0.0)
        tl.store(scalars_ptr + i * field + o_row, tl.where(m_read, b_scalar, 0.0), mask=m_row)
        if i % 2 == 1:
            b_valid &= (b_scalar > 0) & (b_scalar < float("inf"))
    b_1 = 1.0 / b_scalar
    b_d = tl.zeros([BN], tl.float32)
    if (LINEAR | SKEW_FORWARD | SKEW_REVERSE) & KINDS != 0:
        b_d = b_1 * _total(sums_ptr, 14, splits, field, o_row, m_row)

    if FORWARD_KL & KINDS or (SKEW_FORWARD & KINDS and not SKEWED):
        b_v = b_1 * _total(sums_ptr, 0, splits, field, o_row, m_row)
        if FORWARD_KL & KINDS:
            _store_kind(values_ptr, scalars_ptr, i_fkl, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v - b_d)
        if SKEW_FORWARD & KINDS and not SKEWED:
            _store_kind(values_ptr, scalars_ptr, i_sf, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v - b_d)
    if REVERSE_KL & KINDS or (SKEW_REVERSE & KINDS and not SKEWED):
        b_v = b_1 * _total(sums_ptr, 1, splits, field, o_row, m_row)
        if REVERSE_KL & KINDS:
            _store_kind(values_ptr, scalars_ptr, i_rkl, field, o_row, m_row, m_read, b_valid, b_v, b_v + b_d, -b_d)
        if SKEW_REVERSE & KINDS and not SKEWED:
            _store_kind(values_ptr, scalars_ptr, i_sr, field, o_row, m_row, m_read, b_valid, b_v, b_v + b_d, -b_d)
    if JEFFREYS & KINDS:
        b_a = b_1 * _total(sums_ptr, 2, splits, field, o_row, m_row) * LN2
        b_b = -b_1 * _total(sums_ptr, 3, splits, field, o_row, m_row) * LN2
        b_v, b_a, b_b = b_a + b_b, b_a + b_d, b_b - b_d
        _store_kind(values_ptr, scalars_ptr, i_jef, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_b)
    if JENSEN_SHANNON & KINDS:
        b_a = (beta - 1.0) * b_1 * _total(sums_ptr, 4, splits, field, o_row, m_row) * LN2
        b_b = -beta * b_1 * _total(sums_ptr, 5, splits, field, o_row, m_row) * LN2
        _store_kind(values_ptr, scalars_ptr, i_js, field, o_row, m_row, m_read, b_valid, b_a + b_b, b_a, b_b)
    if TOTAL_VARIATION & KINDS:
        b_v = 0.5 * b_1 * _total(sums_ptr, 6, splits, field, o_row, m_row)
        b_a = 0.5 * b_1 * _total(sums_ptr, 7, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_tv, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if HELLINGER & KINDS:
        b_v = 0.5 * b_1 * _total(sums_ptr, 8, splits, field, o_row, m_row)
        b_a = 0.5 * b_v + 0.25 * b_d
        _store_kind(values_ptr, scalars_ptr, i_h, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if CROSS_ENTROPY & KINDS:
        b_v = b_1 * _total(sums_ptr, 9, splits, field, o_row, m_row) * LN2
        _store_kind(values_ptr, scalars_ptr, i_ce, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v)
    if SKEW_FORWARD & KINDS and SKEWED:
        b_v = b_1 * _total(sums_ptr, 10, splits, field, o_row, m_row)
        b_a = b_1 * _total(sums_ptr, 11, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_sf, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if SKEW_REVERSE & KINDS and SKEWED:
        b_v = b_1 * _total(sums_ptr, 12, splits, field, o_row, m_row)
        b_a = b_1 * _total(sums_ptr, 13, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_sr, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
