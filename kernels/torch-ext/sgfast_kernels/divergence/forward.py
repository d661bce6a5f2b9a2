"""Divergences over the whole vocabulary: a second read of both sides, after the read of ``lse_pair``.

``divergence_forward``  values (kinds, ...), and row scalars (4 + 2·kinds, ...): ``lse_pair``'s, then per kind ΣA and
                        ΣB, the row sums of the partials with respect to log p and log q, which backward needs.

If few rows would leave processors idle, programs share a row. A logit of −inf has probability 0, and a KL is inf if the
other side's probability is not 0. A row with a NaN or +inf logit, or of −inf alone, gives NaN. Masked rows are not read
and give 0.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import fast_log2
from .._rows import LAUNCH_OPTIONS, columns, mask_rows, on_device_of, required_layout, row_count, row_start, to_float32
from .finish import finish_kernel
from .kinds import (
    LABELS,
    SUM_APART,
    SUM_APART_P,
    SUM_COUNT,
    SUM_P_MIXTURE,
    SUM_P_RATIO,
    SUM_Q_LOG_P,
    SUM_Q_RATIO,
    SUM_ROOTS,
    SUM_SKEW_FORWARD,
    SUM_SKEW_REVERSE,
    SUMS,
    kind_bits,
    lacks_correction,
    lacks_rescale,
    needed,
    places_of,
    unbounded,
)
from .lse import LSE_FIELDS, lse_pair
from .terms import (
    BIG,
    LOG2_E,
    TINY,
    bits_per_unit,
    clamped,
    difference_of,
    joint_offsets,
    log2_quotient,
    mixture,
    offsets,
    probabilities,
    sign_of,
    skew_partials,
    squares,
)
from .tiles import label_rows, neighbours, split_rows, temperature_rows, tile, weights_of


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
    row_scalars = noisy.new_empty((LSE_FIELDS + 2 * len(kinds), *noisy.shape[:-1]), dtype=torch.float32)
    values = noisy.new_empty((len(kinds), *noisy.shape[:-1]), dtype=torch.float32)
    if rows > 0:
        lse = lse_pair(noisy, clean, mask, temperature, untempered=labels is not None)
        sizes = tile(noisy, clean, len(kinds), backward=False)
        shares, span = split_rows(noisy, rows, sizes["BV"])
        sums = noisy.new_empty((len(SUMS), shares, rows), dtype=torch.float32)
        modes = {"KINDS": kind_bits(kinds), "SKEWED": skew > 0, "EXACT": torch.float32 in (noisy.dtype, clean.dtype)}
        with on_device_of(noisy):
            if set(kinds) != {LABELS}:
                _forward_kernel[(rows, shares)](
                    noisy,
                    clean,
                    mask_rows(mask),
                    *temperature_rows(temperature),
                    lse,
                    sums,
                    rows,
                    width,
                    span,
                    *required_layout(noisy),
                    *required_layout(clean),
                    weights_of(beta),
                    weights_of(skew),
                    **modes,
                    **sizes,
                    **LAUNCH_OPTIONS,
                )
            finish_kernel[(triton.cdiv(rows, 128),)](
                noisy,
                label_rows(labels),
                mask_rows(mask),
                lse,
                sums,
                values,
                row_scalars,
                rows,
                width,
                *required_layout(noisy),
                shares,
                places_of(kinds),
                weights_of(beta),
                **modes,
                BN=128,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return values, row_scalars


@triton.jit
def _product(b_p, b_log, GUARDED: tl.constexpr):
    """P · log. If guarded, 0 · (±inf) and 0 · NaN are 0, and ratios that backward would clamp are infinite."""
    if GUARDED:
        b_log = tl.where(tl.abs(b_log) < BIG, b_log, b_log * float("inf"))
        b_log = tl.where(b_p > 0, b_log, 0.0)
    return b_p * b_log


@triton.jit
def _add_column(
    sums,
    b_x,
    b_y,
    row,
    beta,
    skew,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    EXACT: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """Add logits to the sums that the kinds need; ``kinds.SUMS`` lists the terms, ``finish`` the values."""
    # In the order of ``kinds.SUMS``.
    s_pd, s_qd, s_jsp, s_jsq, s_tv, s_tvp, s_h, s_ce, s_sf, s_sfp, s_sr, s_srp, s_d = sums
    _, _, _, rescale, ratio_row = row
    b_log_p, b_log_q, b_u, b_v = probabilities(b_x, b_y, row, KINDS)
    b_p, b_q = squares(b_u, b_v, KINDS)
    # The scalar is negated, not the block: Triton 3.6 spends an instruction on a block's sign.
    b_below = tl.fma(b_p, -rescale, b_q)  # Q − P
    b_d = b_log_p - b_log_q
    bits: tl.constexpr = bits_per_unit(KINDS)
    skew_asked: tl.constexpr = needed(KINDS, SKEWED, SUM_SKEW_FORWARD) or needed(KINDS, SKEWED, SUM_SKEW_REVERSE)
    if EXACT or skew_asked:
        b_bits = log2_quotient(b_x, b_y, ratio_row)
        b_finite = clamped(b_bits)
        b_difference = difference_of(b_p * rescale, b_q, b_finite)
    if EXACT:
        b_p *= rescale
        b_d = b_bits / bits
        s_d += b_difference
    if needed(KINDS, SKEWED, SUM_P_RATIO):
        s_pd += _product(b_p, b_d, GUARDED)
    if needed(KINDS, SKEWED, SUM_Q_RATIO):
        s_qd += _product(b_q, b_d, GUARDED)
    if needed(KINDS, SKEWED, SUM_Q_LOG_P):
        s_ce += _product(b_q, b_log_p, GUARDED)
    if needed(KINDS, SKEWED, SUM_APART):
        s_tv += tl.abs(b_below)
    if needed(KINDS, SKEWED, SUM_APART_P):
        s_tvp -= sign_of(b_below, b_p)
    if needed(KINDS, SKEWED, SUM_ROOTS):
        b_roots_apart = tl.fma(b_u, -tl.sqrt(rescale), b_v)
        s_h += b_roots_apart * b_roots_apart
    if needed(KINDS, SKEWED, SUM_P_MIXTURE):
        if EXACT:
            b_log_m, _ = mixture(b_p, b_q, b_finite, b_difference, beta)
            s_jsp -= b_p * ((tl.maximum(-b_finite, 0.0) + b_log_m) / bits)
            s_jsq -= b_q * ((tl.maximum(b_finite, 0.0) + b_log_m) / bits)
        else:
            b_log_m = fast_log2(tl.fma(b_p, beta[1] * rescale, tl.fma(b_q, beta[0], TINY)))
            s_jsp += _product(b_p, tl.fma(b_log_m, -1.0 / bits, b_log_p), GUARDED)
            s_jsq += _product(b_q, tl.fma(b_log_m, -1.0 / bits, b_log_q), GUARDED)
    if skew_asked and not EXACT:
        b_p *= rescale
    if needed(KINDS, SKEWED, SUM_SKEW_FORWARD):
        b_term, b_to_p, _ = skew_partials(b_p, b_q, b_finite, b_difference, skew)
        s_sf += b_term
        s_sfp += b_to_p
    if needed(KINDS, SKEWED, SUM_SKEW_REVERSE):
        b_term, _, b_to_p = skew_partials(b_q, b_p, -b_finite, -b_difference, skew)
        s_sr += b_term
        s_srp += b_to_p
    return s_pd, s_qd, s_jsp, s_jsq, s_tv, s_tvp, s_h, s_ce, s_sf, s_sfp, s_sr, s_srp, s_d


@triton.jit
def _where(condition, sums):
    """The sums, or zeros."""
    kept = ()
    for i in tl.static_range(SUM_COUNT):
        kept += (tl.where(condition, sums[i], 0.0),)  # type: ignore[assignment]
    return kept


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


@triton.jit(do_not_specialize=["rows", "t_step", "a_inner", "b_inner"])
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
    a_strides,
    b_inner,
    b_strides,
    betas,
    skews,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    EXACT: tl.constexpr,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ADJACENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Rows and columns are walked backwards: a cache may still hold the columns that pass 1 read last.
    i_row = rows.to(tl.int64) - 1 - tl.program_id(0)
    field = rows.to(tl.int64)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, width)
    if mask_ptr is not None:
        stop = tl.where(tl.load(mask_ptr + i_row) != 0, stop, start)
    slope = LOG2_E / tl.load(t_ptr + i_row * t_step)
    a_row = a_ptr + row_start(i_row, a_inner, a_strides)
    b_row = b_ptr + row_start(i_row, b_inner, b_strides)
    o_col = tl.arange(0, BV)
    m_a, s_a = tl.load(lse_ptr + i_row), tl.load(lse_ptr + field + i_row)
    m_b, s_b = tl.load(lse_ptr + 2 * field + i_row), tl.load(lse_ptr + 3 * field + i_row)
    c_a, c_b, correction = joint_offsets(m_a, s_a, m_b, s_b, slope)
    _, _, ratio_row = offsets(m_a, s_a, m_b, s_b, slope)
    rescale = tl.exp2(correction)
    row = (slope, c_a, c_b, rescale, ratio_row)

    sums = ()
    for _ in tl.static_range(SUM_COUNT):
        sums += (tl.zeros([BV // NEIGHBOURS], tl.float32),)  # type: ignore[assignment]
    tiles = (stop - start) // BV
    for i in tl.range(0, tiles, num_stages=STAGES):
        i_col = start + (tiles - 1 - i) * BV
        b_a, b_b = tl.load(a_row + i_col + o_col), tl.load(b_row + i_col + o_col)
        if STAGES == 1:
            b_a, b_b = to_float32(b_a), to_float32(b_b)
        sums = _add_tile(
            sums, b_a, b_b, row, betas, skews, KINDS, SKEWED, EXACT, BV, NEIGHBOURS, ADJACENT, GUARDED=False
        )
    # An infinite ratio shows in a sum: 0 · inf is NaN, and no sum of finite ratios is large. Such a row is read again
    # with guarded products. The tail of every row has guarded products too.
    b_magnitude = tl.zeros([BV // NEIGHBOURS], tl.float32)
    for i in tl.static_range(SUM_COUNT):
        if unbounded(i):
            b_magnitude += tl.abs(sums[i])
    finite = tl.sum(b_magnitude) < 1e20
    sums = _where(finite, sums)
    for i_col in range(tl.where(finite, start + tiles * BV, start), stop, BV):
        m_col = i_col + o_col < stop
        b_a = tl.load(a_row + i_col + o_col, mask=m_col, other=float("-inf"))
        b_b = tl.load(b_row + i_col + o_col, mask=m_col, other=float("-inf"))
        sums = _add_tile(
            sums, b_a, b_b, row, betas, skews, KINDS, SKEWED, EXACT, BV, NEIGHBOURS, ADJACENT, GUARDED=True
        )
    # All logarithms of P lack the same correction. One of the programs adds the correction, times ΣP = ΣQ.
    lacking = tl.where(tl.program_id(1) == 0, correction * s_b / bits_per_unit(KINDS), 0.0)
    o_part = sums_ptr + tl.program_id(1) * field + i_row
    for i in tl.static_range(SUM_COUNT):
        total = tl.sum(sums[i])
        if lacks_rescale(i, EXACT):
            total *= rescale
        if lacks_correction(i, EXACT):
            total += lacking
        tl.store(o_part + i * tl.num_programs(1) * field, total)
