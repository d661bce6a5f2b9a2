r"""Nearest rows and ranks by the Triton kernels: one launch finds candidates, direct distances decide between them.

The kernel bounds sign · d² − sign · ‖a‖² of all pairs from below (``sgfast_kernels.nearest``) and returns the rows of
the least bounds, a few more than are asked for. Their d² is computed from the differences. The result is proved if the
k-th of these d² lies below the last bound, because every other row then lies above the k-th. A query without this proof
(more equal rows than candidates, squares that overflow) is searched by `scan`. The host waits for the GPU's queue only
once, to learn whether such queries exist.

The kernel's b = fl(scale·t) − c, for cosine with scale = fl(1/‖t‖), lies within 2u of the unit vector less c, and u ‖b‖
for the subtraction; the query's point too. With δ = (4 + N) u for both, sums and product are off by 2 N δ + δ², of
which the scan's bound has 2 u N² + u² N²: 9 u N are more than the rest.
"""

import math

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.nearest import scan

# Candidates beyond the k that are asked for: they hold rows nearly as near as the k-th.
_SPARE = 8
# The largest number of undecided rows of a query that are compared directly. The target is one of these rows.
_UNDECIDED = 16
# Bytes for a candidate while it is packed, sorted and compared.
_CANDIDATE_BYTES = 512
# A row is scaled where the scale and the squares of the scaled numbers are normal numbers.
_SMALLEST_NORM, _LARGEST_NORM = 2.0**-60, 2.0**60


def refusal(queries: Tensor, table: Tensor, k: int) -> str | None:
    """Say why Triton cannot search, or return None."""
    refused = dispatch.triton_device_refusal(queries, table)
    if refused is not None:
        return refused
    if queries.dtype == torch.float64:
        return "queries is float64 (the kernels compute in float32)"
    import sgfast_kernels

    most = sgfast_kernels.MAX_CANDIDATES - _SPARE
    if k > most:
        return f"k = {k} (the kernels find at most {most})"
    return dispatch.triton_rows_refusal(table=table)


def nearest(queries: Tensor, table: Tensor, k: int, metric: str, sign: int, max_bytes: int) -> tuple[Tensor, Tensor]:
    """Search as ``scan.nearest`` does."""
    import sgfast_kernels

    total, count = math.prod(queries.shape[:-1]), _power_of_two(k + _SPARE)
    keys = table.new_empty((total, k), dtype=torch.float64)
    indices = table.new_empty((total, k), dtype=torch.int64)
    center, scale = scan.center_of(queries, table, metric, max_bytes // 4), _scale(table, metric, max_bytes)
    for some in scan.slices(0, total, _held(table, count, max_bytes)):
        vectors = rows.read_rows(queries, some)
        side = scan.side_of(vectors, center, metric)
        bounds, candidates = sgfast_kernels.nearest_candidates(
            side.points.contiguous(), *side[1:3], table, scale, center, sign, _bound(table, metric), count
        )
        proved = torch.full_like(side.norms, table.shape[0] <= count, dtype=torch.bool)
        if side.zero is not None:
            # Every row is at the same distance from zero.
            candidates = torch.where(
                side.zero[:, None], torch.arange(candidates.shape[1], device=table.device), candidates
            )
            proved = proved | side.zero
        candidates = candidates.sort(dim=1).values
        squares = _squares(vectors, table, candidates, metric, max_bytes)
        ordered = (sign * squares).sort(dim=1, stable=True)
        keys[some], indices[some] = ordered.values[:, :k], candidates.gather(1, ordered.indices[:, :k])
        limits = bounds[:, -1].to(torch.float64) + sign * side.squares.to(torch.float64)
        open_rows = (~(proved | (keys[some][:, -1] < limits))).nonzero().squeeze(1)
        if open_rows.numel():
            found = scan.nearest(vectors[open_rows], table, k, metric, sign, max_bytes, "torch")
            keys[some][open_rows], indices[some][open_rows] = found
    return keys, indices


def ranks(
    queries: Tensor, table: Tensor, targets: Tensor, target_squares: Tensor, metric: str, max_bytes: int
) -> Tensor:
    """Count as ``scan.ranks`` does."""
    import sgfast_kernels

    counts = torch.empty_like(targets)
    center, scale = scan.center_of(queries, table, metric, max_bytes // 4), _scale(table, metric, max_bytes)
    for some in scan.slices(0, targets.shape[0], _held(table, _UNDECIDED, max_bytes)):
        vectors, own_targets, own_squares = rows.read_rows(queries, some), targets[some], target_squares[some]
        side = scan.side_of(vectors, center, metric)
        limits = own_squares - side.squares.to(torch.float64)
        before, undecided, candidates = sgfast_kernels.rank_candidates(
            side.points.contiguous(),
            *side[1:3],
            table,
            scale,
            center,
            _bound(table, metric),
            _UNDECIDED,
            torch.stack([scan.round_down(limits), scan.round_up(limits)]),
        )
        squares = _squares(vectors, table, candidates.clamp(min=0), metric, max_bytes)
        earlier = scan.comes_before(squares, candidates, own_squares[:, None], own_targets[:, None])
        earlier &= candidates >= 0
        proved = undecided <= _UNDECIDED
        counts[some] = before + earlier.sum(1)
        if side.zero is not None:
            counts[some] = torch.where(side.zero, own_targets, counts[some])
            proved = proved | side.zero
        open_rows = (~proved).nonzero().squeeze(1)
        if open_rows.numel():
            counts[some][open_rows] = scan.ranks(
                vectors[open_rows], table, own_targets[open_rows], own_squares[open_rows], metric, max_bytes, "torch"
            )
    return counts


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _held(table: Tensor, count: int, max_bytes: int) -> int:
    """Return the number of queries that are processed at once: their points and candidates fill half of the bytes."""
    return max(1, max_bytes // 2 // (8 * table.shape[1] + _CANDIDATE_BYTES * count))


def _bound(table: Tensor, metric: str) -> tuple[float, float, float]:
    """Factors of N², N and 1, and a little for the rounding of the bound itself."""
    coefficient, constant = scan.bound_factors(table.shape[1])
    linear = 9 * 2.0**-24 if metric == "cosine" else 0.0
    return coefficient * (1 + 2.0**-16), linear, constant


def _scale(table: Tensor, metric: str, max_bytes: int) -> Tensor | None:
    """Float32 factors that make unit vectors of the rows: 0 for zero vectors, NaN if no factor is usable."""
    if metric == "l2":
        return None
    step = max(1, max_bytes // (8 * table.shape[1]))
    parts = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64) for part in torch.split(table, step)]
    norms = torch.cat(parts)
    normal = (norms > _SMALLEST_NORM) & (norms < _LARGEST_NORM)
    scale = torch.where(normal, norms.reciprocal(), math.nan)
    return torch.where(norms == 0, 0, scale).to(torch.float32)


def _squares(queries: Tensor, table: Tensor, candidates: Tensor, metric: str, max_bytes: int) -> Tensor:
    """d² of every query and its candidates, (queries, count) float64."""
    every = torch.arange(candidates.shape[0], device=table.device).repeat_interleave(candidates.shape[1])
    squares = scan.direct(queries, every, table, candidates.flatten(), metric, max_bytes // 4)
    return squares.view(candidates.shape)
