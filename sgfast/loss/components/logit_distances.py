"""Distances between two sets of logits, from hidden states where both sides share a frozen head.

For logits W h + b, let R be a square root of the Gram matrix: R' R = [W b]' [W b]. Then W h + b and R [h; 1] have the
same norms and inner products, so the distances of logits (V) are the distances of vectors of D + 1 numbers. R is made
once for a head, in float64.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sgfast.ops.hidden import HiddenDistances, hidden_distances
from sgfast.sides import LinearLogits

# Rows of the head that are converted to float64 at a time.
_ROWS = 4096
# Head → (version of its values, the bias, R).
_roots: MutableMapping[Tensor, tuple[int, Tensor | None, Tensor]] = WeakTensorKeyDictionary()


def logit_distances(noisy: Tensor | LinearLogits, clean: Tensor | LinearLogits, counted: Tensor) -> HiddenDistances:
    """Return `sgfast.ops.hidden_distances` of two sides' logits at the counted positions."""
    if isinstance(noisy, LinearLogits) and isinstance(clean, LinearLogits) and _share_a_frozen_head(noisy, clean):
        root = _root_of(noisy)
        distances = hidden_distances(_in_root(noisy, root), _in_root(clean, root), counted)
        wide = torch.promote_types(noisy.hidden.dtype, torch.float32)
        return HiddenDistances(*(part.to(wide) for part in distances))
    return hidden_distances(_logits_of(noisy), _logits_of(clean), counted)


def _share_a_frozen_head(noisy: LinearLogits, clean: LinearLogits) -> bool:
    trained = noisy.weight.requires_grad or (noisy.bias is not None and noisy.bias.requires_grad)
    same = noisy.weight is clean.weight and noisy.bias is clean.bias and noisy.scale == clean.scale
    return same and not trained and noisy.softcap is None and clean.softcap is None


def _logits_of(side: Tensor | LinearLogits) -> Tensor:
    if isinstance(side, Tensor):
        return side
    logits: Tensor = side.scale * torch.nn.functional.linear(side.hidden, side.weight.to(side.hidden.dtype), side.bias)
    return logits if side.softcap is None else side.softcap * torch.tanh(logits / side.softcap)


def _in_root(side: LinearLogits, root: Tensor) -> Tensor:
    # In float64 nearly equal sides keep their digits. Many GPUs are slow in float64, so there float32 must do.
    hidden = side.hidden.double() if side.hidden.device.type == "cpu" else side.hidden.float()
    root = side.scale * root.to(hidden.dtype)
    width = hidden.shape[-1]
    vectors = hidden @ root[:width]
    return vectors if len(root) == width else vectors + root[width]


@torch.no_grad()
def _root_of(side: LinearLogits) -> Tensor:
    """Return R' (D, D), or (D + 1, D + 1) with a bias, in float64."""
    weight, bias = side.weight, side.bias
    if weight in _roots:
        version, known_bias, known_root = _roots[weight]
        if version == weight._version and known_bias is bias:
            return known_root
    gram = torch.zeros((), dtype=torch.float64, device=weight.device)
    for first in range(0, len(weight), _ROWS):
        rows = weight[first : first + _ROWS].double()
        if bias is not None:
            rows = torch.cat([rows, bias[first : first + _ROWS, None].double()], dim=1)
        gram = gram + rows.T @ rows
    # The eigenvectors exist for every head; a triangular root needs a head of full rank.
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    _roots[weight] = (weight._version, bias, root)
    return root
