"""Divergences over the few atoms of a top-k support: the logits at its indices, and one atom for the rest.

The terms have their plainest form, with normalised probabilities, because a row has few atoms. Tiles are [rows, atoms],
scalars of rows are [rows, 1]. Lanes without an atom have probability 0 on both sides.
"""

import triton
import triton.language as tl

from .kinds import (
    CROSS_ENTROPY,
    FORWARD_KL,
    HELLINGER,
    JEFFREYS,
    JENSEN_SHANNON,
    REVERSE_KL,
    SKEW_FORWARD,
    TOTAL_VARIATION,
)
from .terms import (
    LN2,
    TINY,
    clamped,
    difference_of,
    log2_quotient,
    log2_ratio,
    mixture,
    offsets,
    reference,
    sign_of,
    skew_partials,
    times_ratio,
)

# The meanings of a support, in the order of a kernel's ``SUPPORT``.
SUPPORTS = ("truncate", "renormalize", "tail")
TRUNCATE, RENORMALIZE, TAIL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# The scalars of a row before the scalars of the kinds: largest logit and sum of weights, of x, of y, and of both tails.
ROW_SCALARS = 8


def rows_and_atoms(size: int) -> dict[str, int]:
    """Return a program's tile: a few rows, and one lane per index and one for the tail."""
    atoms_each = triton.next_power_of_2(size + 1)
    return {"BN": min(max(512 // atoms_each, 1), 16), "BK": atoms_each}


@triton.jit
def load_support(union_ptr, o_row, m_read, size, a_row, b_row, BK: tl.constexpr):
    """Indices of the rows' supports, −1 beyond them, and both sides' logits there."""
    o_atom = tl.arange(0, BK)[None, :]
    b_index = tl.load(union_ptr + o_row * size + o_atom, mask=m_read & (o_atom < size), other=-1)
    b_x = tl.load(a_row + b_index, mask=b_index >= 0, other=float("-inf")).to(tl.float32)
    b_y = tl.load(b_row + b_index, mask=b_index >= 0, other=float("-inf")).to(tl.float32)
    return b_index, b_x, b_y


@triton.jit
def atoms(b_x, b_y, m_a, s_a, m_b, s_b, r_a, t_a, r_b, t_b, slope, size, SUPPORT: tl.constexpr, BK: tl.constexpr):
    """p, q, log2 p/q and log2 p of every atom, and the mask of the tail's lane, which is lane ``size``."""
    c_a, c_b, row = offsets(m_a, s_a, m_b, s_b, slope)
    b_zx = tl.fma(b_x, slope, -c_a)
    b_p, b_q = tl.exp2(b_zx) / s_a, tl.exp2(tl.fma(b_y, slope, -c_b)) / s_b
    b_d, b_log_p = log2_quotient(b_x, b_y, row), b_zx - tl.log2(s_a)
    m_tail = tl.arange(0, BK)[None, :] == size
    if SUPPORT == TAIL:
        c_a, c_b, c_ra, c_rb = (
            reference(m_a, slope),
            reference(m_b, slope),
            reference(r_a, slope),
            reference(r_b, slope),
        )
        p = (t_a / s_a) * tl.exp2(c_ra - c_a)
        q = (t_b / s_b) * tl.exp2(c_rb - c_b)
        # The differences within each side are taken first, because the sides may lie apart.
        d = ((c_ra - c_a) - (c_rb - c_b)) + (log2_ratio(t_a, t_b) - log2_ratio(s_a, s_b))
        b_p, b_q = tl.where(m_tail, p, b_p), tl.where(m_tail, q, b_q)
        b_d = tl.where(m_tail, d, b_d)
        b_log_p = tl.where(m_tail, (c_ra - c_a) + tl.log2(t_a / s_a), b_log_p)
    # The ratio is NaN where both sides are 0.
    return b_p, b_q, tl.where(b_d == b_d, b_d, 0.0), b_log_p, m_tail


@triton.jit
def term_and_partials(
    b_p,
    b_q,
    b_d,
    b_log_p,
    beta,
    skew,
    KIND: tl.constexpr,
    SUPPORT: tl.constexpr,
):
    """Each atom's term of one kind, and the partials with respect to log p and log q.

    Over whole distributions a multiple of p − q is added to the terms of the KL and skew kinds, and a multiple of p (of
    q) to their partials. The multiples sum to 0. They keep terms and partials free of cancellation near p = q. Under
    ``truncate`` terms and partials follow the definition. ``beta`` and ``skew`` are pairs: a weight w, and 1 − w.
    """
    b_difference = difference_of(b_p, b_q, b_d)
    b_pl, b_ql = times_ratio(b_p, b_d) * LN2, times_ratio(b_q, b_d) * LN2
    b_finite = clamped(b_d)
    whole: tl.constexpr = 0.0 if SUPPORT == TRUNCATE else 1.0
    if KIND == FORWARD_KL:
        b_term, b_a, b_b = whole * b_difference - b_ql, whole * b_p - b_q, (1.0 - whole) * b_q - b_ql
        if SUPPORT != TRUNCATE:
            b_a = b_difference
    elif KIND == REVERSE_KL:
        b_term, b_a, b_b = b_pl - whole * b_difference, b_pl + (1.0 - whole) * b_p, -b_p
        if SUPPORT != TRUNCATE:
            b_b = -b_difference
    elif KIND == JEFFREYS:
        b_term = tl.where(b_difference != 0, b_difference * b_d * LN2, 0.0)
        b_a, b_b = b_pl + b_difference, -b_ql - b_difference
    elif KIND == JENSEN_SHANNON:
        b_log_m, _ = mixture(b_p, b_q, b_finite, b_difference, beta)
        b_a = -beta[1] * b_p * (tl.maximum(-b_finite, 0.0) + b_log_m) * LN2
        b_b = -beta[0] * b_q * (tl.maximum(b_finite, 0.0) + b_log_m) * LN2
        b_term = b_a + b_b
    elif KIND == TOTAL_VARIATION:
        b_term, b_a, b_b = 0.5 * tl.abs(b_difference), 0.5 * sign_of(b_d, b_p), -0.5 * sign_of(b_d, b_q)
    elif KIND == HELLINGER:
        b_u, b_v = tl.sqrt(b_p), tl.sqrt(b_q)
        b_apart = b_difference / tl.maximum(b_u + b_v, TINY)  # √p − √q
        b_term, b_a, b_b = 0.5 * b_apart * b_apart, 0.5 * b_u * b_apart, -0.5 * b_v * b_apart
    elif KIND == CROSS_ENTROPY:
        b_term = -times_ratio(b_q, b_log_p) * LN2
        b_a, b_b = b_difference if SUPPORT != TRUNCATE else -b_q, b_term
    elif KIND == SKEW_FORWARD:
        b_term, b_a, b_b = skew_partials(b_p, b_q, b_finite, b_difference, skew)
        linear = (1.0 - whole) * skew[1]
        b_term, b_a, b_b = b_term - linear * b_difference, b_a - linear * b_p, b_b + linear * b_q
    else:
        b_term, b_b, b_a = skew_partials(b_q, b_p, -b_finite, -b_difference, skew)
        linear = (1.0 - whole) * skew[1]
        b_term, b_a, b_b = b_term + linear * b_difference, b_a + linear * b_p, b_b - linear * b_q
    return b_term, b_a, b_b


@triton.jit
def finite_or_zero(b_partial):
    """The rows' partials and their sum. Both are 0 in a row whose sum is infinite, because the row has no gradient."""
    total = tl.sum(b_partial, axis=1, keep_dims=True)
    infinite = tl.abs(total) == float("inf")
    return tl.where(infinite, 0.0, b_partial), tl.where(infinite, 0.0, total)
