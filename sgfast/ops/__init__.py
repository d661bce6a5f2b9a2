"""The hot operations: a PyTorch implementation each, a Triton kernel beside it where one is written."""

from sgfast.ops.divergence import divergences
from sgfast.ops.gaussian import pairwise_gaussian_kl
from sgfast.ops.hidden import HiddenDistances, hidden_distances
from sgfast.ops.nearest import embedding_ranks, nearest_embeddings
from sgfast.ops.noise import apply_noise
from sgfast.ops.philox import standard_normal
from sgfast.ops.topk import top_k_support

__all__ = [
    "HiddenDistances",
    "apply_noise",
    "divergences",
    "embedding_ranks",
    "hidden_distances",
    "nearest_embeddings",
    "pairwise_gaussian_kl",
    "standard_normal",
    "top_k_support",
]
