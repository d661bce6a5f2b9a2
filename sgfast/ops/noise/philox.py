r"""The counter-based stream of normal draws: Philox4x32-10 and Box-Muller, in arithmetic that any device repeats.

Draw i belongs to counter c = i // 4 + offset, modulo 2⁶⁴. Philox turns the counter words (low c, high c, 0, 0) and the
key (low seed, high seed) into four words of 32 bits by ten rounds of

    (c0, c1, c2, c3) ← (hi(M1·c2) ⊕ c1 ⊕ k0,  lo(M1·c2),  hi(M0·c0) ⊕ c3 ⊕ k1,  lo(M0·c0)),  then  k ← k + W

(J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel random numbers: as easy as 1, 2, 3, SC 2011). Box-Muller
turns the word pairs (w0, w1) and (w2, w3) into two draws each, elements (4c, 4c+1) and (4c+2, 4c+3):

    √(−2 ln((w+1)/2³²)) · (cos φ, sin φ),   w the first word of the pair,   φ = 2π/2³² · the second

The words are exact everywhere. The normals use only float32 +, −, ·, /, √ and integer operations, with polynomials
of our own for ln, sin and cos, so that no device's mathematical library enters; each draw lies within
``NORMAL_ERROR`` of the formula's value. The largest possible draw is √(64 ln 2) = 6.66.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sgfast.ops import dispatch, validation

# Largest |draw − exact value|. With correctly rounded division and root the error is at most 1.2e-6: radius · 9e-8 from
# `cosine_and_sine`, 5e-7 · |cos| from `radius`, and the rounding of the product. A GPU's division and root are off by 2
# and 1 units in the last place, which makes the rest. The error exceeds 1.2e-6 only where the radius is above 3.6.
NORMAL_ERROR = 2.1e-6

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# After these rounds most words depend on the first counter word. The number of the other rounds is even.
_SPREAD = 2


def round_keys(seed: Tensor) -> Tensor:
    """Return the key words of every round, (10, 2) int64, for a 0-dimensional int64 seed (read modulo 2⁶⁴)."""
    words = torch.stack([seed & _WORD, seed >> 32 & _WORD])
    # Built from the device's own arange: a list of Python numbers would be copied there and stop a GPU's queue.
    rounds = torch.arange(_ROUNDS, device=seed.device)
    return words + torch.stack([rounds * increment for increment in _KEY_INCREMENTS], dim=-1) & _WORD


def philox(counter: Sequence[Tensor], keys: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 of four counter words (int64 tensors that hold 32 bits, (n,) or broadcast) under ``round_keys``.

    Returns words 0 and 2, and words 1 and 3, (2, n) each: the first and the second words of Box-Muller's pairs.
    """
    c0, c1, c2, c3 = counter
    # A product of two 32-bit words needs all 64 bits. As int64 it wraps to the same bits, so shift and mask recover
    # both halves. Only the words that are multiplied next need the mask.
    for k0, k1 in (key.unbind() for key in keys[:_SPREAD].unbind()):
        # A word that all counters share stays one number until it is mixed with other words.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> 32 ^ c1 ^ k0) & _WORD, (product0 >> 32 ^ c3 ^ k1) & _WORD
        c1, c3 = product1, product0
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)  # type: ignore[no-untyped-call]
    multiplied, others = torch.stack([c0, c2]), torch.stack([c1, c3])
    # A CPU fetches new memory more slowly than it computes: three buffers take turns.
    products = torch.empty_like(multiplied)
    second = torch.arange(2, device=keys.device)[:, None]
    multipliers = second * (_MULTIPLIERS[1] - _MULTIPLIERS[0]) + _MULTIPLIERS[0]
    # The two words exchange places in every round. Their multipliers and keys exchange places too.
    for i, key in enumerate(keys[_SPREAD:].unbind()):
        torch.mul(multiplied, multipliers if i % 2 == 0 else multipliers.flip(0), out=products)
        torch.bitwise_right_shift(products, 32, out=multiplied)
        multiplied[0].bitwise_xor_(others[1])
        multiplied[1].bitwise_xor_(others[0])
        multiplied.bitwise_xor_((key.flip(0) if i % 2 == 0 else key)[:, None]).bitwise_and_(_WORD)
        others, products = products, others
    return multiplied, others.bitwise_and_(_WORD)


def normals(first: int, counters: int, keys: Tensor) -> Tensor:
    """Return the draws of counters ``first``, ``first + 1``, ...: (4 · counters,) float32.

    The counters' upper 32 bits must be the same.
    """
    # int64 addition wraps, as the 64-bit counter does.
    counter = torch.arange(counters, device=keys.device) + first
    zero = torch.zeros_like(keys[0, 0])
    firsts, seconds = philox((counter & _WORD, counter[:1] >> 32 & _WORD, zero, zero), keys)
    length = radius(firsts)
    values = length.new_empty((counters, 2, 2))
    for factor, part in zip(cosine_and_sine(seconds), values.unbind(-1), strict=True):
        part.copy_((length * factor).T)
    return values.flatten()


def draws(keys: Tensor, offset: int, start: int, count: int, implementation: str) -> Tensor:
    """Elements start, …, start + count − 1 of the stream: (count,) float32."""
    body = dispatch.implementation_of(normals, implementation)
    first, skipped = start // 4 + offset, start % 4
    counters = (skipped + count + 3) // 4
    # Up to the next multiple of 2³², where the upper half of the counter changes.
    here = min(counters, 2**32 - first % 2**32)
    # Beyond 2⁶³ the argument keeps the counter's bits, as the int64 addition inside does.
    values = body(as_int64(first % 2**64), here, keys)
    if here < counters:
        values = torch.cat([values, body(as_int64((first + here) % 2**64), counters - here, keys)])
    return values[skipped : skipped + count]


def as_int64(value: int) -> int:
    """The int64 with the bits of an integer in [0, 2⁶⁴)."""
    return value - 2**64 if value >= 2**63 else value


def seed_tensor(seed: int | Tensor, device: torch.device | str | None) -> Tensor:
    """Check a seed and return it as a 0-dimensional int64 tensor on the device."""
    if isinstance(seed, Tensor):
        validation.check_tensor("seed", seed, beside=None if device is None else seed)
        if seed.dtype != torch.int64:
            raise TypeError(f"a seed tensor must be int64; got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"a seed tensor must have one element; got shape {tuple(seed.shape)}")
        if device is not None and seed.device != torch.empty(0, device=device).device:
            raise ValueError(f"the seed tensor must be on {device}; got {seed.device}")
        return seed.reshape(())
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor; got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64); got {seed}")
    return torch.full((), as_int64(seed), dtype=torch.int64, device=device)


def check_offset(offset: int) -> None:
    """Check for an int that a 64-bit counter can start from."""
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset must be an int; got {type(offset).__name__}")
    if not 0 <= offset < 2**63:
        raise ValueError(f"offset must lie in [0, 2**63); got {offset}")


def radius(word: Tensor) -> Tensor:
    """√(−2 ln((word + 1)/2³²)) in float32, for int64 words of 32 bits; absolute error below 5e-7, 0 at the last word.

    With (word + 1)/2³² = 2ᵉ·(1 + s) and 1 + s in [√½, √2), ln = e·ln 2 + 2 atanh(q) and q = s/(2 + s). Where e = 0
    the result is small and s must keep its digits: it is −(2³² − 1 − word)/2³², rounded only once, from integers.
    """
    # float64 holds the sum, which is rounded once.
    rounded = word.to(torch.float64).add_(1).to(torch.float32)
    bits = rounded.view(torch.int32)
    # 0x4F3504F3 is √½·2³²: the subtraction moves the exponent's steps from the powers of 2 to √½ times them. The step
    # is e in units of 2²³; what is left of the bits is 2³²·(1 + s).
    step = (bits - 0x4F3504F3).bitwise_and_(-(2**23))
    scaled = (bits - step).view(torch.float32)
    # If e = 0, the upper bit of this is not set. As int32 this is 2³² − 1 − word.
    below_one = word.to(torch.int32).bitwise_not_().to(torch.float32).mul_(-(2.0**-32))
    s = _select(step >> 31, scaled.mul_(2.0**-32).sub_(1), below_one)
    q = s / (s + 2)
    # −4 atanh(q)/q + 4, minimax for the relative error of ln(1 + s): 1.6e-9.
    z = q * q
    tail = (z * -0.59743456).sub_(0.79955084).mul_(z).sub_(1.33333552).mul_(z)
    e = step.to(torch.float32)
    # −2 ln 2 in two parts, the first of 16 bits: its product with e is exact.
    low = tail.sub_(4).mul_(q).add_(e * (-2.8572136406e-06 / 2**23))
    return e.mul_(-1.38629150390625 / 2**23).add_(low).sqrt_()


def cosine_and_sine(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin of 2π·word/2³² in float32, for int64 words of 32 bits; absolute error below 9e-8.

    The nearest quarter turn is taken off in integers, exactly; the rest is t eighths of a turn, t in [−1, 1].
    """
    low = word.to(torch.int32)
    # The word without its two upper bits, read with the next bit as sign, is the distance to the nearest quarter turn.
    t = (low << 2).to(torch.float32).mul_(2.0**-31)
    z = t * t
    # Polynomials for sin(πt/4)/t − 1 and (cos(πt/4) − 1)/t², minimax for the absolute error of sine and cosine: 1.2e-9
    # and 6e-11. The polynomials only correct t and 1, so their own rounding is small.
    sine = (z * -3.58772584e-05).add_(0.00248987197).mul_(z).sub_(0.0807453673).mul_(z).sub_(0.2146018475)
    sine = sine.mul_(t).add_(t)
    cosine = (z * 3.53133465e-06).sub_(0.000325942008).mul_(z).add_(0.0158543278).mul_(z).sub_(0.308425136)
    cosine = cosine.mul_(z).add_(1)
    # The upper bits of this sum are the number of the nearest quarter turn, modulo 4.
    quarter = low.add_(2**29)
    cosine_bits, sine_bits = cosine.view(torch.int32), sine.view(torch.int32)
    # In odd quarters sine and cosine change places.
    exchange = (cosine_bits ^ sine_bits).bitwise_and_((quarter << 1).bitwise_right_shift_(31))
    # Quarters 1 and 2 have a negative cosine, 2 and 3 a negative sine.
    cosine_bits = cosine_bits.bitwise_xor_(exchange).bitwise_xor_((quarter + 2**30).bitwise_and_(-(2**31)))
    sine_bits = sine_bits.bitwise_xor_(exchange).bitwise_xor_(quarter.bitwise_and_(-(2**31)))
    return cosine_bits.view(torch.float32), sine_bits.view(torch.float32)


def _select(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """``chosen`` where the int32 mask is −1, ``other`` where it is 0: faster on a CPU than torch.where."""
    other_bits = other.view(torch.int32)
    return (chosen.view(torch.int32) ^ other_bits).bitwise_and_(mask).bitwise_xor_(other_bits).view(torch.float32)


# Elements handled at once by each of a CPU's threads, among which PyTorch shares operations on more than 2¹⁵ numbers:
# words and temporaries, below 4 MiB a thread, stay in the last cache and the allocator's pool.
CHUNK_ELEMENTS = 2**17
_SHARING_THREADS = 8


def chunk_elements() -> int:
    """Elements to handle at once; no result depends on it."""
    return CHUNK_ELEMENTS * min(torch.get_num_threads(), _SHARING_THREADS)
