"""What one call of `divergences` is asked, checked at the door: the arguments of its operators."""

from typing import NamedTuple

from torch import Tensor

from sgfast.ops import topk


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
        """Whether the sums are restricted."""
        return self.top_k > 0 or self.support_mask is not None

    @property
    def support_width(self) -> int:
        """How many indices a top-k support has, padding included."""
        return topk.support_width(self.top_k, self.top_k_of, self.noisy.shape[-1])
