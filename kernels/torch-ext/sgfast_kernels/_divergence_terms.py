"""What one tile of logits contributes to divergences: arithmetic in float32 that keeps its digits, for any GPU.

Probabilities come unnormalised, P = p·S and Q = q·S with the clean side's S: every term is linear in (P, Q) for a given
ratio, so that one division per row replaces one multiplication per logit. Logarithms are to base 2.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# Infinite ratios where a product with probability 0 must be 0: large, but not so large that a product overflows.
BIG = tl.constexpr(1e30)
# Below it a probability has lost its digits.
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def difference_of(b_p, b_q, b_d):
    """P − Q = (P + Q)·tanh(ln P/Q / 2): for close sides by a polynomial in d = log2 P/Q, to 1e-7 however close."""
    b_s = b_d * b_d
    b_t = ((-2.94606680e-05 * b_s + 6.64874522e-04) * b_s - 1.38756705e-02) * b_s + 3.46573579e-01
    # d is NaN where both sides are 0.
    return tl.where(b_s < 1.0, (b_p + b_q) * (b_t * b_d), b_p - b_q)


@triton.jit
def log2_of_one_minus(b_t):
    """log2(1 − t) for t in [0, 1], relative error 1e-7: no GPU's fast logarithm has that near 1."""
    b_u = tl.maximum(1.0 - b_t, TINY)
    b_bits = b_u.to(tl.int32, bitcast=True)
    # u = 2^e · (1 + f), −0.293 ≤ f < 0.415; where e = 0, f is −t with all its digits.
    b_e = (b_bits - 0x3F3504F3) >> 23
    b_f = tl.where(b_e == 0, -b_t, (b_bits - (b_e << 23)).to(tl.float32, bitcast=True) - 1.0)
    b_r = ((0.12611601 * b_f - 0.20741245) * b_f + 0.21567666) * b_f - 0.23892173
    b_r = (((b_r * b_f + 0.28791786) * b_f - 0.36070477) * b_f + 0.48091062) * b_f - 0.72134733
    return (b_r * b_f + 1.442695) * b_f + b_e.to(tl.float32)


@triton.jit
def log2_ratio(a, b):
    """log2(a / b) for positive scalars, exactly 0 where they are equal and close to 0 with all digits."""
    f = (a - b) / b
    s = f / (2.0 + f)
    z = s * s
    series = (((z / 9 + 1.0 / 7) * z + 0.2) * z + 1.0 / 3) * z + 1.0
    return tl.where(tl.abs(f) < 0.25, s * series * (2 / LN2), tl.log2(a / b))


@triton.jit
def offsets(m_a, s_a, m_b, s_b, slope):
    """c of both sides, and (gap, shift) of d = k·(x − y − gap) − shift, which loses no digits to common offsets."""
    c_a, c_b = m_a * slope, m_b * slope
    # What the c were rounded by is in the sums.
    rounding = tl.fma(m_a, slope, -c_a) - tl.fma(m_b, slope, -c_b)
    return c_a, c_b, m_a - m_b, log2_ratio(s_a, s_b) - rounding


@triton.jit
def clamped(b_d):
    """d made finite: what a probability of 0 is multiplied with (NaN where both are 0)."""
    return tl.minimum(tl.maximum(b_d, -BIG), BIG)


@triton.jit
def times_ratio(b_p, b_d):
    """P · d with 0 · (±inf) = 0 and 0 · NaN = 0."""
    return tl.where(b_p > 0, b_p * b_d, 0.0)


@triton.jit
def sign_of(b_d, b_p):
    """P · sign(d), 0 where d is 0 or NaN."""
    return tl.where(b_d > 0, b_p, tl.where(b_d < 0, -b_p, 0.0))


@triton.jit
def mixture(b_p, b_q, b_d, b_difference, weight):
    """For m = weight·Q + (1 − weight)·P: log2 of m over the larger of P and Q, and m itself."""
    b_larger = tl.maximum(b_p, b_q)
    b_shrinkage = tl.abs(b_difference) / tl.maximum(b_larger, TINY)
    b_loss = tl.where(b_d > 0, weight, 1.0 - weight) * b_shrinkage
    return log2_of_one_minus(b_loss), b_larger * (1.0 - b_loss)


@triton.jit
def probabilities(b_x, b_y, x_offset, y_offset, scale, half_slope):
    """√P, √Q and ½ log2(p·S_x) of logits x and y; P and Q themselves would cost no less."""
    b_zx = tl.fma(b_x, half_slope, -0.5 * x_offset)
    b_zy = tl.fma(b_y, half_slope, -0.5 * y_offset)
    return tl.exp2(b_zx) * scale, tl.exp2(b_zy), b_zx


@triton.jit
def skew_partials(b_p, b_q, b_d, b_difference, skew):
    """Term of KL(Q‖m), m = skew·Q + (1 − skew)·P, and its partials with respect to log P and log Q (see the caller)."""
    b_log_m, b_m = mixture(b_p, b_q, b_d, b_difference, skew)
    b_inside = b_q * (tl.maximum(b_d, 0.0) + b_log_m) * LN2
    b_over_m = (1.0 - skew) * b_difference / tl.maximum(b_m, TINY)
    return (1.0 - skew) * b_difference - b_inside, (1.0 - skew) * b_p * b_over_m, skew * b_q * b_over_m - b_inside
