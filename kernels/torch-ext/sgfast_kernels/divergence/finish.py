"""The last step of forward: sums over a row's logits become divergences, and row scalars for backward."""

import triton
import triton.language as tl

from .._rows import row_start
from .kinds import (
    CROSS_ENTROPY,
    DIVERGENCE_COUNT,
    FORWARD_KL,
    HELLINGER,
    JEFFREYS,
    JENSEN_SHANNON,
    LABEL_CROSS_ENTROPY,
    REVERSE_KL,
    SKEW_FORWARD,
    SUM_APART,
    SUM_APART_P,
    SUM_COUNT,
    SUM_DIFFERENCE,
    SUM_P_MIXTURE,
    SUM_P_RATIO,
    SUM_Q_LOG_P,
    SUM_Q_MIXTURE,
    SUM_Q_RATIO,
    SUM_ROOTS,
    SUM_SKEW_FORWARD,
    SUM_SKEW_FORWARD_P,
    SUM_SKEW_REVERSE,
    SUM_SKEW_REVERSE_P,
    TOTAL_VARIATION,
    acting_kind,
    asked,
    needed,
    place_of,
)
from .lse import LSE_FIELDS
from .terms import LN2, LOG2_E, bits_per_unit

_LSE_FIELDS = tl.constexpr(LSE_FIELDS)


@triton.jit
def _total(sums_ptr, i_sum, splits, field, o_row, m_row):
    b_sum = tl.zeros(o_row.shape, tl.float32)
    for i_split in range(splits):
        b_sum += tl.load(sums_ptr + (i_sum * splits + i_split) * field + o_row, mask=m_row, other=0.0)
    return b_sum


@triton.jit
def _store_kind(values_ptr, scalars_ptr, place, field, o_row, m_row, m_read, b_valid, b_value, b_to_p, b_to_q):
    # Each value is a sum of terms ≥ 0. Rounding may leave the value below 0.
    b_value = tl.where(b_valid, tl.maximum(b_value, 0.0), float("nan"))
    tl.store(values_ptr + place * field + o_row, tl.where(m_read, b_value, 0.0), mask=m_row)
    o_field = scalars_ptr + (_LSE_FIELDS + 2 * place) * field + o_row
    tl.store(o_field, tl.where(m_read, b_to_p, 0.0), mask=m_row)
    tl.store(o_field + field, tl.where(m_read, b_to_q, 0.0), mask=m_row)


@triton.jit
def _value_and_partial_sums(totals, b_d, b_1, b_s, betas, TO_NATS: tl.constexpr, KIND: tl.constexpr):
    """A kind's value, ΣA and ΣB from the totals of its sums.

    ``b_d`` is Σ(P − Q)/S, the rounding error of the normalisers. It corrects each value. ``b_1`` is 1/S and ``b_s`` is
    S, the clean side's sum of weights.
    """
    if KIND == FORWARD_KL:
        b_v = b_d - TO_NATS * b_1 * totals[SUM_Q_RATIO]
        b_a, b_b = b_d, b_v - b_d
    elif KIND == REVERSE_KL:
        b_v = TO_NATS * b_1 * totals[SUM_P_RATIO] - b_d
        b_a, b_b = b_v + b_d, -b_d
    elif KIND == JEFFREYS:
        b_a = TO_NATS * b_1 * totals[SUM_P_RATIO]
        b_b = -TO_NATS * b_1 * totals[SUM_Q_RATIO]
        b_v, b_a, b_b = b_a + b_b, b_a + b_d, b_b - b_d
    elif KIND == JENSEN_SHANNON:
        b_tv = 0.5 * b_1 * totals[SUM_APART]
        # If no probability differs, the sums contain only rounding errors of the logarithms.
        b_a = tl.where(b_tv == 0, 0.0, betas[1] * TO_NATS * b_1 * totals[SUM_P_MIXTURE])
        b_b = tl.where(b_tv == 0, 0.0, betas[0] * TO_NATS * b_1 * totals[SUM_Q_MIXTURE])
        b_v = tl.minimum(b_a + b_b, LN2 * b_tv)
    elif KIND == TOTAL_VARIATION:
        b_v = 0.5 * b_1 * totals[SUM_APART]
        b_a = 0.5 * b_1 * totals[SUM_APART_P]
        b_b = b_v - b_a
    elif KIND == HELLINGER:
        b_v = 0.5 * b_1 * totals[SUM_ROOTS]
        b_a = 0.5 * b_v + 0.25 * b_d
        b_b = b_v - b_a
    elif KIND == CROSS_ENTROPY:
        b_v = LN2 * tl.log2(b_s) - TO_NATS * b_1 * totals[SUM_Q_LOG_P]
        b_a, b_b = b_d, b_v
    elif KIND == SKEW_FORWARD:
        b_v, b_a = b_1 * totals[SUM_SKEW_FORWARD], b_1 * totals[SUM_SKEW_FORWARD_P]
        b_b = b_v - b_a
    else:
        b_v, b_a = b_1 * totals[SUM_SKEW_REVERSE], b_1 * totals[SUM_SKEW_REVERSE_P]
        b_b = b_v - b_a
    return b_v, b_a, b_b


@triton.jit(do_not_specialize=["rows", "width", "a_inner", "splits", "places"])
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
    a_strides,
    splits,
    places: tl.int64,
    betas,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    EXACT: tl.constexpr,
    BN: tl.constexpr,
):
    """Turn sums over logits into values, ΣA and ΣB, and copy the scalars of ``lse_pair``."""
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    field = rows.to(tl.int64)
    m_row = o_row < rows
    m_read = m_row
    if mask_ptr is not None:
        m_read = m_row & (tl.load(mask_ptr + o_row, mask=m_row, other=0) != 0)
    b_valid = m_row
    for i in tl.static_range(_LSE_FIELDS):
        b_scalar = tl.load(lse_ptr + i * field + o_row, mask=m_row, other=0.0)
        tl.store(scalars_ptr + i * field + o_row, tl.where(m_read, b_scalar, 0.0), mask=m_row)
        if i % 2 == 1:  # a side's sum
            b_valid &= (b_scalar > 0) & (b_scalar < float("inf"))
    b_s = b_scalar  # the clean side's sum comes last
    if asked(KINDS, LABEL_CROSS_ENTROPY):
        b_m = tl.load(lse_ptr + o_row, mask=m_row, other=0.0)
        b_s1 = tl.load(lse_ptr + _LSE_FIELDS * field + o_row, mask=m_row, other=1.0)
        b_label = tl.load(label_ptr + o_row, mask=m_read, other=-1)
        a_label = a_ptr + row_start(o_row, a_inner, a_strides) + b_label
        b_x = tl.load(a_label, mask=(b_label >= 0) & (b_label < width), other=0.0).to(tl.float32)
        b_c = b_m * LOG2_E
        b_v = (b_m - b_x) + LN2 * (tl.log2(b_s1) - tl.fma(b_m, LOG2_E, -b_c))
        # The other side and the temperature have no effect here. A label beyond the vocabulary gives NaN.
        m_valid = (b_s1 > 0) & (b_s1 < float("inf")) & (b_label < width)
        m_label = m_read & (b_label >= 0)
        b_0 = tl.zeros([BN], tl.float32)
        place = place_of(places, LABEL_CROSS_ENTROPY)
        _store_kind(values_ptr, scalars_ptr, place, field, o_row, m_row, m_label, m_valid, b_v, b_s1, b_0)

    totals = ()
    for i in tl.static_range(SUM_COUNT):
        b_total = tl.zeros([BN], tl.float32)
        if needed(KINDS, SKEWED, i) or (EXACT and i == SUM_DIFFERENCE):
            b_total = _total(sums_ptr, i, splits, field, o_row, m_row)
        totals += (b_total,)  # type: ignore[assignment]
    b_1 = 1.0 / b_s
    b_d = tl.zeros([BN], tl.float32)
    if EXACT:
        b_d = b_1 * totals[SUM_DIFFERENCE]
    to_nats: tl.constexpr = LN2 * bits_per_unit(KINDS)
    for i in tl.static_range(DIVERGENCE_COUNT):
        if asked(KINDS, i):
            b_v, b_a, b_b = _value_and_partial_sums(totals, b_d, b_1, b_s, betas, to_nats, acting_kind(i, SKEWED))
            place = place_of(places, i)
            _store_kind(values_ptr, scalars_ptr, place, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_b)
