"""Triton kernels of sgfast: device code and the functions that launch it.

This package imports torch, triton and itself, nothing of sgfast, so that it can be published alone. Each function takes
tensors of any rank, treats all dimensions but the last as rows, and returns per-row values; checks, dispatch and
autograd belong to the caller.
"""

from ._rows import row_layout
from .divergence.backward import divergence_backward
from .divergence.forward import divergence_forward
from .divergence.kinds import NAMES as KIND_NAMES
from .divergence.lse import lse_pair
from .divergence.topk_backward import divergence_topk_backward
from .divergence.topk_forward import divergence_topk_forward
from .divergence.topk_select import MAX_TOP_K, MAX_TOP_K_WIDTH, top_k_union
from .hidden import hidden_backward, hidden_forward
from .nearest import MAX_CANDIDATES, nearest_candidates, rank_candidates
from .noise.backward import noise_backward
from .noise.forward import noise_forward, standard_normal
from .noise.layout import noise_walk

__all__ = [
    "KIND_NAMES",
    "MAX_CANDIDATES",
    "MAX_TOP_K",
    "MAX_TOP_K_WIDTH",
    "divergence_backward",
    "divergence_forward",
    "divergence_topk_backward",
    "divergence_topk_forward",
    "hidden_backward",
    "hidden_forward",
    "lse_pair",
    "nearest_candidates",
    "noise_backward",
    "noise_forward",
    "noise_walk",
    "rank_candidates",
    "row_layout",
    "standard_normal",
    "top_k_union",
]
