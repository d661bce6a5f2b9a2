"""The table rows that may be among the nearest of every query, by a product and a running selection in one launch.

For query points a (centred, float32) and table rows x with the point b = scale·x − center, computed here,

    key = sign · (‖b‖² − 2 a·b),     |key + sign·‖a‖² − sign·d²| ≤ E = N (coefficient·N + linear) + constant

with N = ‖a‖ + the largest ‖b‖ of the tile. The caller derives the bound E. ``nearest_candidates`` keeps, for every
query, the rows of the least key − E. ``rank_candidates`` counts the rows that are certainly before a limit and keeps
the rows that key ± E leaves undecided. A key may be NaN, from a NaN or from a norm that the caller sets to NaN because
it has no bound. Such a key has the least bound.

One program has a tile of queries and a share of the table, which it walks from front to back. Its selection is a sorted
list of 64-bit integers. The upper half of an integer has the bits of key − E, in an encoding that keeps the order. The
lower half has the row's number. A tile without a row that could enter is skipped. The first rows of any other tile
enter by half a bitonic merge. The product is plain float32 ("ieee"), because no useful bound holds for TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import LAUNCH_OPTIONS, on_device_of

#: The largest selection. Sorting a larger one costs more than the products.
MAX_CANDIDATES = 64
#: Programs that fill a GPU. Where the queries make fewer programs, several share the table.
_PROGRAMS = 256


def nearest_candidates(
    queries: Tensor,
    squares: Tensor,
    norms: Tensor,
    table: Tensor,
    scale: Tensor | None,
    center: Tensor,
    sign: int,
    bound: tuple[float, float, float],
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return the least key − E of every query and their rows, (Q, min(count, V)) float32 and int64, ascending.

    No other row has a smaller key − E than the last. Where a key is NaN, so is the bound.

    Args:
        queries: (Q, D) float32 points, contiguous.
        squares: (Q,) float32, ‖a‖².
        norms: (Q,) float32, ‖a‖; NaN where there is no bound.
        table: (V, D) float32, bfloat16 or float16, contiguous rows.
        scale: (V,) float32 factors of the rows, or None for 1. Under a scale a row of 0 is at d² = 2.
        center: (D,) float32.
        sign: 1, or −1 for the farthest.
        bound: coefficient, linear, constant (see the module).
        count: a power of two, at least 2, at most ``MAX_CANDIDATES``.
    """
    packed, _ = _launch(queries, squares, norms, table, scale, center, sign, bound, count, None)
    packed = packed[:, : min(count, table.shape[0])]
    return _values(packed), packed & 0xFFFFFFFF


def rank_candidates(
    queries: Tensor,
    squares: Tensor,
    norms: Tensor,
    table: Tensor,
    scale: Tensor | None,
    center: Tensor,
    bound: tuple[float, float, float],
    count: int,
    limits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for every query, how many rows are certainly before its limit, how many are undecided, and which.

    Returns (Q,) int64 twice, and (Q, count) int64: the undecided rows if they are at most ``count``, then −1.

    Args:
        queries: as in ``nearest_candidates``.
        squares: likewise.
        norms: likewise.
        table: likewise.
        scale: likewise.
        center: likewise.
        bound: likewise.
        count: likewise.
        limits: (2, Q) float32: below and above the d² − ‖a‖² that a row must stay under to be before.
    """
    packed, counts = _launch(queries, squares, norms, table, scale, center, 1, bound, count, limits.contiguous())
    before, undecided = counts.sum(0).unbind(0)
    found = torch.arange(count, device=queries.device) < undecided[:, None]
    return before, undecided, torch.where(found, packed & 0xFFFFFFFF, -1)


def _launch(
    queries: Tensor,
    squares: Tensor,
    norms: Tensor,
    table: Tensor,
    scale: Tensor | None,
    center: Tensor,
    sign: int,
    bound: tuple[float, float, float],
    count: int,
    limits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Packed selections (Q, count), ascending, and counts (shares, 2, Q)."""
    rows, width = queries.shape
    tile = _tile(rows, count, 16 if limits is None else 8)
    query_tiles, table_tiles = triton.cdiv(rows, tile["BQ"]), triton.cdiv(table.shape[0], tile["BV"])
    shares = max(1, min(_PROGRAMS // max(query_tiles, 1), table_tiles))
    span = triton.cdiv(table_tiles, shares) * tile["BV"]
    shares = triton.cdiv(table.shape[0], span)
    packed = queries.new_empty((rows, shares, count), dtype=torch.int64)
    counts = queries.new_empty((shares, 2, rows if limits is not None else 0), dtype=torch.int64)
    if rows > 0:
        with on_device_of(queries):
            _candidates_kernel[(query_tiles, shares)](
                queries,
                squares,
                norms,
                table,
                scale,
                center,
                limits,
                packed,
                counts,
                rows,
                table.shape[0],
                width,
                table.stride(0),
                span,
                sign,
                *bound,
                FIRST=count,
                **tile,
                **LAUNCH_OPTIONS,
            )
    # The shares' selections are merged.
    return packed.flatten(1).topk(count, largest=False).values, counts


def _tile(rows: int, count: int, pairs: int) -> dict[str, int]:
    """Return queries, table rows and columns of a tile; the operands of a thread's pairs fill its registers.

    Ranks hold limits and counts besides, and some compilers spill registers with 16 pairs. With half the pairs a tile
    has twice the table rows, since every tile of table rows reads the queries again.
    """
    table_rows = max(1024 // pairs, count)
    queries = min(256 * pairs // table_rows, max(16, triton.next_power_of_2(rows)))
    return {"BQ": queries, "BV": table_rows, "BD": 16, "num_warps": queries * table_rows // (32 * pairs)}


def _values(packed: Tensor) -> Tensor:
    """Return the float32 in the upper halves."""
    bits = (packed >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


@triton.jit
def _pack(b_x, b_row, m_x):
    """Integers that descend as (value, row) ascends, NaN first. Masked lanes get the least integer."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_x == b_x, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), -2147483648)
    return tl.where(m_x, ~((b_bits.to(tl.int64) << 32) | b_row.to(tl.int64)), -9223372036854775808)


@triton.jit
def _merge(b_selected, b_new, FIRST: tl.constexpr):
    """Select the first of the selected and the new integers, sorted. The selected are sorted already."""
    b_new = tl.flip(tl.topk(b_new, FIRST), 1)
    return tl.bitonic_merge(tl.maximum(b_selected, b_new), descending=True)


@triton.jit(do_not_specialize=["rows", "table_rows", "span", "sign"])
def _candidates_kernel(
    a_ptr,
    square_ptr,
    norm_ptr,
    x_ptr,
    scale_ptr,
    center_ptr,
    limit_ptr,
    packed_ptr,
    count_ptr,
    rows,
    table_rows,
    width,
    x_stride,
    span,
    sign,
    coefficient,
    linear,
    constant,
    FIRST: tl.constexpr,
    BQ: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    i_share, shares = tl.program_id(1), tl.num_programs(1)
    o_query = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)
    m_query = o_query < rows
    b_norm = tl.load(norm_ptr + o_query, mask=m_query, other=0.0)
    b_selected = tl.full([BQ, FIRST], -9223372036854775808, tl.int64)
    o_d = tl.arange(0, BD)
    b_before, b_undecided = tl.zeros([BQ], tl.int32), tl.zeros([BQ], tl.int32)
    stop = tl.minimum((i_share + 1) * span, table_rows)
    for start in range(i_share * span, stop, BV):
        o_row = start + tl.arange(0, BV)
        m_row = o_row < stop
        x_row = x_ptr + (o_row.to(tl.int64) * x_stride)[:, None]
        b_product = tl.zeros([BQ, BV], tl.float32)
        b_bb = tl.zeros([BV, BD], tl.float32)
        b_scale = tl.full([BV], 1.0, tl.float32)
        if scale_ptr is not None:
            b_scale = tl.load(scale_ptr + o_row, mask=m_row, other=1.0)
        for i_col in range(0, width, BD):
            m_col = i_col + o_d < width
            b_a = tl.load(
                a_ptr + o_query[:, None] * width + (i_col + o_d)[None, :],
                mask=m_query[:, None] & m_col[None, :],
                other=0.0,
            )
            m_x = m_row[:, None] & m_col[None, :]
            b_x = tl.load(x_row + (i_col + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
            b_center = tl.load(center_ptr + i_col + o_d, mask=m_col, other=0.0)
            b_b = tl.where(m_x, b_x * b_scale[:, None] - b_center[None, :], 0.0)
            b_bb += b_b * b_b
            b_product = tl.dot(b_a, tl.trans(b_b), b_product, input_precision="ieee")
        b_square = tl.sum(b_bb, axis=1)
        # Larger squares may overflow in the computation, so they have no bound.
        b_square = tl.where(b_square < 1.3e36, b_square, float("nan"))
        reach = tl.sqrt(tl.max(tl.where(m_row & (b_square == b_square), b_square, 0.0), axis=0))
        b_reach = b_norm + reach
        b_error = b_reach * (coefficient * b_reach + linear) + constant
        b_key = sign * (b_square[None, :] - 2 * b_product)
        if scale_ptr is not None:
            b_at_zero = sign * (2 - tl.load(square_ptr + o_query, mask=m_query, other=0.0))
            b_key = tl.where((b_scale == 0)[None, :], b_at_zero[:, None], b_key)
        b_least = b_key - b_error[:, None]
        m_pair = m_query[:, None] & m_row[None, :]
        if limit_ptr is not None:
            b_below = tl.load(limit_ptr + o_query, mask=m_query, other=0.0)
            b_above = tl.load(limit_ptr + rows.to(tl.int64) + o_query, mask=m_query, other=0.0)
            m_before = m_pair & (b_key + b_error[:, None] < b_below[:, None])
            # Rows that are neither before nor after the limit are undecided. Rows with NaN are among the undecided.
            m_pair = m_pair & ~m_before & ~(b_least > b_above[:, None])
            b_before += tl.sum(m_before.to(tl.int32), axis=1)
            b_undecided += tl.sum(m_pair.to(tl.int32), axis=1)
        b_packed = _pack(b_least, o_row[None, :], m_pair)
        b_last = tl.min(b_selected, axis=1)
        if tl.max((b_packed > b_last[:, None]).to(tl.int32)) > 0:
            b_selected = _merge(b_selected, b_packed, FIRST)

    o_packed = (o_query[:, None] * shares + i_share) * FIRST + tl.arange(0, FIRST)[None, :]
    tl.store(packed_ptr + o_packed, ~b_selected, mask=m_query[:, None])
    if limit_ptr is not None:
        o_count = i_share.to(tl.int64) * 2 * rows + o_query
        tl.store(count_ptr + o_count, b_before.to(tl.int64), mask=m_query)
        tl.store(count_ptr + o_count + rows, b_undecided.to(tl.int64), mask=m_query)
