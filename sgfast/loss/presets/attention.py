"""Losses between attention matrices, ``f(attention_S, attention_T, mask=None)``, as TextBrewer defines them.

Notation: m is the inputs mask of shape (B, L), H the number of heads, i a query, j a key. A fractional mask weighs its
positions. The computation is in float32 (float64 if a side is), without a temporary of the matrices' size.

**Without a mask** TextBrewer guesses one: it takes scores ≤ −0.001 for BERT's −10000 and drops them. The guess is
harmless on probabilities and wrong on raw scores, half of which are negative. Give a mask with raw scores; a mask of
ones is enough.

The losses are finite in three cases in which TextBrewer gives NaN. A score of −inf on either side is not compared (with
a mask, and in the cross entropies also without one). A mask of nothing but zeros gives 0. Values at masked positions,
NaN too, have no effect.
"""

from torch import Tensor

from sgfast.loss.presets.checks import check_mask, mask_weights, mean, over
from sgfast.loss.presets.score_rows import score_rows
from sgfast.ops import rows, validation

_THRESHOLD = -1e-3


def att_mse_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error between attention matrices, every head with its own.

    With a mask Σ m_i m_j (S − T)² / (H Σ_b (Σ_i m_i)²); without one the mean of (S⁺ − T⁺)², where a⁺ is a for
    a > −0.001, else 0.

    Args:
        attention_S: (B, H, L, L); without a mask also (B, L, L).
        attention_T: of the same shape. Gradients reach both sides.
        mask: (B, L), 1 = a real token.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: ranks or sizes that do not fit (TextBrewer broadcasts some of them).
    """
    _check("attention_mse", attention_S, attention_T, mask, ranks=(4,) if mask is not None else (3, 4))
    if mask is None:
        return mean(_squares(attention_S, attention_T)) / attention_S.shape[-1]
    weights = mask_weights(mask, attention_S, attention_T)
    return over(_masked_squares(attention_S, attention_T, weights), _pairs(weights) * attention_S.shape[1])


def att_mse_sum_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error between attention matrices summed over heads; the sides may have different numbers of heads.

    With S and T the sums: with a mask Σ m_i m_j (S − T)² / Σ_b (Σ_i m_i)²; without one the mean of (S⁺ − T⁺)², where
    a⁺ is a for a > −0.001, else 0.

    Args:
        attention_S: (B, H, L, L), or (B, L, L).
        attention_T: of the same rank; only H may differ.
        mask: (B, L), 1 = a real token.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: ranks or sizes that do not fit (TextBrewer broadcasts some of them).
    """
    _check("attention_mse_sum", attention_S, attention_T, mask, heads_may_differ=True)
    dtype = rows.compute_dtype(attention_S, attention_T)
    if attention_S.dim() == 4:
        attention_S, attention_T = (side.sum(1, dtype=dtype) for side in (attention_S, attention_T))
    if mask is None:
        return mean(_squares(attention_S, attention_T)) / attention_S.shape[-1]
    weights = mask_weights(mask, attention_S, attention_T)
    return over(_masked_squares(attention_S, attention_T, weights), _pairs(weights))


def att_ce_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross entropy between attention distributions, every head with its own: nats for each head and query.

    The inputs are scores. p = softmax_j(S) and q = softmax_j(T) over all keys. With a mask the loss is
    −Σ m_i m_j q log p / (H Σ m). Without a mask it is the mean over queries of −Σ_j [T > −0.001] q log p.

    Args:
        attention_S: (B, H, L, L); without a mask also (B, L, L).
        attention_T: of the same shape. Gradients reach both sides.
        mask: (B, L), 1 = a real token.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: ranks or sizes that do not fit (TextBrewer broadcasts some of them).
    """
    _check("attention_ce", attention_S, attention_T, mask, ranks=(4,) if mask is not None else (3, 4))
    if mask is None:
        return mean(_surprise(attention_S, attention_T))
    weights = mask_weights(mask, attention_S, attention_T)
    return over(_masked_surprise(attention_S, attention_T, weights), weights.sum() * attention_S.shape[1])


def att_ce_mean_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross entropy between attention distributions of scores averaged over heads: nats for each query.

    With S and T the averages, p = softmax_j(S) and q = softmax_j(T): with a mask −Σ m_i m_j q log p / Σ m; without one
    the mean over queries of −Σ_j [T > −0.001] q log p.

    Args:
        attention_S: (B, H, L, L), or (B, L, L).
        attention_T: of the same rank; only H may differ.
        mask: (B, L), 1 = a real token.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError: an argument's type.
        ValueError: ranks or sizes that do not fit (TextBrewer broadcasts some of them).
    """
    _check("attention_ce_mean", attention_S, attention_T, mask, heads_may_differ=True)
    dtype = rows.compute_dtype(attention_S, attention_T)
    if attention_S.dim() == 4:
        attention_S, attention_T = (side.mean(1, dtype=dtype) for side in (attention_S, attention_T))
    if mask is None:
        return mean(_surprise(attention_S, attention_T))
    weights = mask_weights(mask, attention_S, attention_T)
    return over(_masked_surprise(attention_S, attention_T, weights), weights.sum())


def _squares(attention_S: Tensor, attention_T: Tensor) -> Tensor:
    return score_rows(attention_S, attention_T, "squared_error", threshold=_THRESHOLD)


def _surprise(attention_S: Tensor, attention_T: Tensor) -> Tensor:
    return score_rows(attention_S, attention_T, "cross_entropy", threshold=_THRESHOLD)


def _masked_squares(attention_S: Tensor, attention_T: Tensor, weights: Tensor) -> Tensor:
    """Return Σ m_i m_j (S − T)² over all heads, queries and keys."""
    queries = _query_weights(weights, attention_S)
    found = score_rows(attention_S, attention_T, "squared_error", keys=weights, mask=queries != 0)
    return (found * queries).sum()


def _masked_surprise(attention_S: Tensor, attention_T: Tensor, weights: Tensor) -> Tensor:
    """Return −Σ m_i m_j q log p over all heads, queries and keys."""
    queries = _query_weights(weights, attention_S)
    found = score_rows(attention_S, attention_T, "cross_entropy", keys=weights, mask=queries != 0)
    return (found * queries).sum()


def _query_weights(weights: Tensor, attention: Tensor) -> Tensor:
    """Expand a mask (B, L) to the weights of the matrices' rows, (B, L) or (B, H, L)."""
    return weights if attention.dim() == 3 else weights.unsqueeze(1).expand(attention.shape[:-1])


def _pairs(weights: Tensor) -> Tensor:
    """Return the number of valid pairs of positions, Σ_b (Σ_i m_i)²."""
    return weights.sum(1).square().sum()


def _check(
    name: str,
    attention_S: Tensor,
    attention_T: Tensor,
    mask: Tensor | None,
    ranks: tuple[int, ...] = (3, 4),
    heads_may_differ: bool = False,
) -> None:
    sides = {"attention_S": attention_S, "attention_T": attention_T}
    for side, attention in sides.items():
        validation.check_floating(side, attention, None if side == "attention_S" else attention_S)
        if attention.dim() not in ranks:
            shapes = " or ".join({3: "(B, L, L)", 4: "(B, H, L, L)"}[rank] for rank in ranks)
            raise ValueError(f"{name} needs {side} of shape {shapes}; got {tuple(attention.shape)}")
    without_heads = (slice(0, 1), slice(-2, None)) if heads_may_differ else (slice(None),)
    agree = attention_S.dim() == attention_T.dim() and all(
        attention_S.shape[part] == attention_T.shape[part] for part in without_heads
    )
    if not agree or attention_S.shape[-1] == 0:
        allowed = "may differ in the number of heads only" if heads_may_differ else "must have one shape"
        raise ValueError(
            f"{name}: attention_S and attention_T {allowed}; "
            f"got {tuple(attention_S.shape)} and {tuple(attention_T.shape)}"
        )
    validation.check_device("attention_T", attention_T, "attention_S", attention_S)
    if mask is not None and attention_S.shape[-1] != attention_S.shape[-2]:
        raise ValueError(f"{name} with a mask needs as many queries as keys; got {tuple(attention_S.shape)}")
    check_mask(mask, attention_S.shape[:1] + attention_S.shape[-1:], name, attention_S)
