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
    LABEL_CROSS_ENTROPY,
    LOG2_E,
    REVERSE_KL,
    SKEW_FORWARD,
    SKEW_REVERSE,
    TOTAL_VARIATION,
    kind_bits,
    labels_of,
    neighbours,
    row_count,
    rows_of,
    split_rows,
    temperature_rows,
    tile,
)
from ._divergence_terms import (
    LN2,
    TINY,
    bits_per_unit,
    clamped,
    difference_of,
    joint_offsets,
    mixture,
    probabilities,
    skew_partials,
    squares,
    times_ratio,
)
from ._device import fast_log2
from ._rows import LAUNCH_OPTIONS, columns, on_device_of, row_layout, row_start
from .lse import lse_pair

# What `_add_terms` sums.
_SUMS = 12


def divergence_forward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    labels: Tensor | None = None,
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
        labels: (...) int64, below 0 where ignored: of ``label_cross_entropy``.
    """
    rows, width = row_count(noisy), noisy.shape[-1]
    row_scalars = noisy.new_empty((4 + 2 * len(kinds), *noisy.shape[:-1]), dtype=torch.float32)
    values = noisy.new_empty((len(kinds), *noisy.shape[:-1]), dtype=torch.float32)
    if rows > 0:
        lse = lse_pair(noisy, clean, mask, temperature, untempered=labels is not None)
        sizes = tile(noisy, clean, len(kinds), backward=False)
        shares, span = split_rows(noisy, rows, sizes["BV"])
        sums = noisy.new_empty((_SUMS, shares, rows), dtype=torch.float32)
        modes = {"KINDS": kind_bits(kinds), "SKEWED": skew > 0, "EXACT": torch.float32 in (noisy.dtype, clean.dtype)}
        with on_device_of(noisy):
            if set(kinds) != {"label_cross_entropy"}:
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
                noisy,
                labels_of(labels),
                rows_of(mask),
                lse,
                sums,
                values,
                row_scalars,
                rows,
                width,
                *row_layout(noisy),
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
def _product(b_p, b_log, GUARDED: tl.constexpr):
    """P · log; guarded: with 0 · (±inf) = 0 and 0 · NaN = 0."""
    if GUARDED:
        return times_ratio(b_p, b_log)
    else:
        return b_p * b_log


@triton.jit
def _add_column(sums, b_x, b_y, row, beta, skew, KINDS: tl.constexpr, SKEWED: tl.constexpr, EXACT: tl.constexpr, GUARDED: tl.constexpr):
    """Add logits to the sums of the kinds asked for; what ``_finish_kernel`` makes of them is written there."""
    s_pd, s_qd, s_jsp, s_jsq, s_tv, s_tvp, s_h, s_ce, s_sf, s_sfp, s_sr, s_srp = sums
    rescale = row[3]
    b_log_p, b_log_q, b_u, b_v = probabilities(b_x, b_y, row, KINDS)
    b_p, b_q = squares(b_u, b_v, KINDS)
    b_d = b_log_p - b_log_q
    if (REVERSE_KL | JEFFREYS | SKEW_REVERSE * (not SKEWED)) & KINDS != 0:
        s_pd += _product(b_p, b_d, GUARDED)
    if (FORWARD_KL | JEFFREYS | SKEW_FORWARD * (not SKEWED)) & KINDS != 0:
        s_qd += _product(b_q, b_d, GUARDED)
    if CROSS_ENTROPY & KINDS:
        s_ce += _product(b_q, b_log_p, GUARDED)
    b_difference = tl.fma(b_p, rescale, -b_q)
    if (TOTAL_VARIATION | JENSEN_SHANNON) & KINDS != 0:
        s_tv += tl.abs(b_difference)
    if TOTAL_VARIATION & KINDS:
        s_tvp += b_p * (b_difference > 0).to(tl.float32)
        s_tvp -= b_p * (b_difference < 0).to(tl.float32)
    if HELLINGER & KINDS:
        b_apart = tl.fma(b_u, tl.sqrt(rescale), -b_v)
        s_h += b_apart * b_apart
    if JENSEN_SHANNON & KINDS and not EXACT:
        b_m = tl.fma(b_p, (1.0 - beta) * rescale, tl.fma(b_q, beta, TINY))
        b_log_m = fast_log2(b_m)
        per_bit: tl.constexpr = 1.0 / bits_per_unit(KINDS)
        s_jsp += _product(b_p, tl.fma(b_log_m, -per_bit, b_log_p), GUARDED)
        s_jsq += _product(b_q, tl.fma(b_log_m, -per_bit, b_log_q), GUARDED)
    if (JENSEN_SHANNON * EXACT | (SKEW_FORWARD | SKEW_REVERSE) * SKEWED) & KINDS != 0:
        b_p *= rescale
        b_bits = clamped(tl.fma(b_d, bits_per_unit(KINDS), row[4]))
        b_difference = difference_of(b_p, b_q, b_bits)
        if JENSEN_SHANNON & KINDS and EXACT:
            b_log_m, _ = mixture(b_p, b_q, b_bits, b_difference, beta)
            s_jsp -= b_p * (tl.maximum(-b_bits, 0.0) + b_log_m)
            s_jsq -= b_q * (tl.maximum(b_bits, 0.0) + b_log_m)
        if SKEW_FORWARD & KINDS and SKEWED:
            b_term, b_to_p, _ = skew_partials(b_p, b_q, b_bits, b_difference, skew)
            s_sf += b_term
            s_sfp += b_to_p
        if SKEW_REVERSE & KINDS and SKEWED:
            b_term, _, b_to_p = skew_partials(b_q, b_p, -b_bits, -b_difference, skew)
            s_sr += b_term
            s_srp += b_to_p
    return s_pd, s_qd, s_jsp, s_jsq, s_tv, s_tvp, s_h, s_ce, s_sf, s_sfp, s_sr, s_srp


@triton.jit
def _add_tile(
    sums,
    b_x,
    b_y,
    row,
    beta,
    skew,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    EXACT: tl.constexpr,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ADJACENT: tl.constexpr,
    GUARDED: tl.constexpr,
):
    x_columns = columns(neighbours(b_x.to(tl.float32), BV, NEIGHBOURS, ADJACENT), ADJACENT)
    y_columns = columns(neighbours(b_y.to(tl.float32), BV, NEIGHBOURS, ADJACENT), ADJACENT)
    for i in tl.static_range(NEIGHBOURS):
        sums = _add_column(sums, x_columns[i], y_columns[i], row, beta, skew, KINDS, SKEWED, EXACT, GUARDED)
    return sums


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
    EXACT: tl.constexpr,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ADJACENT: tl.constexpr,
):
    # Backwards through rows and columns: what pass 1 read last may still be in a cache.
    i_row = rows.to(tl.int64) - 1 - tl.program_id(0)
    field = rows.to(tl.int64)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, width)
    if mask_ptr is not None:
        stop = tl.where(tl.load(mask_ptr + i_row) != 0, stop, start)
    slope = LOG2_E / tl.load(t_ptr + i_row * t_step)
    a_row = a_ptr + row_start(i_row, a_inner, a_outer_stride, a_inner_stride)
    b_row = b_ptr + row_start(i_row, b_inner, b_outer_stride, b_inner_stride)
    o_col = tl.arange(0, BV)
    m_a, s_a = tl.load(lse_ptr + i_row), tl.load(lse_ptr + field + i_row)
    m_b, s_b = tl.load(lse_ptr + 2 * field + i_row), tl.load(lse_ptr + 3 * field + i_row)
    c_a, c_b, correction = joint_offsets(m_a, s_a, m_b, s_b, slope)
    rescale = tl.exp2(correction)
    row = (slope, c_a, c_b, rescale, correction)

    b_0 = tl.zeros([BV // NEIGHBOURS], tl.float32)
    sums = (b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0)
    tiles = (stop - start) // BV
    for i in tl.range(0, tiles, num_stages=1):
        i_col = start + (tiles - 1 - i) * BV
        b_a, b_b = tl.load(a_row + i_col + o_col), tl.load(b_row + i_col + o_col)
        sums = _add_tile(sums, b_a, b_b, row, beta, skew, KINDS, SKEWED, EXACT, BV, NEIGHBOURS, ADJACENT, GUARDED=False)
    # Infinite ratios show: 0 · inf is NaN. Such rows are read again, with care; so is every row's tail.
    finite = tl.sum(tl.abs(sums[0]) + tl.abs(sums[1]) + tl.abs(sums[2]) + tl.abs(sums[3]) + tl.abs(sums[7])) < float("inf")
    kept = ()
    for i in tl.static_range(12):
        kept = kept + (tl.where(finite, sums[i], 0.0),)
    sums = kept
    for i_col in range(tl.where(finite, start + tiles * BV, start), stop, BV):
        m_col = i_col + o_col < stop
        b_a = tl.load(a_row + i_col + o_col, mask=m_col, other=float("-inf"))
        b_b = tl.load(b_row + i_col + o_col, mask=m_col, other=float("-inf"))
        sums = _add_tile(sums, b_a, b_b, row, beta, skew, KINDS, SKEWED, EXACT, BV, NEIGHBOURS, ADJACENT, GUARDED=True)
    # What the logarithms of P lack is the same for all: one of the programs adds it, times ΣP = ΣQ.
    lacking = tl.where(tl.program_id(1) == 0, correction * s_b / bits_per_unit(KINDS), 0.0)
    o_part = sums_ptr + tl.program_id(1) * field + i_row
    for i in tl.static_range(12):
        total = tl.sum(sums[i])
        if i == 0 or i == 5 or i == 2 and not EXACT:  # sums over P
            total *= rescale
        if i == 0 or i == 1 or i == 7 or i == 2 and not EXACT:
            total += lacking
        tl.store(o_part + i * tl.num_programs(1) * field, total)


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
        *("rows", "width", "a_inner", "splits", "beta"),
        *("i_fkl", "i_rkl", "i_jef", "i_js", "i_tv", "i_h", "i_ce", "i_sf", "i_sr", "i_label"),
    ]
)
def _finish_kernel(
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
    js_to_nats: tl.constexpr = LN2 if EXACT else to_nats
    b_0 = tl.zeros([BN], tl.float32)
    if FORWARD_KL & KINDS or (SKEW_FORWARD & KINDS and not SKEWED):
        b_v = -to_nats * b_1 * _total(sums_ptr, 1, splits, field, o_row, m_row)
        if FORWARD_KL & KINDS:
            _store_kind(values_ptr, scalars_ptr, i_fkl, field, o_row, m_row, m_read, b_valid, b_v, b_0, b_v)
        if SKEW_FORWARD & KINDS and not SKEWED:
            _store_kind(values_ptr, scalars_ptr, i_sf, field, o_row, m_row, m_read, b_valid, b_v, b_0, b_v)
    if REVERSE_KL & KINDS or (SKEW_REVERSE & KINDS and not SKEWED):
        b_v = to_nats * b_1 * _total(sums_ptr, 0, splits, field, o_row, m_row)
        if REVERSE_KL & KINDS:
            _store_kind(values_ptr, scalars_ptr, i_rkl, field, o_row, m_row, m_read, b_valid, b_v, b_v, b_0)
        if SKEW_REVERSE & KINDS and not SKEWED:
            _store_kind(values_ptr, scalars_ptr, i_sr, field, o_row, m_row, m_read, b_valid, b_v, b_v, b_0)
    if JEFFREYS & KINDS:
        b_a = to_nats * b_1 * _total(sums_ptr, 0, splits, field, o_row, m_row)
        b_b = -to_nats * b_1 * _total(sums_ptr, 1, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_jef, field, o_row, m_row, m_read, b_valid, b_a + b_b, b_a, b_b)
    b_tv = b_0
    if (TOTAL_VARIATION | JENSEN_SHANNON) & KINDS != 0:
        b_tv = 0.5 * b_1 * _total(sums_ptr, 4, splits, field, o_row, m_row)
    if JENSEN_SHANNON & KINDS:
        # Where no probability differs, what the logarithms were rounded by is left.
        b_a = tl.where(b_tv == 0, 0.0, (1.0 - beta) * js_to_nats * b_1 * _total(sums_ptr, 2, splits, field, o_row, m_row))
        b_b = tl.where(b_tv == 0, 0.0, beta * js_to_nats * b_1 * _total(sums_ptr, 3, splits, field, o_row, m_row))
        b_v = tl.minimum(b_a + b_b, LN2 * b_tv)
        _store_kind(values_ptr, scalars_ptr, i_js, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_b)
    if TOTAL_VARIATION & KINDS:
        b_a = 0.5 * b_1 * _total(sums_ptr, 5, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_tv, field, o_row, m_row, m_read, b_valid, b_tv, b_a, b_tv - b_a)
    if HELLINGER & KINDS:
        b_v = 0.5 * b_1 * _total(sums_ptr, 6, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_h, field, o_row, m_row, m_read, b_valid, b_v, 0.5 * b_v, 0.5 * b_v)
    if CROSS_ENTROPY & KINDS:
        b_v = LN2 * tl.log2(b_scalar) - to_nats * b_1 * _total(sums_ptr, 7, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_ce, field, o_row, m_row, m_read, b_valid, b_v, b_0, b_v)
    if SKEW_FORWARD & KINDS and SKEWED:
        b_v = b_1 * _total(sums_ptr, 8, splits, field, o_row, m_row)
        b_a = b_1 * _total(sums_ptr, 9, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_sf, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if SKEW_REVERSE & KINDS and SKEWED:
        b_v = b_1 * _total(sums_ptr, 10, splits, field, o_row, m_row)
        b_a = b_1 * _total(sums_ptr, 11, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_sr, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
