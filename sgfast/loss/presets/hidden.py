"""Losses between hidden states, ``f(state_S, state_T, mask=None)``, as TextBrewer defines them.

The computation is in float32 (float64 if a side is), from one fused read of both sides (`sgfast.ops.hidden_distances`).
Backward needs a few scalars per position. An empty selection gives 0, and masked positions are not read.
"""

import torch
from torch import Tensor

from sgfast.loss.presets.checks import check_mask, mask_weights, masked_mean, mean, over
from sgfast.loss.presets.score_rows import score_rows
from sgfast.ops import hidden_distances, validation

# torch.nn.functional.cosine_embedding_loss adds this to the squared norms.
_COSINE_EPSILON = 1e-12


def hid_mse_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error between hidden states: Σ m (s − t)² / (D Σ m), the plain mean without a mask.

    Args:
        state_S: (B, L, D).
        state_T: of the same shape (project the student where widths differ). Gradients reach both sides.
        mask: (B, L), 1 = a real token.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: ranks or sizes that do not fit (TextBrewer broadcasts some of them).

    Example:
        >>> import torch
        >>> hid_mse_loss(torch.tensor([[[1.0, 3.0], [9.0, 9.0]]]), torch.zeros(1, 2, 2), torch.tensor([[1, 0]]))
        tensor(5.)
    """
    _check(state_S, state_T, mask)
    width = state_S.shape[-1]
    if mask is None:
        return mean(hidden_distances(state_S, state_T).l2.square()) / width
    weights = mask_weights(mask, state_S, state_T)
    squares = hidden_distances(state_S, state_T, mask).l2.square()
    return over((squares * weights).sum(), weights.sum() * width)


def cos_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over positions of 1 − s·t / √((|s|² + 1e-12)(|t|² + 1e-12)), the loss of DistilBERT.

    A zero vector gives 1; its gradient is 0 (TextBrewer's is 10⁶ times the other side's direction).

    Args:
        state_S: (B, L, D).
        state_T: of the same shape (project the student where widths differ). Gradients reach both sides.
        mask: (B, L), 1 = a real token.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: ranks or sizes that do not fit (TextBrewer broadcasts some of them).

    Example:
        >>> import torch
        >>> cos_loss(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, -3.0]]]))
        tensor(1.)
    """
    _check(state_S, state_T, mask)
    distances = hidden_distances(state_S, state_T, mask)
    # cos times |s|/√(|s|² + 1e-12) and the same for t: the product is e^−excess.
    excess = _epsilon_excess(state_S, mask) + _epsilon_excess(state_T, mask)
    values = distances.cosine_distance - distances.cosine_similarity * torch.expm1(-excess)
    return masked_mean(values, mask)


def _epsilon_excess(state: Tensor, mask: Tensor | None) -> Tensor:
    """Return ½ log(1 + 1e-12/|x|²) of every row."""
    origin = state.new_zeros(state.shape[-1]).expand(state.shape)
    square = score_rows(state, origin, "squared_error", mask=None if mask is None else mask != 0)
    zero = square == 0  # the similarity is 0 there, and has no gradient
    return torch.where(zero, 0, torch.log1p(_COSINE_EPSILON / torch.where(zero, 1, square)) / 2)


def pkd_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch of |s/|s| − t/|t||² at the first position, the loss of BERT-PKD.

    A zero vector gives 2 and gradient 0 (TextBrewer gives NaN).

    Args:
        state_S: (B, D), or (B, L, D), where only [:, 0] is read.
        state_T: (B, L, D) or (B, D) with the same B and D. Gradients reach both sides.
        mask: not used.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: ranks or sizes that do not fit.
    """
    validation.check_tensors(mask=mask)
    first = []
    for name, state in (("state_S", state_S), ("state_T", state_T)):
        validation.check_floating(name, state, None if name == "state_S" else state_S)
        if state.dim() not in (2, 3) or (state.dim() == 3 and state.shape[1] == 0):
            raise ValueError(f"pkd needs {name} of shape (B, L, D) or (B, D); got {tuple(state.shape)}")
        first.append(state.select(1, 0) if state.dim() == 3 else state)
    validation.check_pair("state_S", first[0], "state_T", first[1])
    return mean(hidden_distances(first[0], first[1]).cosine_distance) * 2


def _check(state_S: Tensor, state_T: Tensor, mask: Tensor | None) -> None:
    validation.check_pair("state_S", state_S, "state_T", state_T)
    check_mask(mask, state_S.shape[:-1], "state_S", state_S)
