"""The table of the kinds of divergence, as the PyTorch implementation reads it.

`terms` has the formulas in forms that keep their digits. `definitions` has the formulas as papers write them. The
kernels have a table of their own, ``sgfast_kernels.divergence.kinds``. docs/architecture.md says how a kind is added.
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
    #: Two flags, for the partial derivatives with respect to log p and to log q: infinite where one of the two
    #: probabilities alone is 0.
    infinite_partials: tuple[bool, bool] = (False, False)
    #: The terms read log p, not only log p − log q.
    reads_log_p: bool = False
    #: The terms read 1 − e^(−|log p − log q| / 2).
    reads_half_gaps: bool = False
    #: The kind with the same values if the mixture has no part of the other side (``skew=0``).
    without_mixture: str | None = None


#: The kinds by name.
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

#: The cross-entropy of hard labels as a kind. It is always the last of the kinds.
LABEL_KIND = "label_cross_entropy"


def users_of(weight: str) -> tuple[str, ...]:
    """Return the names of the kinds whose mixture has this weight, ``beta`` or ``skew``."""
    return tuple(kind.name for kind in KIND_TABLE.values() if kind.weight == weight)
