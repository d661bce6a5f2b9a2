r"""Nearest rows of an embedding table, and the rank of a given row, exactly.

For a query q and the table's rows t_j:

    l2       ‖q − t_j‖
    cosine   1 − cos(q, t_j) = ½ ‖q/‖q‖ − t_j/‖t_j‖‖²,   1 where either vector is zero

Rows are ordered by distance, and rows at equal distance by index. The rank of row j is the number of rows before row j.
A NaN distance counts as infinite. Both metrics are squared Euclidean distances d² between points (for cosine, unit
vectors). A matrix product finds the rows that might matter. Their d² is then computed from the differences, in float64.
Every bit of d² depends on the two rows alone. Equal rows therefore tie, and the division into chunks changes no result.

`scan` has the search in PyTorch and its bounds. `kernels` has the search in which a kernel finds the candidates.

Inputs float32, bfloat16, float16 or float64; distances in float32 (float64 if an input is), indices and ranks in
int64. There is no gradient.
"""

from typing import Literal

import torch
from torch import Tensor

from sgfast.ops import dispatch, validation
from sgfast.ops.nearest.operator import Ranking, Search, nearest, ranks, triton_refusal

Metric = Literal["l2", "cosine"]
METRICS = ("l2", "cosine")

DEFAULT_CHUNK_BYTES = 64 * 2**20


@dispatch.describe_triton(triton_refusal)
def nearest_embeddings(
    queries: Tensor,
    table: Tensor,
    k: int = 1,
    *,
    metric: Metric = "l2",
    farthest: bool = False,
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of a table for every query, exactly, without a (queries, rows) matrix.

    Args:
        queries: (..., D), float32, bfloat16, float16 or float64; any number of leading dimensions.
        table: (V, D), likewise.
        k: how many, 1 ≤ k ≤ V.
        metric: ``"l2"``, ‖q − t‖, or ``"cosine"``, 1 − cos(q, t), which is 1 where either vector is zero.
        farthest: the k farthest rows instead, the farthest first.
        max_chunk_bytes: bound on temporaries beyond the outputs in float64; at least one query and one row are
            compared at once. Default 64 MiB.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        ``(distances, indices)``, each (..., k), ordered; equal distances by index. Distances are float32 (float64 if
        an input is), indices int64. They have no gradient.

    Raises:
        TypeError: an input is not a floating tensor, or k is not an int.
        ValueError: shapes or devices do not fit, k is out of range, or the metric is unknown.

    Example:
        >>> import torch
        >>> from sgfast.ops.nearest import nearest_embeddings
        >>> table = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
        >>> nearest_embeddings(torch.tensor([0.0, 1.0]), table, k=2)
        (tensor([1., 1.]), tensor([0, 2]))
    """
    _check_pair(queries, table, metric)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int; got {type(k).__name__}")
    if not 1 <= k <= table.shape[0]:
        raise ValueError(f"k must lie in [1, {table.shape[0]}], the rows of table; got {k}")
    max_bytes = DEFAULT_CHUNK_BYTES if max_chunk_bytes is None else validation.chunk_bytes(max_chunk_bytes)
    dispatch.check_impl(impl)
    search = Search(queries.detach(), table.detach(), k, metric, farthest, max_bytes, impl)
    distances, indices = nearest(search)
    return distances, indices


@dispatch.describe_triton(lambda queries, table, **_: triton_refusal(queries, table))
def embedding_ranks(
    queries: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    metric: Metric = "l2",
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> Tensor:
    """Count, for every query, the table rows that come before its target row: 0 = the target is the nearest.

    Args:
        queries: (..., D), float32, bfloat16, float16 or float64; any number of leading dimensions.
        table: (V, D), likewise.
        targets: (...) integers in [0, V), a row for each query.
        metric: see ``nearest_embeddings``.
        max_chunk_bytes: see ``nearest_embeddings``.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        (...) int64 in [0, V): the number of strictly nearer rows plus that of equally near rows of lower index, the
        target's position in ``nearest_embeddings(queries, table, V)``.

    Raises:
        TypeError: an input is not a floating tensor, or targets are not integers.
        ValueError: shapes or devices do not fit, a target is out of range, or the metric is unknown.

    Example:
        >>> import torch
        >>> from sgfast.ops.nearest import embedding_ranks
        >>> table = torch.tensor([[0.0], [2.0], [5.0]])
        >>> embedding_ranks(torch.tensor([[1.0], [1.0], [1.0]]), table, torch.tensor([0, 1, 2]))
        tensor([0, 1, 2])
    """
    _check_pair(queries, table, metric)
    validation.check_tensor("targets", targets, beside=queries)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must hold integers; got {targets.dtype}")
    if targets.shape != queries.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of queries without its last dimension, {tuple(queries.shape[:-1])}; "
            f"got {tuple(targets.shape)}"
        )
    validation.check_device("targets", targets, "queries", queries)
    max_bytes = DEFAULT_CHUNK_BYTES if max_chunk_bytes is None else validation.chunk_bytes(max_chunk_bytes)
    dispatch.check_impl(impl)
    counts: Tensor = ranks(Ranking(queries.detach(), table.detach(), targets, metric, max_bytes, impl))
    return counts


def _check_pair(queries: Tensor, table: Tensor, metric: str) -> None:
    """Check queries (..., D) against a table (V, D), both on one device, and the metric."""
    validation.check_floating("queries", queries)
    validation.check_floating("table", table, queries)
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"table must have shape (V, D), both at least 1; got {tuple(table.shape)}")
    if queries.dim() == 0 or queries.shape[-1] != table.shape[1]:
        raise ValueError(f"queries must have shape (..., {table.shape[1]}) as table; got {tuple(queries.shape)}")
    validation.check_device("table", table, "queries", queries)
    validation.check_choice("metric", metric, METRICS)
