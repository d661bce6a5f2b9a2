"""Device code of the noise stream: Philox4x32-10 and Box-Muller by polynomials, as ``sgfast.ops.noise`` defines them.

The words equal the stream's words, bit for bit. The normals take the same polynomials in the same order. A GPU
contracts a·b + c, divides within 2 ulp and takes roots within 1 ulp; the stated error of the stream allows for that.
"""

import triton
import triton.language as tl

MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
KEY_INCREMENT_0, KEY_INCREMENT_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
SIGN = tl.constexpr(0x80000000)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10 of four uint32 counter words under the key of an int64 seed: four uint32 words."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # Both halves of a product come out of one 64-bit multiplication.
        product_0, product_1 = c0.to(tl.uint64) * MULTIPLIER_0, c2.to(tl.uint64) * MULTIPLIER_1
        c0, c1 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0, product_1.to(tl.uint32)
        c2, c3 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1, product_0.to(tl.uint32)
        k0 = tl.add(k0, KEY_INCREMENT_0, sanitize_overflow=False)
        k1 = tl.add(k1, KEY_INCREMENT_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def words(counter, seed):
    """The four words of int64 counters."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return philox(low, high, zero, zero, seed)


@triton.jit
def radius(word):
    """√(−2 ln((word + 1)/2³²)) of uint32 words."""
    # The largest word + 1 does not fit into 32 bits. The largest word itself rounds to the same 2³².
    rounded = (tl.minimum(word, 0xFFFFFFFE) + 1).to(tl.float32)
    bits = rounded.to(tl.int32, bitcast=True)
    # ``step`` is the exponent e in units of 2²³; the bits without it are 2³²·(1 + s).
    step = (bits - 0x4F3504F3) & -0x800000
    scaled = (bits - step).to(tl.float32, bitcast=True)
    below_one = (word ^ 0xFFFFFFFF).to(tl.float32) * -2.3283064365386963e-10
    s = tl.where(step == 0, below_one, scaled * 2.3283064365386963e-10 - 1.0)
    q = s / (s + 2.0)
    z = q * q
    tail = ((z * -0.59743456 - 0.79955084) * z - 1.33333552) * z
    e = step.to(tl.float32)
    return tl.sqrt(e * (-1.38629150390625 / 8388608) + (e * (-2.8572136406e-06 / 8388608) + (tail - 4.0) * q))


@triton.jit
def cosine_and_sine(word):
    """Cos and sin of 2π·word/2³² of uint32 words."""
    # The word without its two upper bits, the next bit as sign, is the distance to the nearest quarter turn.
    t = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    z = t * t
    sine = (((z * -3.58772584e-05 + 0.00248987197) * z - 0.0807453673) * z - 0.2146018475) * t + t
    cosine = (((z * 3.53133465e-06 - 0.000325942008) * z + 0.0158543278) * z - 0.308425136) * z + 1.0
    # The two upper bits of ``quarter`` are the number of that quarter turn, modulo 4.
    quarter = tl.add(word, 0x20000000, sanitize_overflow=False)
    odd = (quarter & 0x40000000) != 0
    # Quarters 1 and 2 have a negative cosine, 2 and 3 a negative sine.
    cosine_sign = tl.add(quarter, 0x40000000, sanitize_overflow=False) & SIGN
    return _signed(tl.where(odd, sine, cosine), cosine_sign), _signed(tl.where(odd, cosine, sine), quarter & SIGN)


@triton.jit
def _signed(value, sign):
    return (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def grouped_normals(counter, seed, BN: tl.constexpr, BD: tl.constexpr):
    """The four draws of each int64 counter, side by side: [BN, BD // 4] → [BN, BD]."""
    w0, w1, w2, w3 = words(counter, seed)
    radius_0, radius_1 = radius(w0), radius(w2)
    cosine_0, sine_0 = cosine_and_sine(w1)
    cosine_1, sine_1 = cosine_and_sine(w3)
    first = tl.join(radius_0 * cosine_0, radius_1 * cosine_1)
    second = tl.join(radius_0 * sine_0, radius_1 * sine_1)
    return tl.reshape(tl.join(first, second), [BN, BD])


@triton.jit
def single_normals(index, offset, seed):
    """The draws of any int64 element numbers. Each draw makes a Philox call of its own."""
    w0, w1, w2, w3 = words((index >> 2) + offset, seed)
    second_pair = (index & 2) != 0
    cosine, sine = cosine_and_sine(tl.where(second_pair, w3, w1))
    return radius(tl.where(second_pair, w2, w0)) * tl.where((index & 1) != 0, sine, cosine)
