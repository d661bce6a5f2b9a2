r"""Nearest rows and ranks by a scan of the table in blocks: matrix products bound distances, differences decide.

The scan works on a = q − c and b = t − c rounded to float32, c near the table's mean. With s = ‖a‖² + ‖b‖² − 2 a·b in
float32, N = ‖a‖ + ‖b‖ and u = 2⁻²⁴,

    |s − d²| ≤ (1.2 D + 16) u N² + 2⁻¹²⁴ D

The rounding of a and b moves their distance, which is at most N, by at most u N. It therefore moves d² by at most 2 u
N² + u² N². The three sums of D products, in any order of summation, are off by D u/(1 − D u) times ‖a‖², ‖b‖² and 2
‖a‖‖b‖, together 1.2 D u N² (for D < 2.8 million). Their sum and the bound itself round a handful of times, and every
underflow costs less than 2⁻¹²⁶. A block of pairs costs one product, s − ‖a‖², and one comparison with a threshold for
each query. The threshold contains ‖a‖² and the bound, which takes the block's largest ‖b‖ for all rows of the block.
Rows past the threshold cannot reach the result and are dropped. All other rows, overflows and NaN included, are
compared directly. If most rows fall within the bound, as in a table of equal rows, results stay exact and memory stays
bounded. The search then takes the time of Q·V direct distances.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.precision import full_precision_products

# Bytes for a (query, row) pair: the product and the comparison. Every pair may have to be compared directly; then the
# bytes also hold the pairs' indices and distances and the sorting of both.
_PAIR_BYTES = 112
# Bytes for an element of a row on its way to float32, and for an element of a pair that is compared directly.
_SCAN_BYTES = 32
_DIRECT_BYTES = 48
# A CPU takes larger temporaries from the system each time, page by page, which costs more time than the arithmetic.
_CPU_TEMPORARY_BYTES = 2**19
# Beyond this norm a square may overflow float32.
_LARGEST_NORM = 2.0**60


class Side(NamedTuple):
    """Queries or table rows in the form that the scan reads."""

    points: Tensor  # (n, D) float32, centred
    squares: Tensor  # (n,) float32, their squared norms; NaN where squares may overflow
    norms: Tensor  # (n,) float32; NaN likewise
    zero: Tensor | None  # (n,) bool, zero vectors; None for l2, where they are like any other, or if there are none


def _row_sums(values: Tensor) -> Tensor:
    """Sum over the last dimension by halving. Each sum depends on its own row alone, which ``sum`` does not promise."""
    while (width := values.shape[-1]) > 1:
        half = width // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = folded if width % 2 == 0 else torch.cat([folded, values[..., -1:]], dim=-1)
    return values.squeeze(-1)


def _points(vectors: Tensor, metric: str) -> tuple[Tensor, Tensor | None]:
    """Return the points that are compared, (n, D) float64: the vectors, or unit vectors and their zero flags (n,)."""
    points = vectors.to(torch.float64)
    if metric == "l2":
        return points, None
    points = _squarable(points, vectors.dtype)
    norms = _row_sums(points.square()).sqrt()
    return points / torch.where(norms > 0, norms, 1)[:, None], norms == 0


def _squarable(points: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide float64 vectors by their largest absolute value. Squares of vectors of other dtypes fit into float64."""
    if dtype != torch.float64:
        return points
    largest = torch.linalg.vector_norm(points, torch.inf, dim=-1, keepdim=True)
    return points / torch.where(largest > 0, largest, 1)


def squared_distances(queries: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """d² of paired rows by direct differences in float64: (n, D) twice → (n,)."""
    (a, a_zero), (b, b_zero) = _points(queries, metric), _points(vectors, metric)
    squares = _row_sums((a - b).square_())
    if a_zero is not None and b_zero is not None:
        squares = torch.where(a_zero | b_zero, 2, squares)
    return torch.where(squares.isnan(), math.inf, squares)


def direct(
    queries: Tensor, query_rows: Tensor, table: Tensor, table_rows: Tensor, metric: str, max_bytes: int
) -> Tensor:
    """d² of the pairs (query_rows[i], table_rows[i]), in chunks."""
    step = max(1, max_bytes // (_DIRECT_BYTES * table.shape[1]))
    step = min(step, _rows_of_a_temporary(table))
    parts = [
        squared_distances(queries[some_queries], table[some_rows], metric)
        for some_queries, some_rows in zip(torch.split(query_rows, step), torch.split(table_rows, step), strict=True)
    ]
    return torch.cat(parts)


def _rows_of_a_temporary(vectors: Tensor) -> int:
    """Return the number of rows that are held in float64 at once."""
    if vectors.device.type != "cpu":
        return 2**31
    return max(1, _CPU_TEMPORARY_BYTES // (8 * vectors.shape[1]))


def side_of(vectors: Tensor, center: Tensor, metric: str) -> Side:
    """Put vectors into the form that the scan reads."""
    zero = None
    if metric == "cosine":
        parts = [_centred_unit_vectors(part, center) for part in torch.split(vectors, _rows_of_a_temporary(vectors))]
        centred, zero = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        if zero.device.type == "cpu" and not zero.any():
            zero = None
    else:
        # A float32 difference of float32 vectors is rounded once, as their float64 difference would be.
        centred = (vectors.to(center.dtype) - center).to(torch.float32)
    squares = centred.square().sum(-1)
    norms = squares.sqrt()
    valid = norms < _LARGEST_NORM
    return Side(centred, torch.where(valid, squares, math.nan), torch.where(valid, norms, math.nan), zero)


def _centred_unit_vectors(vectors: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors less the center, (n, D) float32, and which vectors are zero."""
    points = _squarable(vectors.to(torch.float64, copy=True), vectors.dtype)
    # `squared_distances` sums in another order. The rounding to float32 hides the difference.
    norms = torch.linalg.vector_norm(points, dim=-1)
    points.div_(torch.where(norms > 0, norms, 1)[:, None]).sub_(center)
    return points.to(torch.float32), norms == 0


def center_of(queries: Tensor, table: Tensor, metric: str, max_bytes: int) -> Tensor:
    """Return the mean of a sample of the table. Any center is right; a near center makes the bound tight."""
    sample = max(1, max_bytes // (_SCAN_BYTES * table.shape[1]))
    points, _ = _points(table[:: -(-table.shape[0] // sample)], metric)
    return points.mean(0).nan_to_num(0, 0, 0).to(rows.compute_dtype(queries, table))


def _keys(queries: Side, vectors: Side, sign: int) -> Tensor:
    """sign · (s − ‖a‖²) of every pair, (queries, rows); NaN where there is no bound."""
    keys = torch.addmm(sign * vectors.squares, queries.points, vectors.points.T, alpha=-2 * sign)
    if vectors.zero is not None:
        keys = torch.where(vectors.zero, sign * (2 - queries.squares[:, None]), keys)
    if queries.zero is not None:
        keys = torch.where(queries.zero[:, None], 2 * sign, keys)
    return keys


def bound_factors(width: int) -> tuple[float, float]:
    """Return (a, b): the bound is a·N² + b (see the module)."""
    return (1.2 * width + 16) * 2.0**-24, width * 2.0**-124


def _offsets(queries: Side, vectors: Side, sign: int) -> tuple[Tensor, Tensor]:
    """Bounds (queries,) on a key's error, and sign · d² less the key, in float64; NaN where there is no bound."""
    coefficient, constant = bound_factors(queries.points.shape[-1])
    reach = torch.where(vectors.norms.isnan(), 0, vectors.norms).amax()
    bound = coefficient * (queries.norms + reach).to(torch.float64).square() + constant
    missing = sign * queries.squares.to(torch.float64)
    if queries.zero is not None:
        bound, missing = torch.where(queries.zero, 0, bound), torch.where(queries.zero, 0, missing)
    return bound, missing


class _Sizes(NamedTuple):
    """Numbers of queries held as points, of queries and table rows compared at once, and the bytes left."""

    held: int
    queries: int
    table: int
    direct_bytes: int


def sizes_of(width: int, k: int, max_bytes: int) -> _Sizes:
    """A quarter of the bytes each for rows on their way to float32, held queries, pairs, and direct comparisons.

    The table's rows, once converted, are an eighth of the first quarter.
    """
    converted = max_bytes // 4 // (_SCAN_BYTES * width)
    pairs = max_bytes // 4 // _PAIR_BYTES
    # At most four times as many table rows as queries: a flat product is slow.
    table = max(1, min(converted, 2 * math.isqrt(pairs)))
    queries = max(1, min(converted, pairs // (table + k)))
    held = max(queries, max_bytes // 4 // (4 * (width + 8)))
    return _Sizes(held // queries * queries, queries, table, max_bytes // 4)


class _Block(NamedTuple):
    """Some queries against some table rows."""

    query_slice: slice
    table_slice: slice
    queries: Tensor
    keys: Tensor
    bound: Tensor
    missing: Tensor


def _scan(
    queries: Tensor, table: Tensor, metric: str, sign: int, sizes: _Sizes, implementation: str
) -> Iterator[_Block]:
    """Yield every block of pairs; a query meets the table's rows in the order of their indices."""
    body = dispatch.implementation_of(_keys, implementation)
    center = center_of(queries, table, metric, sizes.direct_bytes)
    total = math.prod(queries.shape[:-1])
    for first in range(0, total, sizes.held):
        blocks = list(slices(first, min(first + sizes.held, total), sizes.queries))
        held = [side_of(rows.read_rows(queries, block), center, metric) for block in blocks]
        for table_slice in slices(0, table.shape[0], sizes.table):
            vectors = side_of(table[table_slice], center, metric)
            for query_slice, side in zip(blocks, held, strict=True):
                some = rows.read_rows(queries, query_slice)
                keys = body(side, vectors, sign)
                yield _Block(query_slice, table_slice, some, keys, *_offsets(side, vectors, sign))


def slices(first: int, last: int, step: int) -> Iterator[slice]:
    """Cut [first, last) into slices of at most ``step``."""
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def nearest(
    queries: Tensor, table: Tensor, k: int, metric: str, sign: int, max_bytes: int, implementation: str
) -> tuple[Tensor, Tensor]:
    """The k smallest sign · d² of every query, (queries, k) float64, and their rows, ordered by (sign · d², row)."""
    sizes = sizes_of(table.shape[1], k, max_bytes)
    total = math.prod(queries.shape[:-1])
    found_keys = table.new_empty((total, k), dtype=torch.float64)
    indices = table.new_empty((total, k), dtype=torch.int64)
    with full_precision_products(table.device):
        for block in _scan(queries, table, metric, sign, sizes, implementation):
            # Rows come in the order of their indices. Before this block, min(k, rows so far) rows are found.
            found, now_found = min(k, block.table_slice.start), min(k, block.table_slice.stop)
            block_keys, block_indices = found_keys[block.query_slice], indices[block.query_slice]
            query_rows, table_rows = _candidates(block, k, block_keys[:, -1] if found == k else None)
            table_rows = table_rows + block.table_slice.start
            squares = direct(block.queries, query_rows, table, table_rows, metric, sizes.direct_bytes)
            block_keys[:, :now_found], block_indices[:, :now_found] = _merge(
                block_keys[:, :found], block_indices[:, :found], query_rows, sign * squares, table_rows, now_found
            )
    return found_keys, indices


def _candidates(block: _Block, k: int, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows and columns of the block's pairs that may be among the k first; ``limits`` is the k-th key found so far."""
    # A comparison with NaN is false. The negations therefore select the pairs without a bound.
    if limits is not None:
        # A later row at the same distance comes after those found.
        thresholds = _below(limits + block.bound - block.missing)
        query_rows, table_rows = (~(block.keys > thresholds[:, None])).nonzero().unbind(1)
        if query_rows.shape[0] <= 2 * k * block.keys.shape[0]:
            return query_rows, table_rows
    if block.keys.shape[1] < k:
        return torch.ones_like(block.keys, dtype=torch.bool).nonzero().unbind(1)  # type: ignore[return-value]
    # The k smallest upper bounds of this block are a limit too.
    last = block.keys.topk(k, largest=False).values[:, -1].to(torch.float64)
    thresholds_here = round_up(last + 2 * block.bound)
    if limits is not None:
        thresholds_here = torch.fmin(thresholds_here, thresholds)
    return (~(block.keys > thresholds_here[:, None])).nonzero().unbind(1)  # type: ignore[return-value]


def round_up(limits: Tensor) -> Tensor:
    """The smallest float32 at or above float64 limits. A float32 matrix can be compared with it without a copy."""
    nearest = limits.to(torch.float32)
    return torch.where(nearest >= limits, nearest, nearest.nextafter(nearest.new_tensor(math.inf)))


def round_down(limits: Tensor) -> Tensor:
    """The largest float32 at or below float64 limits."""
    return -round_up(-limits)


def _below(limits: Tensor) -> Tensor:
    """The largest float32 strictly below float64 limits."""
    nearest = limits.to(torch.float32)
    return torch.where(nearest < limits, nearest, nearest.nextafter(nearest.new_tensor(-math.inf)))


def _merge(
    keys: Tensor, indices: Tensor, query_rows: Tensor, new_keys: Tensor, new_indices: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The ``width`` first of the found (n, found) and the new pairs of every query, by (key, index)."""
    count, found = keys.shape
    old_rows = torch.arange(count, device=keys.device).repeat_interleave(found)
    all_rows, all_keys = torch.cat([old_rows, query_rows]), torch.cat([keys.flatten(), new_keys])
    # Stable sorts keep the order within equal keys: found before new, and new by index.
    order = all_keys.argsort(stable=True)
    order = order[all_rows[order].argsort(stable=True)]
    first = torch.searchsorted(all_rows[order], torch.arange(count, device=keys.device))
    chosen = order[first[:, None] + torch.arange(width, device=keys.device)]
    return all_keys[chosen], torch.cat([indices.flatten(), new_indices])[chosen]


def ranks(
    queries: Tensor,
    table: Tensor,
    targets: Tensor,
    target_squares: Tensor,
    metric: str,
    max_bytes: int,
    implementation: str,
) -> Tensor:
    """Count the rows before each target row, (queries,); ``target_squares`` are the targets' d²."""
    sizes = sizes_of(table.shape[1], 1, max_bytes)
    counts = torch.zeros_like(targets)
    with full_precision_products(table.device):
        for block in _scan(queries, table, metric, 1, sizes, implementation):
            limits, block_targets = target_squares[block.query_slice], targets[block.query_slice]
            before = block.keys < round_down(limits - block.missing - block.bound)[:, None]
            undecided = ~(block.keys > round_up(limits + block.bound - block.missing)[:, None]) & ~before
            query_rows, table_rows = undecided.nonzero().unbind(1)
            table_rows = table_rows + block.table_slice.start
            squares = direct(block.queries, query_rows, table, table_rows, metric, sizes.direct_bytes)
            earlier = comes_before(squares, table_rows, limits[query_rows], block_targets[query_rows])
            count = torch.bincount(query_rows[earlier], minlength=block.keys.shape[0])
            counts[block.query_slice] += before.sum(1) + count
    return counts


def comes_before(squares: Tensor, table_rows: Tensor, target_squares: Tensor, targets: Tensor) -> Tensor:
    """Mark the rows that come before their targets: nearer rows, and equally near rows of lower index."""
    return (squares < target_squares) | ((squares == target_squares) & (table_rows < targets))


def squares_of_targets(queries: Tensor, table: Tensor, targets: Tensor, metric: str, max_bytes: int) -> Tensor:
    """d² between every query and its target row, (queries,) float64."""
    squares = table.new_empty(targets.shape, dtype=torch.float64)
    sizes = sizes_of(table.shape[1], 1, max_bytes)
    for query_slice in slices(0, targets.shape[0], sizes.queries):
        some = rows.read_rows(queries, query_slice)
        every = torch.arange(some.shape[0], device=table.device)
        squares[query_slice] = direct(some, every, table, targets[query_slice], metric, sizes.direct_bytes)
    return squares
