"""Attacks on transformed embeddings by an attacker who knows the embedding table.

The attacks of this module use the rank of the true token: the number of the table's V rows that are nearer to its
transformed embedding. Equal distances are ordered by index, and 0 is the nearest. A fixed attack that fails proves only
that this attack fails. The `LearnedInversionAttack` adapts to the transform. The `known_transform_attack` knows the
transform, as the server that made it does, and is the hardest test. Bounds on the information that embeddings carry
(`information_bounds`, `fano_error_bound`, `pac_privacy_success_bound`) hold for every attack, within their assumptions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from sgfast.metrics.information import (
    InformationBounds,
    fano_error_bound,
    information_bounds,
    pac_privacy_success_bound,
)
from sgfast.metrics.inversion import InversionResult, LearnedInversionAttack
from sgfast.metrics.known_transform import KnownTransformResult, known_transform_attack
from sgfast.metrics.per_sequence import check_token_ids
from sgfast.metrics.voronoi import compute_percentile_voronoi_l2_distance
from sgfast.ops import dispatch, rows, validation
from sgfast.ops.nearest import embedding_ranks
from sgfast.ops.nearest.operation import DEFAULT_CHUNK_BYTES, Metric

__all__ = [
    "InformationBounds",
    "InversionResult",
    "KnownTransformResult",
    "LearnedInversionAttack",
    "compute_percentile_voronoi_l2_distance",
    "fano_error_bound",
    "information_bounds",
    "known_transform_attack",
    "max_rank_failure_rate",
    "mean_reconstruction_rank",
    "nearest_neighbor_failure_rate",
    "pac_privacy_success_bound",
    "repeated_query_attack",
    "token_ranks",
    "token_transformation_rate",
]


@torch.no_grad()
def token_ranks(
    transformed: Tensor,
    table: Tensor,
    input_ids: Tensor,
    noise_mask: Tensor | None = None,
    *,
    metric: Metric = "l2",
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> Tensor:
    """Count, for every selected token, the table rows that come before its own. 0 means that its own is the nearest.

    Args:
        transformed: (..., D) transformed embeddings, float32, bfloat16, float16 or float64.
        table: (V, D), the embedding table.
        input_ids: (...) integers, the true tokens.
        noise_mask: (...), 1 = count this token; None for all. Values at other positions have no effect.
        metric: ``"l2"`` or ``"cosine"``.
        max_chunk_bytes: bound on temporaries; default 64 MiB. See ``sgfast.ops.embedding_ranks``.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        (...) int64 in [0, V), and −1 for tokens that are not selected.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes or devices do not fit, a selected token outside [0, V), or an unknown metric.

    Example:
        >>> import torch
        >>> from sgfast.metrics.privacy import token_ranks
        >>> token_ranks(torch.tensor([[0.9, 0.1]]), torch.eye(2), torch.tensor([1]))
        tensor([1])
    """
    validation.check_floating("transformed", transformed)
    check_token_ids(input_ids, transformed.shape[:-1])
    if noise_mask is not None:
        validation.check_tensor("noise_mask", noise_mask, "a torch.Tensor or None", input_ids)
        if noise_mask.shape != input_ids.shape:
            raise ValueError(
                f"noise_mask must have the shape of input_ids, {tuple(input_ids.shape)}; got {tuple(noise_mask.shape)}"
            )
        validation.check_device("noise_mask", noise_mask, "input_ids", input_ids)
        noise_mask = validation.as_bool("noise_mask", noise_mask)
    max_bytes = DEFAULT_CHUNK_BYTES if max_chunk_bytes is None else validation.chunk_bytes(max_chunk_bytes)
    ranks = torch.full(input_ids.shape, -1, dtype=torch.int64, device=input_ids.device)
    flat_ids = input_ids.reshape(-1)
    # A chunk's copy of the selected rows, and their ids and ranks.
    row_bytes = 2 * transformed.shape[-1] * transformed.element_size() + 32
    for chunk in rows.row_chunks(input_ids.shape, noise_mask, row_bytes, max_bytes // 4):
        queries, targets = rows.read_rows(transformed, chunk), flat_ids[chunk]
        selected = None
        if noise_mask is not None and isinstance(chunk, slice):
            selected = noise_mask.reshape(-1)[chunk]
            queries, targets = torch.where(selected[:, None], queries, 0), torch.where(selected, targets, 0)
        found = embedding_ranks(
            queries, table, targets, metric=metric, max_chunk_bytes=max(1, max_bytes - max_bytes // 4), impl=impl
        )
        ranks.view(-1)[chunk] = found if selected is None else torch.where(selected, found, -1)
    return ranks


def check_rank(name: str, rank: int, size: int | None) -> None:
    """Check a rank against the table's size (None for any)."""
    validation.check_integer(name, rank)
    if rank < 1 or (size is not None and rank > size):
        allowed = "be at least 1" if size is None or rank < 1 else f"be at most {size}, the rows of table"
        raise ValueError(f"{name} must {allowed}; got {rank}")


def _rate(event: Tensor, ranks: Tensor) -> Tensor:
    """Return the fraction of the selected tokens with the event, float32; NaN without a selected token."""
    selected = ranks >= 0
    return ((event & selected).sum().to(torch.float64) / selected.sum()).to(torch.float32)


def _table_size(table: Tensor) -> int:
    validation.check_floating("table", table)
    if table.dim() != 2:
        raise ValueError(f"table must have shape (V, D); got {tuple(table.shape)}")
    return table.shape[0]


def nearest_neighbor_failure_rate(
    transformed: Tensor,
    table: Tensor,
    input_ids: Tensor,
    noise_mask: Tensor | None = None,
    *,
    metric: Metric = "l2",
    beta: int = 1,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """Fraction of selected tokens that are not among the ``beta`` table rows nearest to their transformed embedding.

        P(rank ≥ beta)

    The attack replaces every embedding by its nearest token (beta = 1), or by a shortlist that a language model could
    choose from. A low rate proves that the text can be read. A high rate says that this attack fails. It says nothing
    about stronger attacks (a learned inversion, averages over repeated queries).

    Args:
        transformed: (..., D) transformed embeddings.
        table: (V, D), the embedding table.
        input_ids: (...), the true tokens.
        noise_mask: (...), 1 = count this token; None for all.
        metric: ``"l2"`` or ``"cosine"``.
        beta: the attack succeeds if the token's 0-based rank is below this.
        max_chunk_bytes: bound on temporaries; default 64 MiB.

    Returns:
        A float32 scalar in [0, 1]; NaN if no token is selected.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes that do not fit, or beta outside [1, V].

    Example:
        >>> import torch
        >>> table = torch.eye(3)
        >>> nearest_neighbor_failure_rate(table[[0, 1, 1]], table, torch.tensor([0, 1, 2]))
        tensor(0.3333)
    """
    check_rank("beta", beta, _table_size(table))
    ranks = token_ranks(transformed, table, input_ids, noise_mask, metric=metric, max_chunk_bytes=max_chunk_bytes)
    return _rate(ranks >= beta, ranks)


def max_rank_failure_rate(
    transformed: Tensor,
    table: Tensor,
    input_ids: Tensor,
    noise_mask: Tensor | None = None,
    *,
    metric: Metric = "l2",
    r: int = 1,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """Fraction of selected tokens that are not the ``r``-th farthest table row from their transformed embedding.

        P(rank ≠ V − r)

    If a transform turns embeddings around, the nearest-neighbour attack fails, and the true token is in the last place.
    This attack looks at the last place. A low rate proves that the text can be read. A high rate says only that tokens
    are not at this end of the list. The histogram of ranks (`sgfast.metrics.PrivacyMetrics.rank_counts`) shows all
    places.

    Args:
        transformed: (..., D) transformed embeddings.
        table: (V, D), the embedding table.
        input_ids: (...), the true tokens.
        noise_mask: (...), 1 = count this token; None for all.
        metric: ``"l2"`` or ``"cosine"``.
        r: 1 takes the farthest token.
        max_chunk_bytes: bound on temporaries; default 64 MiB.

    Returns:
        A float32 scalar in [0, 1]; NaN if no token is selected.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes that do not fit, or r outside [1, V].

    Example:
        >>> import torch
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> max_rank_failure_rate(-table[[0, 2]], table, torch.tensor([0, 2]))  # turned around: both are found
        tensor(0.)
    """
    size = _table_size(table)
    check_rank("r", r, size)
    ranks = token_ranks(transformed, table, input_ids, noise_mask, metric=metric, max_chunk_bytes=max_chunk_bytes)
    return _rate(ranks != size - r, ranks)


def token_transformation_rate(
    transformed: Tensor,
    table: Tensor,
    input_ids: Tensor,
    noise_mask: Tensor | None = None,
    *,
    k: int,
    symmetric: bool = False,
    metric: Metric = "l2",
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """Fraction of selected tokens whose true token is not among the ``k`` nearest rows (symmetric: nor ``k`` farthest).

        P(rank ≥ k),   symmetric: P(k ≤ rank < V − k)

    The symmetric form counts a token only if an attacker who also reads the list from its end does not find it. With
    k = 1 the plain form is the nearest-neighbour failure rate. A low rate proves that a shortlist of k tokens
    (symmetric: 2k) holds the true token. A high rate does not bound attackers with longer lists, a language model or a
    trained inversion.

    Args:
        transformed: (..., D) transformed embeddings.
        table: (V, D), the embedding table.
        input_ids: (...), the true tokens.
        noise_mask: (...), 1 = count this token; None for all.
        k: length of the shortlist.
        symmetric: exclude the k farthest too.
        metric: ``"l2"`` or ``"cosine"``.
        max_chunk_bytes: bound on temporaries; default 64 MiB.

    Returns:
        A float32 scalar in [0, 1]; NaN if no token is selected.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes that do not fit, or k outside [1, V].

    Example:
        >>> import torch
        >>> table = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> token_transformation_rate(table[[0, 0, 0]], table, torch.tensor([0, 1, 3]), k=1, symmetric=True)
        tensor(0.3333)
    """
    size = _table_size(table)
    check_rank("k", k, size)
    ranks = token_ranks(transformed, table, input_ids, noise_mask, metric=metric, max_chunk_bytes=max_chunk_bytes)
    return _rate((ranks >= k) & ((ranks < size - k) | (not symmetric)), ranks)


def mean_reconstruction_rank(
    transformed: Tensor,
    table: Tensor,
    input_ids: Tensor,
    noise_mask: Tensor | None = None,
    *,
    metric: Metric = "l2",
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """Mean 0-based rank of the true token among the rows nearest to its transformed embedding.

    The mean is 0 if every token is the nearest, (V − 1)/2 for the ranks of random rows, and V − 1 if every token is the
    farthest. V − 1 hides as little as 0. A few tokens far down the list can outweigh many tokens that the attack reads,
    so the mean proves nothing on its own.

    Args:
        transformed: (..., D) transformed embeddings.
        table: (V, D), the embedding table.
        input_ids: (...), the true tokens.
        noise_mask: (...), 1 = count this token; None for all.
        metric: ``"l2"`` or ``"cosine"``.
        max_chunk_bytes: bound on temporaries; default 64 MiB.

    Returns:
        A float32 scalar in [0, V − 1]; NaN if no token is selected.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> table = torch.eye(3)
        >>> mean_reconstruction_rank(table[[0, 1, 1]], table, torch.tensor([0, 1, 2]))
        tensor(0.6667)
    """
    ranks = token_ranks(transformed, table, input_ids, noise_mask, metric=metric, max_chunk_bytes=max_chunk_bytes)
    return (ranks.clamp(min=0).sum().to(torch.float64) / (ranks >= 0).sum()).to(torch.float32)


@torch.no_grad()
def repeated_query_attack(
    transformed: Tensor | Iterable[Tensor],
    table: Tensor,
    input_ids: Tensor,
    noise_mask: Tensor | None = None,
    *,
    metric: Metric = "l2",
    beta: int = 1,
    max_chunk_bytes: int | None = None,
) -> dict[int, Tensor]:
    """Nearest-neighbour failure rates of an attacker who averages many transforms of the same text.

    The mean of n draws x + µ + σε has the noise σ/√n. Enough draws therefore undo the noise, but not the mean shift. A
    rate that falls with n proves that the transform must not be applied to one text twice (fresh noise does not help, a
    fixed seed per text would). A rate that stays high says that this attack fails. An attacker who has learned the mean
    shift subtracts the shift first (`LearnedInversionAttack` on the means).

    Args:
        transformed: (R, ..., D), R independent draws of the transform of the same embeddings, or an iterable of R
            tensors (..., D), which are added up one by one.
        table: (V, D), the embedding table.
        input_ids: (...), the true tokens.
        noise_mask: (...), 1 = count this token; None for all.
        metric: ``"l2"`` or ``"cosine"``.
        beta: the attack succeeds if the token's 0-based rank is below this.
        max_chunk_bytes: bound on the search's temporaries, default 64 MiB. The sum of the draws in float64 and the mean
            are not part of this bound.

    Returns:
        n → the failure rate for the mean of the first n draws, a float32 scalar (NaN if no token is selected), for
        n = 1, 2, 4, … and R.

    Raises:
        TypeError: an argument's type.
        ValueError: no draws, shapes that do not fit, or beta outside [1, V].

    Example:
        >>> import torch
        >>> from sgfast.metrics.privacy import repeated_query_attack
        >>> table = torch.tensor([[0.0], [1.0], [2.0]])
        >>> draws = torch.tensor([[[0.7]], [[-0.7]]])  # of token 0, with noise of opposite signs
        >>> repeated_query_attack(draws, table, torch.tensor([0]))
        {1: tensor(1.), 2: tensor(0.)}
    """
    check_rank("beta", beta, _table_size(table))
    validation.check_tensors(transformed=transformed, noise_mask=noise_mask)

    def rate(total: Tensor, draws: int, dtype: torch.dtype) -> Tensor:
        mean = (total / draws).to(dtype)
        ranks = token_ranks(mean, table, input_ids, noise_mask, metric=metric, max_chunk_bytes=max_chunk_bytes)
        return _rate(ranks >= beta, ranks)

    rates: dict[int, Tensor] = {}
    draws, total = 0, torch.empty(0)
    for draw in transformed:
        validation.check_floating("transformed", draw)
        check_token_ids(input_ids, draw.shape[:-1])
        total = draw.to(torch.float64) if draws == 0 else total + draw
        dtype = rows.compute_dtype(draw)
        draws += 1
        if draws & (draws - 1) == 0:
            rates[draws] = rate(total, draws, dtype)
    if draws == 0:
        raise ValueError("transformed must hold at least one draw; it is empty")
    return rates if draws in rates else rates | {draws: rate(total, draws, dtype)}
