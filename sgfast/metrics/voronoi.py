"""Distances of embeddings to the borders of their Voronoi cells, where another token becomes the nearest."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sgfast.ops import dispatch, nearest_embeddings, validation

# The number of rows that are searched between two reports of progress.
_QUERIES = 2048


def compute_percentile_voronoi_l2_distance(
    weight: Tensor,
    percentile: float = 5,
    half: bool = True,
    *,
    max_chunk_bytes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    impl: dispatch.Implementation | None = None,
) -> float:
    """Compute a percentile of ``voronoi_l2_distances``, interpolated linearly.

    The documented recommendation for ``inverse_l2_power_law_characteristic_length`` is the 5th percentile. The catalyst
    then acts on embeddings that have hardly left their cell.

    Args:
        weight: see ``voronoi_l2_distances``.
        percentile: the percentile, in [0, 100].
        half: see ``voronoi_l2_distances``.
        max_chunk_bytes: see ``voronoi_l2_distances``.
        on_progress: see ``voronoi_l2_distances``.
        impl: see ``sgfast.ops.dispatch``.

    Raises:
        TypeError: the weight is not a floating tensor, or the percentile no number.
        ValueError: the percentile lies outside [0, 100], or the weight does not fit.

    Example:
        >>> import torch
        >>> from sgfast.metrics.privacy import compute_percentile_voronoi_l2_distance
        >>> compute_percentile_voronoi_l2_distance(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), 50)
        0.75
    """
    validation.check_number("percentile", percentile)
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must lie in [0, 100]; got {percentile}")
    distances = voronoi_l2_distances(weight, half, max_chunk_bytes=max_chunk_bytes, on_progress=on_progress, impl=impl)
    return percentile_of(distances, percentile)


def percentile_of(values: Tensor, percentile: float) -> float:
    """Return a percentile of finite values, interpolated linearly between its two neighbours."""
    ordered = values.flatten().to(torch.float64).sort().values
    position = percentile / 100 * (ordered.numel() - 1)
    below = math.floor(position)
    first, second = ordered[below].item(), ordered[min(below + 1, ordered.numel() - 1)].item()
    return first + (second - first) * (position - below)


def voronoi_l2_distances(
    weight: Tensor,
    half: bool = True,
    *,
    max_chunk_bytes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    impl: dispatch.Implementation | None = None,
) -> Tensor:
    """Compute the distance of every embedding to the border of its Voronoi cell: ½ min over j ≠ i of ‖e_i − e_j‖₂.

    Duplicate rows and rows of zeros (tokens that training never touched) are dropped, because they would make the
    distance 0. Distances are exact (``nearest_embeddings``).

    Args:
        weight: (V, D), the embedding table, float32, bfloat16, float16 or float64.
        half: False returns the distance to the nearest other row.
        max_chunk_bytes: bound on temporaries of the search, see ``nearest_embeddings``. The search for equal rows takes
            up to three more copies of the table.
        on_progress: called with (rows done, rows to do) a few dozen times.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        One distance for each distinct row that is not zero, positive, in no particular order; float32 (float64 if the
        weight is).

    Raises:
        TypeError: the weight is not a floating tensor.
        ValueError: the weight has another shape, holds NaN or infinity, or has fewer than two distinct rows.

    Example:
        >>> import torch
        >>> from sgfast.metrics.voronoi import voronoi_l2_distances
        >>> voronoi_l2_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0], [3.0, 4.0]]))
        tensor([2., 2.])
    """
    validation.check_floating("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (V, D), both at least 1; got {tuple(weight.shape)}")
    weight = weight.detach()
    if not all(bound.isfinite() for bound in torch.aminmax(weight)):
        raise ValueError("weight must hold finite numbers; it has NaN or infinity")
    table = torch.unique(weight, dim=0)
    table = table[(table != 0).any(1)]
    if table.shape[0] < 2:
        raise ValueError(f"weight must have at least two distinct rows that are not zero; it has {table.shape[0]}")
    nearest = []
    for queries in torch.split(table, _QUERIES):
        # Every row finds itself first.
        distances, _ = nearest_embeddings(queries, table, 2, max_chunk_bytes=max_chunk_bytes, impl=impl)
        nearest.append(distances[:, 1])
        if on_progress is not None:
            on_progress(sum(part.numel() for part in nearest), table.shape[0])
    return torch.cat(nearest) / 2 if half else torch.cat(nearest)
