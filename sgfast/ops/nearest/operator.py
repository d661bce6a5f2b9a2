"""The registered operators ``sgfast::nearest_embeddings`` and ``sgfast::embedding_ranks``; neither has a gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.nearest import kernels, scan
from sgfast.ops.operator import define


def triton_refusal(queries: Tensor, table: Tensor, k: int = 1, **_: Any) -> str | None:
    """Say why Triton cannot search, or return None."""
    return kernels.refusal(queries, table, k)


class Search(NamedTuple):
    """The arguments of ``sgfast::nearest_embeddings``, checked."""

    queries: Tensor
    table: Tensor
    k: int
    metric: str
    farthest: bool
    max_chunk_bytes: int
    impl: str | None


@define("nearest_embeddings", Search)
def nearest(search: Search) -> tuple[Tensor, Tensor]:
    """Distances and indices (..., k)."""
    queries, table, k, metric, farthest, max_chunk_bytes, impl = search
    implementation = dispatch.select(impl, triton_refusal(queries, table, k)).implementation
    # The search is for the k smallest sign · d².
    sign = -1 if farthest else 1
    if implementation == "triton":
        keys, indices = kernels.nearest(queries, table, k, metric, sign, max_chunk_bytes)
    else:
        keys, indices = scan.nearest(queries, table, k, metric, sign, max_chunk_bytes, implementation)
    squares, shape = sign * keys, (*queries.shape[:-1], k)
    distances = squares.sqrt() if metric == "l2" else squares / 2
    return distances.to(rows.compute_dtype(queries, table)).view(shape), indices.view(shape)


@nearest.register_fake
def _(search: Search) -> tuple[Tensor, Tensor]:
    shape = (*search.queries.shape[:-1], search.k)
    distances = search.queries.new_empty(shape, dtype=rows.compute_dtype(search.queries, search.table))
    return distances, torch.empty_like(distances, dtype=torch.int64)


class Ranking(NamedTuple):
    """The arguments of ``sgfast::embedding_ranks``, checked but for the targets' values."""

    queries: Tensor
    table: Tensor
    targets: Tensor
    metric: str
    max_chunk_bytes: int
    impl: str | None


@define("embedding_ranks", Ranking)
def ranks(ranking: Ranking) -> Tensor:
    """Ranks (...)."""
    queries, table, targets, metric, max_chunk_bytes, impl = ranking
    implementation = dispatch.select(impl, triton_refusal(queries, table)).implementation
    flat_targets = targets.reshape(-1).to(torch.int64)
    if ((flat_targets < 0) | (flat_targets >= table.shape[0])).any():
        raise ValueError(f"targets must lie in [0, {table.shape[0]}), the rows of table")
    squares = scan.squares_of_targets(queries, table, flat_targets, metric, max_chunk_bytes)
    if implementation == "triton":
        counts = kernels.ranks(queries, table, flat_targets, squares, metric, max_chunk_bytes)
    else:
        counts = scan.ranks(queries, table, flat_targets, squares, metric, max_chunk_bytes, implementation)
    return counts.view(targets.shape)


@ranks.register_fake
def _(ranking: Ranking) -> Tensor:
    return ranking.targets.new_empty(ranking.targets.shape, dtype=torch.int64)
