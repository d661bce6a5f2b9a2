"""What an attacker who sees transformed embeddings and knows the embedding table can read."""

import torch
from torch import Tensor

from sgfast.metrics.voronoi import compute_percentile_voronoi_l2_distance
from sgfast.ops.nearest import Metric, embedding_ranks

__all__ = ["compute_percentile_voronoi_l2_distance", "nearest_neighbor_failure_rate"]


def nearest_neighbor_failure_rate(
    transformed: Tensor,
    table: Tensor,
    input_ids: Tensor,
    noise_mask: Tensor | None = None,
    *,
    metric: Metric = "l2",
    beta: int = 1,
) -> Tensor:
    """Fraction of selected tokens that are not among the ``beta`` table rows nearest to their transformed embedding.

    The attack replaces every embedding by its nearest token. A high rate says that this attack fails. It does not
    say that a stronger one (a learned inversion, averaging over repeated queries) would.

    Args:
        transformed: (..., D) transformed embeddings.
        table: (V, D), the embedding table.
        input_ids: (...), the true tokens.
        noise_mask: (...), nonzero = count this token; None for all.
        metric: ``"l2"`` or ``"cosine"``.
        beta: the attack succeeds if the token's 0-based rank is below this.

    Returns:
        A float32 scalar in [0, 1]; NaN if no token is selected.

    Raises:
        ValueError: shapes that do not fit, beta < 1.

    Example:
        >>> import torch
        >>> table = torch.eye(3)
        >>> nearest_neighbor_failure_rate(table[[0, 1, 1]], table, torch.tensor([0, 1, 2]))
        tensor(0.3333)
    """
    if beta < 1:
        raise ValueError(f"beta must be at least 1; got {beta}")
    if noise_mask is not None:
        if noise_mask.shape != input_ids.shape:
            raise ValueError(
                f"noise_mask must have the shape of input_ids, {tuple(input_ids.shape)}; got {tuple(noise_mask.shape)}"
            )
        transformed, input_ids = transformed[noise_mask != 0], input_ids[noise_mask != 0]
    ranks = embedding_ranks(transformed, table, input_ids, metric=metric)
    return (ranks >= beta).float().mean() if ranks.numel() else torch.tensor(torch.nan, device=ranks.device)
