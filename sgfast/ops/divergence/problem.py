"""The arguments of one call of `divergences`, checked: what the registered operator takes."""

from typing import NamedTuple

from torch import Tensor

from sgfast.ops.divergence.kinds import LABEL_KIND
from sgfast.ops.topk.selection import support_width


class Problem(NamedTuple):
    """The arguments of the operator ``sgfast::divergences``; backward's has them too."""

    noisy: Tensor
    clean: Tensor
    labels: Tensor | None
    support_mask: Tensor | None
    mask: Tensor | None
    temperature: Tensor  # of the row shape
    clean_temperature: Tensor | None  # likewise, where the clean side has its own
    kinds: str  # joined by commas; that of hard labels is the last
    top_k: int  # 0: no top-k support
    top_k_of: str
    support: str
    beta: float
    skew: float
    label_smoothing: float
    max_chunk_bytes: int
    impl: str | None
    noisy_wanted: bool
    clean_wanted: bool

    @property
    def has_support(self) -> bool:
        """The sums are restricted to a part of the vocabulary."""
        return self.top_k > 0 or self.support_mask is not None

    @property
    def support_width(self) -> int:
        """Number of a top-k support's indices, padding included."""
        return support_width(self.top_k, self.top_k_of, self.noisy.shape[-1])

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The kinds, that of hard labels the last."""
        return tuple(self.kinds.split(","))

    @property
    def row_scalars_shape(self) -> tuple[int, ...]:
        """Shape of the scalars that forward keeps for backward."""
        return (row_scalar_count(self.kind_names, self.top_k), *self.noisy.shape[:-1])


def row_scalar_count(kinds: tuple[str, ...], top_k: int) -> int:
    """Count the scalars that a row keeps for backward.

    Each side has a maximum and a sum, with a top-k support those of its tail too. Each kind has two sums of partials.
    Hard labels beside a top-k support keep the scalars of the whole vocabulary besides.
    """
    if top_k and LABEL_KIND in kinds:
        return row_scalar_count(kinds[:-1], top_k) + row_scalar_count((LABEL_KIND,), 0)
    return (8 if top_k else 4) + 2 * len(kinds)
