"""From the sums over a row's logits to its divergences, and to the row scalars that backward reads."""

import triton
import triton.language as tl

from .._rows import row_start
from .kinds import (
    CROSS_ENTROPY,
    FORWARD_KL,
    HELLINGER,
    JEFFREYS,
    JENSEN_SHANNON,
    LABEL_CROSS_ENTROPY,
    REVERSE_KL,
    SKEW_FORWARD,
    SKEW_REVERSE,
    TOTAL_VARIATION,
)
from .terms import LN2, bits_per_unit
from .tiles import LOG2_E


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
    do_not_specialize=[
        *("rows", "width", "a_inner", "splits", "beta", "beta_rest"),
        *("i_fkl", "i_rkl", "i_jef", "i_js", "i_tv", "i_h", "i_ce", "i_sf", "i_sr", "i_label"),
    ]
)
def finish_kernel(
    a_ptr,
    label_ptr,
    mask_ptr,
    lse_ptr,
    sums_ptr,
    values_ptr,
    scalars_ptr,
    rows,
    width,
    a_inner,
    a_outer_stride,
    a_inner_stride,
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
    i_label,
    beta,
    beta_rest,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    EXACT: tl.constexpr,
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
    if LABEL_CROSS_ENTROPY & KINDS:
        b_m = tl.load(lse_ptr + o_row, mask=m_row, other=0.0)
        b_s = tl.load(lse_ptr + 4 * field + o_row, mask=m_row, other=1.0)
        b_label = tl.load(label_ptr + o_row, mask=m_read, other=-1)
        a_label = a_ptr + row_start(o_row, a_inner, a_outer_stride, a_inner_stride) + b_label
        b_x = tl.load(a_label, mask=(b_label >= 0) & (b_label < width), other=0.0).to(tl.float32)
        b_c = b_m * LOG2_E
        b_v = (b_m - b_x) + LN2 * (tl.log2(b_s) - tl.fma(b_m, LOG2_E, -b_c))
        # The other side and the temperature do not matter; a label beyond the vocabulary gives NaN.
        m_valid = (b_s > 0) & (b_s < float("inf")) & (b_label < width)
        m_label = m_read & (b_label >= 0)
        b_0 = tl.zeros([BN], tl.float32)
        _store_kind(values_ptr, scalars_ptr, i_label, field, o_row, m_row, m_label, m_valid, b_v, b_s, b_0)

    b_1 = 1.0 / b_scalar
    to_nats: tl.constexpr = LN2 * bits_per_unit(KINDS)
    # Σ(P − Q) is 0 but for what the normalisers were rounded by, and takes that off again.
    b_d = tl.zeros([BN], tl.float32)
    if EXACT:
        b_d = b_1 * _total(sums_ptr, 12, splits, field, o_row, m_row)
    if FORWARD_KL & KINDS or (SKEW_FORWARD & KINDS and not SKEWED):
        b_v = b_d - to_nats * b_1 * _total(sums_ptr, 1, splits, field, o_row, m_row)
        if FORWARD_KL & KINDS:
            _store_kind(values_ptr, scalars_ptr, i_fkl, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v - b_d)
        if SKEW_FORWARD & KINDS and not SKEWED:
            _store_kind(values_ptr, scalars_ptr, i_sf, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v - b_d)
    if REVERSE_KL & KINDS or (SKEW_REVERSE & KINDS and not SKEWED):
        b_v = to_nats * b_1 * _total(sums_ptr, 0, splits, field, o_row, m_row) - b_d
        if REVERSE_KL & KINDS:
            _store_kind(values_ptr, scalars_ptr, i_rkl, field, o_row, m_row, m_read, b_valid, b_v, b_v + b_d, -b_d)
        if SKEW_REVERSE & KINDS and not SKEWED:
            _store_kind(values_ptr, scalars_ptr, i_sr, field, o_row, m_row, m_read, b_valid, b_v, b_v + b_d, -b_d)
    if JEFFREYS & KINDS:
        b_a = to_nats * b_1 * _total(sums_ptr, 0, splits, field, o_row, m_row)
        b_b = -to_nats * b_1 * _total(sums_ptr, 1, splits, field, o_row, m_row)
        b_v, b_a, b_b = b_a + b_b, b_a + b_d, b_b - b_d
        _store_kind(values_ptr, scalars_ptr, i_jef, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_b)
    b_tv = tl.zeros([BN], tl.float32)
    if (TOTAL_VARIATION | JENSEN_SHANNON) & KINDS != 0:
        b_tv = 0.5 * b_1 * _total(sums_ptr, 4, splits, field, o_row, m_row)
    if JENSEN_SHANNON & KINDS:
        # Where no probability differs, what the logarithms were rounded by is left.
        b_a = tl.where(b_tv == 0, 0.0, beta_rest * to_nats * b_1 * _total(sums_ptr, 2, splits, field, o_row, m_row))
        b_b = tl.where(b_tv == 0, 0.0, beta * to_nats * b_1 * _total(sums_ptr, 3, splits, field, o_row, m_row))
        b_v = tl.minimum(b_a + b_b, LN2 * b_tv)
        _store_kind(values_ptr, scalars_ptr, i_js, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_b)
    if TOTAL_VARIATION & KINDS:
        b_a = 0.5 * b_1 * _total(sums_ptr, 5, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_tv, field, o_row, m_row, m_read, b_valid, b_tv, b_a, b_tv - b_a)
    if HELLINGER & KINDS:
        b_v = 0.5 * b_1 * _total(sums_ptr, 6, splits, field, o_row, m_row)
        b_a = 0.5 * b_v + 0.25 * b_d
        _store_kind(values_ptr, scalars_ptr, i_h, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if CROSS_ENTROPY & KINDS:
        b_v = LN2 * tl.log2(b_scalar) - to_nats * b_1 * _total(sums_ptr, 7, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_ce, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v)
    if SKEW_FORWARD & KINDS and SKEWED:
        b_v = b_1 * _total(sums_ptr, 8, splits, field, o_row, m_row)
        b_a = b_1 * _total(sums_ptr, 9, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_sf, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if SKEW_REVERSE & KINDS and SKEWED:
        b_v = b_1 * _total(sums_ptr, 10, splits, field, o_row, m_row)
        b_a = b_1 * _total(sums_ptr, 11, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_sr, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
