"""What one call of `divergences` is asked, checked at the door: the arguments of its operators."""

from typing import NamedTuple

from torch import Tensor


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
    support: str
    beta: float
    skew: float
    max_chunk_bytes: int
    impl: str | None
    noisy_wanted: bool
    clean_wanted: bool

    @property
    def has_support(self) -> bool:
        """Whether the sums are restricted."""
        return self.top_k > 0 or self.support_mask is not None
