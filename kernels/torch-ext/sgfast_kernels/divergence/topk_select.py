"""Both sides' top-k logits per row, exactly, and the rows' weights outside them: one read of each side.

For a row x over a temperature T, k = log2(e) / T, "the first" means first by (value descending, index ascending), and
the weight of a logit against a reference r is 2^(kx − fl(k·r)):

1. ``_group_kernel``   of every group of neighbouring columns the largest logit, and the group's weights against it.
2. ``_select_kernel``  The first logits of a row lie in its first groups, taken by (largest logit descending, index
                       ascending): only those are read again. The k-th largest value is found by halving the range it
                       lies in; what equals it is taken in the order of the columns. Rows that fit into one tile are
                       read once and have no groups.
3. ``_union_kernel``   Merges both sides' indices.

The weights outside are a sum over two parts: the groups that were not read again, and the logits that were read again
and are not among the first. The whole less the first would lose all digits if the first have nearly all weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import LAUNCH_OPTIONS, mask_rows, on_device_of, required_layout, row_count, row_start
from .terms import LOG2_E, reference
from .tiles import split_rows, temperature_rows

#: The largest k and the widest rows that the kernels take. A tile holds a row's first groups, or the maxima of all
#: groups.
MAX_TOP_K = 128
MAX_TOP_K_WIDTH = 2**19
_TILE = 8192
_GROUPS = (16, 32, 64, 128)

#: Fields of a side's rows: the largest logit and the sum of weights against this logit; the largest logit outside the
#: side's own first k and the sum of weights outside against this logit; value and index of the k-th.
MASSES = 6


def group_columns(width: int, k: int) -> int:
    """Return the group's columns that move the fewest bytes: 24 a pair of groups, 4 a column that is read again."""
    fitting = [group for group in _GROUPS if group * triton.next_power_of_2(k) <= _TILE]
    return min(fitting, key=lambda group: 24 / group + 4 * group * k / width)


def top_k_union(
    noisy: Tensor, clean: Tensor, mask: Tensor | None, temperature: Tensor, k: int, top_k_of: str = "both"
) -> tuple[Tensor, Tensor]:
    """Return the union of both sides' top-k indices, and ``MASSES`` of both sides.

    Args:
        noisy: (..., V) in float32, bfloat16 or float16, laid out as ``row_layout`` can describe; V ≤ MAX_TOP_K_WIDTH.
        clean: of the same shape.
        mask: (...) bool, True = selected, or None.
        temperature: (...), positive; a number expanded to that shape is read as a number.
        k: how many of each side, at most MAX_TOP_K.
        top_k_of: ``both``, or ``noisy`` or ``clean`` for the top-k of one side alone, (..., k). The other side then has
            no first k: all its logits count as outside, and its k-th value is +inf.

    Returns:
        int32 (..., min(2k, V)): ascending, then −1; all −1 in masked rows. And float32 (2, MASSES, ...), not written
        in masked rows. In a row with a NaN, which sorts as +inf, indices are some k of each side.
    """
    rows, width = row_count(noisy), noisy.shape[-1]
    selected = noisy.new_empty((2, rows, k), dtype=torch.int32)
    masses = noisy.new_empty((2, MASSES, *noisy.shape[:-1]), dtype=torch.float32)
    size = min(2 * k, width) if top_k_of == "both" else k
    union = noisy.new_empty((*noisy.shape[:-1], size), dtype=torch.int32)
    if rows > 0:
        with on_device_of(noisy):
            for i, side in enumerate((noisy, clean)):
                _select(side, mask, temperature, selected[i], masses[i])
            if top_k_of != "both":
                chosen = ("noisy", "clean").index(top_k_of)
                masses[1 - chosen, 2:4] = masses[1 - chosen, :2]
                masses[1 - chosen, 4] = torch.inf
                union.view(rows, k).copy_(selected[chosen])
                return (union if mask is None else union.masked_fill_(~mask[..., None], -1)), masses
            _union_kernel[(rows,)](
                mask_rows(mask),
                selected,
                union,
                rows,
                k,
                union.shape[-1],
                BK=triton.next_power_of_2(k),
                # All pairs of indices are compared. With this many warps a thread holds few pairs.
                num_warps=16 if k > 64 else 8,
                **LAUNCH_OPTIONS,
            )
    return union, masses


def _select(side: Tensor, mask: Tensor | None, temperature: Tensor, selected: Tensor, masses: Tensor) -> None:
    rows, width, k = row_count(side), side.shape[-1], selected.shape[-1]
    group, groups, maxima, sums = 0, 0, None, None
    columns = triton.next_power_of_2(width)
    if columns > _TILE:
        group = group_columns(width, k)
        groups, columns = triton.cdiv(width, group), group * triton.next_power_of_2(k)
        maxima = side.new_empty((rows, groups))
        sums = side.new_empty((rows, groups), dtype=torch.float32)
        tile = 2**14 // side.element_size()
        shares, span = split_rows(side, rows, tile)
        _group_kernel[(rows, shares)](
            side,
            mask_rows(mask),
            *temperature_rows(temperature),
            maxima,
            sums,
            width,
            groups,
            span,
            *required_layout(side),
            GROUP=group,
            BV=tile,
            num_warps=8,
            **LAUNCH_OPTIONS,
        )
    _select_kernel[(rows,)](
        side,
        mask_rows(mask),
        *temperature_rows(temperature),
        maxima,
        sums,
        selected,
        masses,
        rows,
        width,
        groups,
        k,
        *required_layout(side),
        GROUP=group,
        GROUPS=triton.next_power_of_2(groups),
        FIRST=triton.next_power_of_2(k),
        BV=columns,
        num_warps=min(max(columns // 512, 1), 16),
        **LAUNCH_OPTIONS,
    )


@triton.jit
def _store_groups(b_x, slope, maxima_row, sums_row, i_group, groups, GROUP: tl.constexpr, BV: tl.constexpr):
    b_x = tl.reshape(b_x, [BV // GROUP, GROUP])
    b_max = tl.max(b_x, axis=1)
    b_sum = tl.sum(tl.exp2(tl.fma(b_x, slope, -reference(b_max, slope)[:, None])), axis=1)
    o_group = i_group + tl.arange(0, BV // GROUP)
    tl.store(maxima_row + o_group, b_max.to(maxima_row.dtype.element_ty), mask=o_group < groups)
    tl.store(sums_row + o_group, b_sum, mask=o_group < groups)


@triton.jit(do_not_specialize=["t_step", "groups", "inner"])
def _group_kernel(
    x_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    maxima_ptr,
    sums_ptr,
    width,
    groups,
    span,
    inner,
    strides,
    GROUP: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, width)
    if mask_ptr is not None:
        # A masked row has no trip and no tail.
        stop = tl.where(tl.load(mask_ptr + i_row) != 0, stop, start)
    slope = LOG2_E / tl.load(t_ptr + i_row * t_step)
    x_row = x_ptr + row_start(i_row, inner, strides)
    maxima_row, sums_row = maxima_ptr + i_row * groups, sums_ptr + i_row * groups
    o_col = tl.arange(0, BV)
    tail = start + (stop - start) // BV * BV
    for i_col in tl.range(start, tail, BV, num_stages=3):
        b_x = tl.load(x_row + i_col + o_col).to(tl.float32)
        _store_groups(b_x, slope, maxima_row, sums_row, i_col // GROUP, groups, GROUP, BV)
    if tail < stop:
        b_x = tl.load(x_row + tail + o_col, mask=tail + o_col < stop, other=float("-inf")).to(tl.float32)
        _store_groups(b_x, slope, maxima_row, sums_row, tail // GROUP, groups, GROUP, BV)


@triton.jit
def _keys(b_x, m_x, BITS: tl.constexpr):
    """Integers in the order of the values, NaN as +inf, with ``BITS`` significant bits; the least integer outside."""
    # −0 is equal to +0.
    b_bits = (tl.where(b_x == b_x, b_x, float("inf")) + 0.0).to(tl.int32, bitcast=True)
    b_key = (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)
    return tl.where(m_x, b_key, -2147483648)


@triton.jit
def _kth_largest(b_key, least, k):
    """The k-th largest key. The search halves the range of the key, which starts at ``least``."""
    most = tl.max(b_key)
    while least < most:
        middle = (least | most) - ((least ^ most) >> 1)  # their mean, rounded up, without overflow
        enough = tl.sum((b_key >= middle).to(tl.int32)) >= k
        least = tl.where(enough, middle, least)
        most = tl.where(enough, most, middle - 1)
    return least


@triton.jit
def _first(b_key, kth, k):
    """True for the first k of [rows, columns] keys by (key descending, position), and their places by position."""
    # One scan counts twice: keys above the k-th in the lower half, ties in the upper half.
    b_counts = (b_key > kth).to(tl.int32) + ((b_key == kth).to(tl.int32) << 16)
    b_in_row = tl.sum(b_counts, axis=1)
    ties = k - (tl.sum(b_in_row) & 0xFFFF)
    b_counts = tl.cumsum(b_counts, axis=1) + (tl.cumsum(b_in_row, axis=0) - b_in_row)[:, None]
    b_ties = b_counts >> 16
    m_first = (b_key > kth) | ((b_key == kth) & (b_ties <= ties))
    return m_first, (b_counts & 0xFFFF) + tl.minimum(b_ties, ties) - 1


@triton.jit(do_not_specialize=["t_step", "rows", "groups", "k", "inner"])
def _select_kernel(
    x_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    maxima_ptr,
    sums_ptr,
    selected_ptr,
    masses_ptr,
    rows,
    width,
    groups,
    k,
    inner,
    strides,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    FIRST: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    selected = 1
    if mask_ptr is not None:
        selected = tl.load(mask_ptr + i_row)
    if selected == 0:
        return
    slope = LOG2_E / tl.load(t_ptr + i_row * t_step)
    x_row = x_ptr + row_start(i_row, inner, strides)
    selected_row = selected_ptr + i_row * k
    bits: tl.constexpr = 16 if x_ptr.dtype.element_ty == tl.bfloat16 else 32
    if GROUP > 0:
        o_group = tl.arange(0, GROUPS)[None, :]
        m_group = o_group < groups
        b_max = tl.load(maxima_ptr + i_row * groups + o_group, mask=m_group, other=float("-inf")).to(tl.float32)
        b_sum = tl.load(sums_ptr + i_row * groups + o_group, mask=m_group, other=0.0)
        b_key = _keys(b_max, m_group, bits)
        least = _kth_largest(b_key, tl.min(tl.where(m_group, b_key, 2147483647)), k)
        m_first, b_place = _first(b_key, least, k)
        tl.store(selected_row + b_place, o_group, mask=m_first)
        unread = tl.max(tl.where(m_first, float("-inf"), b_max))
        b_unread = b_sum * tl.exp2(reference(b_max, slope) - reference(unread, slope))
        unread_total = tl.sum(tl.where(m_first, 0.0, b_unread))
        # The groups loaded next were stored by other threads.
        tl.debug_barrier()
        o_first = tl.arange(0, FIRST)
        b_first = tl.load(selected_row + o_first, mask=o_first < k, other=0)
        tl.debug_barrier()
        b_index = b_first[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        m_x = (o_first < k)[:, None] & (b_index < width)
        b_x = tl.load(x_row + b_index, mask=m_x, other=float("-inf")).to(tl.float32)
        b_key = _keys(b_x, m_x, bits)
    else:
        b_index = tl.arange(0, BV)[None, :]
        m_x = b_index < width
        b_x = tl.load(x_row + b_index, mask=m_x, other=float("-inf")).to(tl.float32)
        b_key = _keys(b_x, m_x, bits)
        least = tl.min(tl.where(m_x, b_key, 2147483647))
        unread, unread_total = float("-inf"), 0.0

    kth = _kth_largest(b_key, least, k)
    m_first, b_place = _first(b_key, kth, k)
    tl.store(selected_row + b_place, b_index, mask=m_first)
    m_last = m_first & (b_key == kth)
    b_outside = tl.where(m_first, float("-inf"), b_x)
    outside = tl.maximum(tl.max(b_outside), unread)
    c_outside = reference(outside, slope)
    outside_total = tl.sum(tl.exp2(tl.fma(b_outside, slope, -c_outside)))
    outside_total += unread_total * tl.exp2(reference(unread, slope) - c_outside)
    # The first k are summed apart from the rest, because large terms lose fewer digits in a sum of few terms.
    maximum = tl.max(b_x)
    c = reference(maximum, slope)
    total = tl.sum(tl.where(m_first, tl.exp2(tl.fma(b_x, slope, -c)), 0.0)) + outside_total * tl.exp2(c_outside - c)
    field = rows.to(tl.int64)
    tl.store(masses_ptr + i_row, maximum)
    tl.store(masses_ptr + field + i_row, total)
    tl.store(masses_ptr + 2 * field + i_row, outside)
    tl.store(masses_ptr + 3 * field + i_row, outside_total)
    tl.store(masses_ptr + 4 * field + i_row, tl.max(tl.where(m_last, b_x, float("-inf"))))
    # The number is exact, because it is below 2²⁴.
    tl.store(masses_ptr + 5 * field + i_row, tl.max(tl.where(m_last, b_index, 0)).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "k", "size"])
def _union_kernel(mask_ptr, selected_ptr, union_ptr, rows, k, size, BK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_k, o_union = tl.arange(0, BK), tl.arange(0, 2 * BK)
    union_row = union_ptr + i_row * size
    selected = 1
    if mask_ptr is not None:
        selected = tl.load(mask_ptr + i_row)
    if selected == 0:
        tl.store(union_row + o_union, -1, mask=o_union < size)
        return
    m_k = o_k < k
    a_row = selected_ptr + i_row * k
    b_row = a_row + rows.to(tl.int64) * k
    b_a = tl.load(a_row + o_k, mask=m_k, other=-1)
    b_b = tl.load(b_row + o_k, mask=m_k, other=-1)
    # Both lists ascend. The place of an index is the number of indices before it.
    m_new = m_k & (tl.max((b_a[:, None] == b_b[None, :]).to(tl.int32), axis=0) == 0)
    b_place = o_k + tl.sum(((b_b[None, :] < b_a[:, None]) & m_new[None, :]).to(tl.int32), axis=1)
    tl.store(union_row + b_place, b_a, mask=m_k)
    b_place = tl.sum(((b_a[:, None] < b_b[None, :]) & m_k[:, None]).to(tl.int32), axis=0)
    b_place += tl.cumsum(m_new.to(tl.int32)) - 1
    tl.store(union_row + b_place, b_b, mask=m_new)
    count = k + tl.sum(m_new.to(tl.int32))
    tl.store(union_row + o_union, -1, mask=(o_union >= count) & (o_union < size))
