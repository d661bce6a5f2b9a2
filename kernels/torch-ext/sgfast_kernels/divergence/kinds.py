"""The table of the kinds of divergence, and of the sums over a row's logits that the kinds read.

A new kind needs a line in ``KINDS`` and an index below. It needs its value in ``finish``, its gradient in ``backward``,
and its terms over atoms in ``atoms``. A new sum needs a line in ``SUMS``, an index, and its terms in ``forward``.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import triton
import triton.language as tl


class Sum(NamedTuple):
    """A sum over the logits of a row. Its terms are in P = p·S and Q = q·S, with the clean side's S."""

    name: str
    #: The terms lack the row's factor ``rescale`` of P: never, or in all but the exact kernels ("fast").
    lacks_rescale: Literal["never", "fast"] = "never"
    #: The terms lack the row's ``correction`` of log P: never, always, or in all but the exact kernels.
    lacks_correction: Literal["never", "fast", "always"] = "never"
    #: The sum is infinite or NaN if a ratio P/Q is infinite. The row is then read again with guarded products.
    unbounded: bool = False


class Kind(NamedTuple):
    """A divergence. Its index in ``KINDS`` is its bit in a kernel's ``KINDS``."""

    name: str
    #: Names of the sums that its value is made of.
    sums: tuple[str, ...]
    #: The value may be negative under the support ``truncate``.
    signed: bool = False
    #: The kind with the same values if the mixture's weight ``skew`` is 0.
    unskewed: str = ""


SUMS = (
    Sum("p_ratio", "fast", "fast", unbounded=True),  # P · log(P/Q)
    Sum("q_ratio", "never", "fast", unbounded=True),  # Q · log(P/Q)
    Sum("p_mixture", "fast", "fast", unbounded=True),  # P · log(P/M)
    Sum("q_mixture", unbounded=True),  # Q · log(Q/M)
    Sum("apart"),  # |P − Q|
    Sum("apart_p", "fast"),  # P · sign(P − Q)
    Sum("roots"),  # (√P − √Q)²
    Sum("q_log_p", "never", "always", unbounded=True),  # Q · log P
    Sum("skew_forward"),  # the terms of the skew kinds, and their partials with respect to log P
    Sum("skew_forward_p"),
    Sum("skew_reverse"),
    Sum("skew_reverse_p"),
    Sum("difference"),  # P − Q, in the exact kernels
)

# The kinds that compare two sides come first.
KINDS = (
    Kind("forward_kl", ("q_ratio",), signed=True),
    Kind("reverse_kl", ("p_ratio",), signed=True),
    Kind("jeffreys", ("p_ratio", "q_ratio")),
    Kind("jensen_shannon", ("p_mixture", "q_mixture", "apart")),
    Kind("total_variation", ("apart", "apart_p")),
    Kind("squared_hellinger", ("roots",)),
    Kind("cross_entropy", ("q_log_p",)),
    Kind("skew_forward_kl", ("skew_forward", "skew_forward_p"), signed=True, unskewed="forward_kl"),
    Kind("skew_reverse_kl", ("skew_reverse", "skew_reverse_p"), signed=True, unskewed="reverse_kl"),
    Kind("label_cross_entropy", ()),
)
NAMES = tuple(kind.name for kind in KINDS)
LABELS = "label_cross_entropy"
DIVERGENCES = tuple(name for name in NAMES if name != LABELS)

# Bits of a kind's place among those asked for, in ``places_of``.
_PLACE_BITS = tl.constexpr(4)


def _kind_index(name: str) -> tl.constexpr:
    return tl.constexpr(NAMES.index(name))


def _sum_index(name: str) -> tl.constexpr:
    return tl.constexpr([each.name for each in SUMS].index(name))


# Kernels know the kinds and the sums by their indices.
FORWARD_KL = _kind_index("forward_kl")
REVERSE_KL = _kind_index("reverse_kl")
JEFFREYS = _kind_index("jeffreys")
JENSEN_SHANNON = _kind_index("jensen_shannon")
TOTAL_VARIATION = _kind_index("total_variation")
HELLINGER = _kind_index("squared_hellinger")
CROSS_ENTROPY = _kind_index("cross_entropy")
SKEW_FORWARD = _kind_index("skew_forward_kl")
SKEW_REVERSE = _kind_index("skew_reverse_kl")
LABEL_CROSS_ENTROPY = _kind_index(LABELS)
DIVERGENCE_COUNT = tl.constexpr(len(DIVERGENCES))

SUM_P_RATIO = _sum_index("p_ratio")
SUM_Q_RATIO = _sum_index("q_ratio")
SUM_P_MIXTURE = _sum_index("p_mixture")
SUM_Q_MIXTURE = _sum_index("q_mixture")
SUM_APART = _sum_index("apart")
SUM_APART_P = _sum_index("apart_p")
SUM_ROOTS = _sum_index("roots")
SUM_Q_LOG_P = _sum_index("q_log_p")
SUM_SKEW_FORWARD = _sum_index("skew_forward")
SUM_SKEW_FORWARD_P = _sum_index("skew_forward_p")
SUM_SKEW_REVERSE = _sum_index("skew_reverse")
SUM_SKEW_REVERSE_P = _sum_index("skew_reverse_p")
SUM_DIFFERENCE = _sum_index("difference")
SUM_COUNT = tl.constexpr(len(SUMS))

# The tables as Triton hashes them: a change of a line compiles the kernels again.
_KINDS, _SUMS = tl.constexpr(KINDS), tl.constexpr(SUMS)


def kind_bits(kinds: Sequence[str]) -> int:
    """Return the kinds as the bits of a kernel's ``KINDS``."""
    return sum(1 << NAMES.index(kind) for kind in kinds)


def places_of(kinds: Sequence[str]) -> int:
    """Return where each kind stands in ``kinds``, four bits for each kind of the table.

    The places are one integer, because Triton would compile a kernel again for every 0 and 1 in a tuple.
    """
    return sum(place << _PLACE_BITS.value * NAMES.index(kind) for place, kind in enumerate(kinds))


@triton.jit
def place_of(places, KIND: tl.constexpr):
    """The place of a kind among those asked for, int64."""
    return (places.to(tl.int64) >> _PLACE_BITS * KIND) & 15


@triton.constexpr_function
def asked(kinds, kind):
    """True if a kind is among the kinds of the bits."""
    return kinds >> kind & 1 == 1


@triton.constexpr_function
def acting_kind(kind, skewed):
    """The kind; or, if ``skewed`` is false (a mixture's weight is 0), the kind with the same values."""
    other = _KINDS.value[kind].unskewed
    if skewed or not other:
        return kind
    return [each.name for each in _KINDS.value].index(other)


@triton.constexpr_function
def any_divergence(kinds):
    """True if a kind of the bits compares two sides."""
    return kinds & ((1 << DIVERGENCE_COUNT.value) - 1) != 0


@triton.constexpr_function
def reads(kind, skewed, index):
    """True if a kind reads a sum."""
    return _SUMS.value[index].name in _KINDS.value[acting_kind(kind, skewed)].sums


@triton.constexpr_function
def needed(kinds, skewed, index):
    """True if a kind of the bits reads a sum."""
    return any(asked(kinds, i) and reads(i, skewed, index) for i in range(len(_KINDS.value)))


@triton.constexpr_function
def signed(kind):
    """True if the value of a kind may be negative under the support ``truncate``."""
    return _KINDS.value[kind].signed


@triton.constexpr_function
def unbounded(index):
    """True if a sum is infinite or NaN where a ratio is infinite."""
    return _SUMS.value[index].unbounded


@triton.constexpr_function
def lacks_rescale(index, exact):
    """True if the terms of a sum lack the row's factor ``rescale`` of P."""
    return _SUMS.value[index].lacks_rescale == "fast" and not exact


@triton.constexpr_function
def lacks_correction(index, exact):
    """True if the terms of a sum lack the row's ``correction`` of log P."""
    lacking = _SUMS.value[index].lacks_correction
    return lacking == "always" or (lacking == "fast" and not exact)
