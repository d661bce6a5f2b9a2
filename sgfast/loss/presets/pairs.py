"""Losses between the Gram matrices of two layers, ``f([S_0, S_1], [T_0, T_1], mask=None)``, as TextBrewer has them.

The computation is in float32 (float64 if a tensor is). No Gram matrix ever exists whole (`sgfast.loss.presets.gram`).
"""

from collections.abc import Sequence

from torch import Tensor

from sgfast.loss.presets.checks import check_mask, mask_weights, over
from sgfast.loss.presets.gram import gram_distance
from sgfast.ops import rows, validation


def fsp_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of feature Gram matrices: mean over B, D, D' of (S_0ᵀS_1 − T_0ᵀT_1)² / l².

    Without a mask l is L. A mask multiplies both layers, and l is then Σ m of the sample. A sample of nothing but
    masked positions gives 0 (TextBrewer gives NaN for the whole batch). The loss is a variant of Yim et al. 2017.

    Args:
        state_S: two layers, (B, L, D) and (B, L, D').
        state_T: two layers of the same shapes. Gradients reach both sides.
        mask: (B, L), 1 = a real token.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: not two layers, or ranks or sizes that do not fit.
    """
    layers = _check("fsp", state_S, state_T, mask)
    for name, student, teacher in (("0", *layers[::2]), ("1", *layers[1::2])):
        validation.check_pair(f"state_S[{name}]", student, f"state_T[{name}]", teacher, beside=layers[0])
    first = layers[0]
    if mask is None:
        weights = first.new_full(first.shape[:2], 1 / max(first.shape[1], 1), dtype=rows.compute_dtype(*layers))
    else:
        weights = mask_weights(mask, *layers)
        weights = over(weights.square(), weights.sum(1, keepdim=True))
    entries = max(first.shape[0], 1) * first.shape[2] * layers[1].shape[2]
    return gram_distance(*layers, weights, "features").sum() / entries


def mmd_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Squared difference of the positions' Gram matrices, G = S_0 S_1ᵀ / D_S − T_0 T_1ᵀ / D_T.

    Without a mask the loss is the mean of G². With a mask it is Σ m_i m_j G_ij² / Σ_b (Σ_i m_i)². (The release on PyPI
    divides masked Gram matrices by L instead of D. TextBrewer's author has called this a mistake.) The loss is a
    variant of Huang and Wang 2017.

    Args:
        state_S: two layers (B, L, D_S).
        state_T: two layers (B, L, D_T). Gradients reach both sides.
        mask: (B, L), 1 = a real token.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: not two layers, or ranks or sizes that do not fit.
    """
    layers = _check("nst", state_S, state_T, mask)
    for name, pair in (("state_S", layers[:2]), ("state_T", layers[2:])):
        validation.check_pair(f"{name}[0]", pair[0], f"{name}[1]", pair[1])
    weights = layers[0].new_ones(layers[0].shape[:2], dtype=rows.compute_dtype(*layers))
    if mask is not None:
        weights = mask_weights(mask, *layers)
    return over(gram_distance(*layers, weights, "positions").sum(), weights.sum(1).square().sum())


def _check(
    loss: str, state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for name, states in (("state_S", state_S), ("state_T", state_T)):
        validation.check_tensors(**{name: states})
        if isinstance(states, Tensor) or len(states) != 2:
            got = f"a tensor of shape {tuple(states.shape)}" if isinstance(states, Tensor) else f"{len(states)} layers"
            raise ValueError(f"{loss} needs {name} as a list of two layers; got {got}")
        for index, state in enumerate(states):
            validation.check_floating(f"{name}[{index}]", state, None if state is state_S[0] else state_S[0])
            if state.dim() != 3 or state.shape[:2] != state_S[0].shape[:2] or 0 in state.shape[2:]:
                raise ValueError(
                    f"{loss} needs every layer of shape (B, L, D) with one B and L; "
                    f"{name}[{index}] has {tuple(state.shape)}, state_S[0] {tuple(state_S[0].shape)}"
                )
            validation.check_device(f"{name}[{index}]", state, "state_S[0]", state_S[0])
    check_mask(mask, state_S[0].shape[:2], "state_S", state_S[0])
    return state_S[0], state_S[1], state_T[0], state_T[1]
