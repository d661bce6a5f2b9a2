"""Terms of the divergences over a tile of logits: arithmetic in float32 that keeps its digits, for any GPU.

Probabilities are unnormalised, P = p·S and Q = q·S with the clean side's S. Every term is linear in (P, Q) for a given
ratio, so that one division per row replaces one multiplication per logit. Logarithms are to base 2.
"""

import triton
import triton.language as tl

from .kinds import HELLINGER, asked

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
# A finite number in place of an infinite ratio: its product with a probability of 0 is 0, and no product overflows.
BIG = tl.constexpr(1e30)
# A probability below this number has lost its digits.
TINY = tl.constexpr(1.1754943508222875e-38)
# The reference of weights is not below this number of bits. The rounding error of a product k·m stays in the weights as
# a power of two. At 1e9 the power is at most 2^32; at the −1e20 of a masked logit it would overflow.
LEAST_EXPONENT = tl.constexpr(-1e9)


@triton.jit
def reference(maximum, slope):
    """fl(k·r) of the maximum r; finite where all logits are −inf or masked."""
    # The fused sum with 0 rounds the product here. The compiler would fuse a plain product, unrounded, into the
    # caller's sum.
    return tl.maximum(tl.fma(maximum, slope, 0.0), LEAST_EXPONENT)


@triton.jit
def difference_of(b_p, b_q, b_d):
    """P − Q = (P + Q)·tanh(ln P/Q / 2). Close sides take a polynomial in d = log2 P/Q, with relative error 1e-7."""
    b_s = b_d * b_d
    b_t = ((-2.94606680e-05 * b_s + 6.64874522e-04) * b_s - 1.38756705e-02) * b_s + 3.46573579e-01
    # d is NaN where both sides are 0.
    return tl.where(b_s < 1.0, (b_p + b_q) * (b_t * b_d), b_p - b_q)


@triton.jit
def log2_of_one_minus(b_t, b_u):
    """log2 of u = 1 − t for t in [0, 1], with relative error 1e-7. No GPU's fast logarithm is as exact near 1.

    ``b_u`` has the digits if t is near 1, and ``b_t`` if t is near 0.
    """
    b_u = tl.maximum(b_u, TINY)
    b_bits = b_u.to(tl.int32, bitcast=True)
    # u = 2^e · (1 + f), −0.293 ≤ f < 0.415; where e = 0, f is −t with all its digits.
    b_e = (b_bits - 0x3F3504F3) >> 23
    b_f = tl.where(b_e == 0, -b_t, (b_bits - (b_e << 23)).to(tl.float32, bitcast=True) - 1.0)
    b_r = ((0.12611601 * b_f - 0.20741245) * b_f + 0.21567666) * b_f - 0.23892173
    b_r = (((b_r * b_f + 0.28791786) * b_f - 0.36070477) * b_f + 0.48091062) * b_f - 0.72134733
    return (b_r * b_f + 1.442695) * b_f + b_e.to(tl.float32)


@triton.jit
def log2_ratio(a, b):
    """log2(a / b) for positive scalars: exactly 0 for equal scalars, and with all digits for close scalars."""
    f = (a - b) / b
    s = f / (2.0 + f)
    z = s * s
    series = (((z / 9 + 1.0 / 7) * z + 0.2) * z + 1.0 / 3) * z + 1.0
    return tl.where(tl.abs(f) < 0.25, s * series * (2 / LN2), tl.log2(a / b))


@triton.jit
def offsets(m_a, s_a, m_b, s_b, slope):
    """c of both sides, and the row's scalars for `log2_quotient`."""
    c_a, c_b = m_a * slope, m_b * slope
    # The sums contain the rounding errors of both c.
    rounding = tl.fma(m_a, slope, -c_a) - tl.fma(m_b, slope, -c_b)
    gap = m_a - m_b
    # Close sides lose no digits in x − y. Sides that lie apart would lose as many digits as the shift between them has.
    apart = tl.abs(gap * slope) > 6.0
    return (
        c_a,
        c_b,
        (
            slope,
            tl.where(apart, m_a, 0.0),
            tl.where(apart, m_b, 0.0),
            tl.where(apart, 0.0, gap),
            log2_ratio(s_a, s_b) - rounding,
        ),
    )


@triton.jit
def log2_quotient(b_x, b_y, row):
    """d = log2 P/Q = k·((x − o_x) − (y − o_y) − gap) − shift, for a row's (k, o_x, o_y, gap, shift) of `offsets`."""
    slope, o_a, o_b, gap, shift = row
    return tl.fma(((b_x - o_a) - (b_y - o_b)) - gap, slope, -shift)


@triton.jit
def clamped(b_d):
    """d made finite, for products with a probability of 0; d is NaN where both probabilities are 0."""
    return tl.minimum(tl.maximum(b_d, -BIG), BIG)


@triton.jit
def times_ratio(b_p, b_d):
    """P · d with 0 · (±inf) = 0 and 0 · NaN = 0."""
    return tl.where(b_p > 0, b_p * b_d, 0.0)


@triton.jit
def sign_of(b_d, b_p):
    """P · sign(d), 0 where d is 0; P ≥ 0."""
    b_sign = b_d.to(tl.uint32, bitcast=True) & 0x80000000
    b_signed = (b_p.to(tl.uint32, bitcast=True) | b_sign).to(tl.float32, bitcast=True)
    return tl.where(b_d != 0, b_signed, 0.0)


@triton.jit
def mixture(b_p, b_q, b_d, b_difference, weights):
    """For m = w·Q + (1 − w)·P with weights (w, 1 − w): log2(m / max(P, Q)), and m / max(P, Q)."""
    b_inverse = 1.0 / tl.maximum(tl.maximum(b_p, b_q), TINY)
    b_of_smaller, b_of_larger = tl.where(b_d > 0, weights[0], weights[1]), tl.where(b_d > 0, weights[1], weights[0])
    b_share = tl.fma(b_of_smaller, tl.minimum(b_p, b_q) * b_inverse, b_of_larger)
    return log2_of_one_minus(b_of_smaller * (tl.abs(b_difference) * b_inverse), b_share), b_share


@triton.jit
def joint_offsets(m_a, s_a, m_b, s_b, slope):
    """c of both sides and the correction: log2 P = k·x − c_x + correction, log2 Q = k·y − c_y.

    The correction undoes the rounding of c_x.
    """
    # The products are fused with 0, because pass 1 rounded them. The compiler would fuse plain products, unrounded,
    # into sums.
    c_a, c_b = tl.fma(m_a, slope, 0.0), tl.fma(m_b, slope, 0.0)
    shift = log2_ratio(s_a, s_b)
    shifted = c_a + shift
    part = shifted - c_a
    return shifted, c_b, ((shifted - part) - c_a) + (part - shift)


@triton.constexpr_function
def bits_per_unit(kinds):
    """Unit of the fast logarithms, in bits. It is 2 if Hellinger needs √P and √Q as powers of two."""
    return 2.0 if asked(kinds, HELLINGER) else 1.0


@triton.jit
def probabilities(b_x, b_y, row, KINDS: tl.constexpr):
    """log P and log Q (see ``bits_per_unit``), and their powers of two: P (√P) but for the factor ``rescale``, Q (√Q).

    ``row`` is (slope, c_x, c_y, rescale), from ``joint_offsets``.
    """
    scale: tl.constexpr = 1.0 / bits_per_unit(KINDS)
    b_log_p = tl.fma(b_x, scale * row[0], -scale * row[1])
    b_log_q = tl.fma(b_y, scale * row[0], -scale * row[2])
    return b_log_p, b_log_q, tl.exp2(b_log_p), tl.exp2(b_log_q)


@triton.jit
def squares(b_u, b_v, KINDS: tl.constexpr):
    """P and Q from the powers of two that ``probabilities`` returns."""
    return (b_u * b_u, b_v * b_v) if bits_per_unit(KINDS) == 2.0 else (b_u, b_v)


@triton.jit
def skew_partials(b_p, b_q, b_d, b_difference, skew):
    """Term of KL(Q‖m), m = λQ + (1 − λ)P, and its partials with respect to log P and log Q (see the caller).

    ``skew`` is (λ, 1 − λ).
    """
    b_log_m, b_share = mixture(b_p, b_q, b_d, b_difference, skew)
    b_inside = b_q * (tl.maximum(b_d, 0.0) + b_log_m) * LN2
    b_m = b_share * tl.maximum(b_p, b_q)
    b_over_m = skew[1] * b_difference / tl.maximum(b_m, TINY)
    return skew[1] * b_difference - b_inside, skew[1] * b_p * b_over_m, skew[0] * b_q * b_over_m - b_inside
