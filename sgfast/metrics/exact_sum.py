r"""Exact sums of floating numbers: the order of addition changes nothing.

A sum is kept as an integer multiple of 2⁻¹⁰⁷⁴, the smallest positive float64, in base 2³²:

    Σ values = Σ_i digit_i · 2^(32 i − 1074)

Every finite float64 is such a multiple, and integers add without rounding. The sum of any float64 numbers is therefore
exact, however they are ordered and split into parts. The sum is rounded once, when it is read. Infinities and NaN are
counted separately. The representation is a last dimension of ``WIDTH`` int64 numbers: two sums add by ``+``, and
processes add theirs by an all-reduce.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The smallest and the largest float64 are 2098 bits apart; the rest is room to carry.
_DIGITS = 67
_DIGIT_BITS = 32
_LOW = 2**_DIGIT_BITS - 1
_SMALLEST_EXPONENT = -1074
# The numbers of NaN, +inf and −inf stand after the digits.
WIDTH = _DIGITS + 3


def exact_sums(values: Tensor) -> Tensor:
    """Sum over the last dimension, without rounding: (..., n) floating → (..., WIDTH) int64, for n < 2³⁰."""
    bits = values.detach().to(torch.float64).contiguous().view(torch.int64)
    exponent, fraction = (bits >> 52) & 0x7FF, bits & (2**52 - 1)
    special = exponent == 0x7FF
    # A subnormal has no leading one, and it has the exponent of the smallest normal number.
    significand = torch.where(exponent > 0, fraction | 2**52, fraction)
    significand = torch.where(special, 0, torch.where(bits < 0, -significand, significand))
    position = (exponent - 1).clamp(min=0)
    digit, shift = position >> 5, position & (_DIGIT_BITS - 1)
    # The 53 bits are shifted in two halves that fit 64 bits each. >> of a negative number rounds down, as & needs.
    low, high = (significand & _LOW) << shift, (significand >> _DIGIT_BITS) << shift
    sums = bits.new_zeros((*values.shape[:-1], WIDTH))
    for offset, part in enumerate((low & _LOW, (low >> _DIGIT_BITS) + (high & _LOW), high >> _DIGIT_BITS)):
        sums.scatter_add_(-1, digit + offset, part)
    negative = bits < 0
    for kind, selected in enumerate((fraction != 0, (fraction == 0) & ~negative, (fraction == 0) & negative)):
        sums[..., _DIGITS + kind] = (special & selected).sum(-1)
    return carried(sums)


def carried(sums: Tensor) -> Tensor:
    """Return equal sums with digits below 2³³, so that 2³⁰ of them add without overflow."""
    digits = sums[..., :_DIGITS]
    carry = digits[..., :-1] >> _DIGIT_BITS
    sums = sums.clone()
    sums[..., : _DIGITS - 1] &= _LOW
    sums[..., 1:_DIGITS] += carry
    return sums


def settled(sums: Tensor) -> Tensor:
    """Return the form in which equal sums have equal bytes: every digit but the last below 2³²."""
    sums = sums.clone()
    for digit in range(_DIGITS - 1):
        sums[..., digit + 1] += sums[..., digit] >> _DIGIT_BITS
        sums[..., digit] &= _LOW
    return sums


def to_float64(sums: Tensor) -> Tensor:
    """Convert sums of non-negative values, (..., WIDTH) → (...), on their device: 2⁻⁵⁰ relative, reproducible."""
    digits = sums[..., :_DIGITS]
    terms = torch.where(digits == 0, 0.0, digits * _digit_weights(sums.device))
    # The terms are added by halving, because the order of ``sum`` depends on the shape.
    while (width := terms.shape[-1]) > 1:
        half = width // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        terms = folded if width % 2 == 0 else torch.cat([folded, terms[..., -1:]], dim=-1)
    infinite = torch.where(sums[..., _DIGITS + 1] > 0, math.inf, terms.squeeze(-1))
    return torch.where(sums[..., _DIGITS] > 0, math.nan, infinite)


def _digit_weights(device: torch.device) -> Tensor:
    """Return 2^(32 i − 1074) in float64, inf if too large. Made from bits, because a list would stop a GPU's queue."""
    position = _DIGIT_BITS * torch.arange(_DIGITS, device=device)
    exponent = (position - 51).clamp(max=0x7FF)
    # The first two are subnormal.
    return torch.where(exponent > 0, exponent << 52, 1 << position.clamp(max=51)).view(torch.float64)


def quotient(sums: Sequence[int], count: int) -> float:
    """Divide one sum, read to the host, by an integer: correctly rounded; NaN for a count of 0."""
    nans, positive, negative = sums[_DIGITS:]
    if count == 0 or nans or (positive and negative):
        return math.nan
    if positive or negative:
        return math.inf if positive else -math.inf
    numerator = sum(digit << (_DIGIT_BITS * i) for i, digit in enumerate(sums[:_DIGITS]))
    return numerator / (count << -_SMALLEST_EXPONENT)  # of Python's integers, which rounds once
