"""The kinds of divergence as bits, and where each stands among those asked for."""

from collections.abc import Sequence

import triton.language as tl

# In the order of their bits in a kernel's ``KINDS``.
KINDS = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "total_variation",
    "squared_hellinger",
    "cross_entropy",
    "skew_forward_kl",
    "skew_reverse_kl",
    "label_cross_entropy",
)
# What compares two sides: all but the last.
DIVERGENCES = KINDS[:-1]
FORWARD_KL, REVERSE_KL, JEFFREYS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
JENSEN_SHANNON, TOTAL_VARIATION, HELLINGER = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
CROSS_ENTROPY, SKEW_FORWARD, SKEW_REVERSE = tl.constexpr(64), tl.constexpr(128), tl.constexpr(256)
LABEL_CROSS_ENTROPY = tl.constexpr(512)


def kind_bits(kinds: Sequence[str]) -> int:
    """Return the kinds as the bits of a kernel's ``KINDS``."""
    return sum(1 << KINDS.index(kind) for kind in kinds)


def positions(kinds: Sequence[str], among: Sequence[str] = KINDS) -> list[int]:
    """Where each of ``among`` stands in ``kinds``; 0 for those not asked for."""
    return [kinds.index(kind) if kind in kinds else 0 for kind in among]
