"""The hot operations: a PyTorch implementation each, a Triton kernel beside it where one is written."""

from sgfast.ops.divergence import divergences
from sgfast.ops.hidden import HiddenDistances, hidden_distances
from sgfast.ops.topk import top_k_support

__all__ = ["HiddenDistances", "divergences", "hidden_distances", "top_k_support"]
