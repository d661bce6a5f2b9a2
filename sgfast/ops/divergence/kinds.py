"""The kinds of divergence: what the PyTorch implementation knows of each, besides its formulas.

The formulas are in `terms`, in forms that keep their digits, and in `definitions`, as they are written. The kernels
have a table of their own, ``sgfast_kernels.divergence.kinds``. docs/architecture.md says how a kind is added.
"""

from typing import Literal, NamedTuple


class Kind(NamedTuple):
    """One kind of divergence between p (noisy) and q (clean)."""

    name: str
    #: The argument that sets the weights of the mixture m, where the kind has a mixture.
    weight: Literal["beta", "skew"] | None = None
    #: The factor that turns a row's sum of `terms` into the value.
    factor: float = 1.0
    #: A sum over a part of the atoms may be negative.
    signed: bool = False
    #: The partial derivative towards log p, and that towards log q, is infinite where one probability alone is 0.
    infinite_partials: tuple[bool, bool] = (False, False)
    #: The terms read log p, not only log p − log q.
    reads_log_p: bool = False
    #: The terms read 1 − e^(−|log p − log q| / 2).
    reads_half_gaps: bool = False
    #: The kind that this one is where its mixture has no part of the other side (``skew=0``).
    without_mixture: str | None = None


#: What is known of each kind, by name.
KIND_TABLE = {
    kind.name: kind
    for kind in (
        Kind("forward_kl", signed=True, infinite_partials=(False, True)),
        Kind("reverse_kl", signed=True, infinite_partials=(True, False)),
        Kind("jeffreys", factor=-1.0, infinite_partials=(True, True)),
        Kind("jensen_shannon", weight="beta", factor=-1.0),
        Kind("total_variation", factor=-0.5),
        Kind("squared_hellinger", factor=0.5, reads_half_gaps=True),
        Kind("cross_entropy", infinite_partials=(False, True), reads_log_p=True),
        Kind("skew_forward_kl", weight="skew", signed=True, without_mixture="forward_kl"),
        Kind("skew_reverse_kl", weight="skew", signed=True, without_mixture="reverse_kl"),
    )
}

#: The kinds' names.
KINDS = tuple(KIND_TABLE)

#: The name under which the cross-entropy of hard labels travels among the kinds, always the last.
LABEL_KIND = "label_cross_entropy"


def users_of(weight: str) -> tuple[str, ...]:
    """Names of the kinds whose mixture has this weight, ``beta`` or ``skew``."""
    return tuple(kind.name for kind in KIND_TABLE.values() if kind.weight == weight)
