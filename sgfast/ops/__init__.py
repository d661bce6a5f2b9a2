"""The hot operations. Each has a PyTorch implementation, and some have a Triton kernel.

Masks, here and in all of ``sgfast``, are bool or numbers equal to 0 or 1. Another number is a ValueError on a CPU. On a
GPU and in compiled graphs every number but 0 selects: a look at the values would stop the GPU's queue.
"""

from sgfast.ops.divergence import divergences
from sgfast.ops.gaussian import pairwise_gaussian_kl
from sgfast.ops.hidden import HiddenDistances, hidden_distances
from sgfast.ops.nearest import embedding_ranks, nearest_embeddings
from sgfast.ops.noise import apply_noise, standard_normal
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
