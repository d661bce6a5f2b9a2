"""Divergences over the vocabulary: two reads of both sides forward, one read and one write a side backward.

For logits x (noisy) and y (clean) over a temperature T, in units of bits: k = log2(e) / T.

``lse_pair``             per row and side the maximum m and S = Σ 2^(kx − fl(k·m)): (4, ...) = m_x, S_x, m_y, S_y. A
                         log-sum-exp would be rounded to its own size; the largest term here is 1 to the last bit.
``divergence_forward``   values (kinds, ...), and row scalars (4 + 2·kinds, ...): ``lse_pair``'s, then per kind ΣA and
                         ΣB, the row sums of the partials with respect to log p and log q.
``divergence_backward``  ∂/∂x = Σ upstream·(A − p·ΣA) / T and ∂/∂y = Σ upstream·(B − q·ΣB) / T, all kinds at once.

Where few rows would leave processors idle, programs share a row and a small kernel adds up their parts. −inf logits are
probability 0: KL is inf where the other side is not 0, and the side towards which its partial is infinite gets gradient
0. A row with a NaN or +inf logit, or of −inf alone, gives NaN. Masked rows are not read; both passes write zeros there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._divergence_terms import (
    LN2,
    TINY,
    clamped,
    difference_of,
    mixture,
    offsets,
    probabilities,
    sign_of,
    skew_partials,
    times_ratio,
)
from ._rows import LAUNCH_OPTIONS, on_device_of, row_layout, row_start, sum_neighbours, vector_columns

# In the order of their bits in a kernel's ``KINDS``.
KINDS = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "total_variation",
    "squared_hellinger",
    "cross_entropy",
    "skew_forward_kl",
    "skew_reverse_kl",
)
FORWARD_KL, REVERSE_KL, JEFFREYS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
JENSEN_SHANNON, TOTAL_VARIATION, HELLINGER = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
CROSS_ENTROPY, SKEW_FORWARD, SKEW_REVERSE = tl.constexpr(64), tl.constexpr(128), tl.constexpr(256)

# What `_add_terms` sums.
_SUMS = 15
# Kinds whose partials hold p − q: its sum is 0 but for what the normalisers were rounded by, and takes that off again.
LINEAR = tl.constexpr(1 | 2 | 4 | 32 | 64)
LOG2_E = tl.constexpr(1.4426950408889634)


def lse_pair(noisy: Tensor, clean: Tensor, mask: Tensor | None, temperature: Tensor) -> Tensor:
    """Return (4, ...) float32: per row m and S of the noisy side, then of the clean side (see the module).

    Args:
        noisy: (..., V) in float32, bfloat16 or float16, laid out as ``row_layout`` can describe.
        clean: of the same shape.
        mask: (...) bool, True = selected, or None.
        temperature: (...), positive; a number expanded to that shape is read as a number.
    """
    rows, width = _row_count(noisy), noisy.shape[-1]
    scalars = noisy.new_empty((4, *noisy.shape[:-1]), dtype=torch.float32)
    if rows > 0:
        tile = _tile(noisy, clean, 0, backward=False)
        splits, span = _splits(noisy, rows, tile["BV"])
        parts = scalars if splits == 1 else noisy.new_empty((4, splits, rows), dtype=torch.float32)
        with on_device_of(noisy):
            _lse_kernel[(rows, splits)](
                noisy,
                clean,
                _rows_of(mask),
                *_temperature_rows(temperature),
                parts,
                rows,
                width,
                span,
                *row_layout(noisy),
                *row_layout(clean),
                **tile,
                **LAUNCH_OPTIONS,
            )
            if splits > 1:
                _merge_kernel[(triton.cdiv(rows, 128),)](
                    *_temperature_rows(temperature),
                    parts,
                    scalars,
                    rows,
                    splits,
                    BN=128,
                    num_warps=4,
                    **LAUNCH_OPTIONS,
                )
    return scalars


def divergence_forward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    kinds: Sequence[str],
    beta: float,
    skew: float,
) -> tuple[Tensor, Tensor]:
    """Return values (kinds, ...) and row scalars (4 + 2·kinds, ...), float32.

    Args:
        noisy: as in ``lse_pair``.
        clean: as in ``lse_pair``.
        mask: as in ``lse_pair``.
        temperature: as in ``lse_pair``.
        kinds: names among ``KINDS``, each once; any number in one launch.
        beta: weight of the clean side in the Jensen–Shannon mixture.
        skew: weight of the first side in the mixtures of the skew kinds.
    """
    rows, width = _row_count(noisy), noisy.shape[-1]
    row_scalars = noisy.new_empty((4 + 2 * len(kinds), *noisy.shape[:-1]), dtype=torch.float32)
    values = noisy.new_empty((len(kinds), *noisy.shape[:-1]), dtype=torch.float32)
    if rows > 0:
        lse = lse_pair(noisy, clean, mask, temperature)
        tile = _tile(noisy, clean, len(kinds), backward=False)
        splits, span = _splits(noisy, rows, tile["BV"])
        sums = noisy.new_empty((_SUMS, splits, rows), dtype=torch.float32)
        modes = {"KINDS": _bits(kinds), "SKEWED": skew > 0}
        with on_device_of(noisy):
            _forward_kernel[(rows, splits)](
                noisy,
                clean,
                _rows_of(mask),
                *_temperature_rows(temperature),
                lse,
                sums,
                rows,
                width,
                span,
                *row_layout(noisy),
                *row_layout(clean),
                beta,
                skew,
                **modes,
                **tile,
                **LAUNCH_OPTIONS,
            )
            _finish_kernel[(triton.cdiv(rows, 128),)](
                _rows_of(mask),
                lse,
                sums,
                values,
                row_scalars,
                rows,
                splits,
                *(list(kinds).index(kind) if kind in kinds else 0 for kind in KINDS),
                beta,
                **modes,
                BN=128,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return values, row_scalars


def divergence_backward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    upstream: Tensor,
    row_scalars: Tensor,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    needs_noisy: bool,
    needs_clean: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients to ``noisy`` and ``clean`` that are needed, contiguous, in one launch.

    Args:
        noisy: as in ``divergence_forward``.
        clean: as in ``divergence_forward``.
        mask: as in ``divergence_forward``.
        temperature: as in ``divergence_forward``.
        upstream: (kinds, ...) float32, the gradient of the values.
        row_scalars: from ``divergence_forward``.
        kinds: as in ``divergence_forward``.
        beta: as in ``divergence_forward``.
        skew: as in ``divergence_forward``.
        needs_noisy: whether to compute the gradient to ``noisy``.
        needs_clean: whether to compute the gradient to ``clean``.
    """
    contiguous = torch.contiguous_format
    noisy_gradient = torch.empty_like(noisy, memory_format=contiguous) if needs_noisy else None
    clean_gradient = torch.empty_like(clean, memory_format=contiguous) if needs_clean else None
    rows, width = _row_count(noisy), noisy.shape[-1]
    if rows > 0 and (needs_noisy or needs_clean):
        tile = _tile(noisy, clean, len(kinds), backward=True)
        with on_device_of(noisy):
            _backward_kernel[(rows, triton.cdiv(width, tile["BV"]))](
                noisy,
                clean,
                _rows_of(mask),
                *_temperature_rows(temperature),
                upstream.contiguous(),
                row_scalars.contiguous(),
                noisy_gradient,
                clean_gradient,
                rows,
                width,
                *row_layout(noisy),
                *row_layout(clean),
                beta,
                skew,
                *(list(kinds).index(kind) if kind in kinds else 0 for kind in KINDS),
                KINDS=_bits(kinds),
                SKEWED=skew > 0,
                **tile,
                **LAUNCH_OPTIONS,
            )
    return noisy_gradient, clean_gradient


def _bits(kinds: Sequence[str]) -> int:
    return sum(1 << KINDS.index(kind) for kind in kinds)


def _row_count(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


def _rows_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).view(torch.uint8)


def _temperature_rows(temperature: Tensor) -> tuple[Tensor, int]:
    """The temperatures as a flat float32 tensor, and the step from row to row: 0 for a number expanded to all rows."""
    temperature = temperature.float()
    if all(stride == 0 for stride in temperature.stride()):
        return temperature.as_strided((1,), (1,)), 0
    return temperature.reshape(-1), 1


def _tile(noisy: Tensor, clean: Tensor, kinds: int, backward: bool) -> dict[str, int]:
    """Columns of a tile, the columns that share a sum, and the warps.

    Sixteen 16-bit columns a thread, eight of float32, are two 16-byte loads a side (half of that on AMD, whose warps
    are twice as wide); where registers run short, half the columns. Forward adds up neighbouring columns before it
    keeps their sum. Narrow vocabularies get narrow tiles. Sizes depend on the width's power of two alone, so that
    shapes share compiled kernels.
    """
    neighbours = vector_columns(noisy, clean)
    # Sums of several kinds need the registers, and so do all columns' own sums in unaligned tiles.
    halved = kinds > 4 if backward else kinds > 0 or neighbours == 1
    narrow = max(noisy.element_size(), clean.element_size()) == 2
    most_warps, columns_each = (4 if backward else 8), (512 if narrow else 256) // (2 if halved else 1)
    columns = min(max(triton.next_power_of_2(noisy.shape[-1]), 256), most_warps * columns_each)
    tile = {"BV": columns, "num_warps": max(1, columns // columns_each)}
    return tile if backward else tile | {"NEIGHBOURS": neighbours}


def _splits(like: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """How many programs share a row, and the columns of each: a multiple of the tile."""
    processors = 132
    if like.device.type == "cuda":
        processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    tiles = triton.cdiv(like.shape[-1], columns)
    wanted = min(tiles, triton.cdiv(4 * processors, rows)) if rows < 4 * processors else 1
    tiles_each = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, tiles_each), tiles_each * columns


@triton.jit
def _accumulate(b_x, b_m, b_s, slope, BV: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Add a tile of one side to the running maxima and sums, one of each for neighbouring columns."""
    b_x = tl.reshape(b_x, [1, BV // NEIGHBOURS, NEIGHBOURS])
    b_next = tl.maximum(b_m, tl.max(b_x, axis=2))
    b_c = b_next * slope
    # Fused: what c was rounded by stays in S.
    b_e = tl.exp2(tl.fma(b_x, slope, -b_c[:, :, None]))
    return b_next, b_s * tl.exp2(b_m * slope - b_c) + tl.sum(b_e, axis=2)


@triton.jit(do_not_specialize=["rows", "t_step", "a_inner", "b_inner"])
def _lse_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    parts_ptr,
    rows,
    width,
    span,
    a_inner,
    a_outer_stride,
    a_inner_stride,
    b_inner,
    b_outer_stride,
    b_inner_stride,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, width)
    if mask_ptr is not None:
        # No trip and no tail where the row is masked.
        stop = tl.where(tl.load(mask_ptr + i_row) != 0, stop, start)
    slope = LOG2_E / tl.load(t_ptr + i_row * t_step)
    a_row = a_ptr + row_start(i_row, a_inner, a_outer_stride, a_inner_stride)
    b_row = b_ptr + row_start(i_row, b_inner, b_outer_stride, b_inner_stride)
    o_col = tl.arange(0, BV)[None, :]

    b_ma = tl.full([1, BV // NEIGHBOURS], -1e30, tl.float32)
    b_mb = tl.full([1, BV // NEIGHBOURS], -1e30, tl.float32)
    b_sa = tl.zeros([1, BV // NEIGHBOURS], tl.float32)
    b_sb = tl.zeros([1, BV // NEIGHBOURS], tl.float32)
    tail = start + (stop - start) // BV * BV
    for i_col in tl.range(start, tail, BV, num_stages=3):
        b_a = tl.load(a_row + i_col + o_col).to(tl.float32)
        b_b = tl.load(b_row + i_col + o_col).to(tl.float32)
        b_ma, b_sa = _accumulate(b_a, b_ma, b_sa, slope, BV, NEIGHBOURS)
        b_mb, b_sb = _accumulate(b_b, b_mb, b_sb, slope, BV, NEIGHBOURS)
    if tail < stop:
        m_col = tail + o_col < stop
        b_a = tl.load(a_row + tail + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        b_b = tl.load(b_row + tail + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        b_ma, b_sa = _accumulate(b_a, b_ma, b_sa, slope, BV, NEIGHBOURS)
        b_mb, b_sb = _accumulate(b_b, b_mb, b_sb, slope, BV, NEIGHBOURS)

    m_a, m_b = tl.max(b_ma), tl.max(b_mb)
    field = tl.num_programs(1) * rows.to(tl.int64)
    o_part = parts_ptr + tl.program_id(1) * rows.to(tl.int64) + i_row
    tl.store(o_part, m_a)
    tl.store(o_part + field, tl.sum(b_sa * tl.exp2(b_ma * slope - m_a * slope)))
    tl.store(o_part + 2 * field, m_b)
    tl.store(o_part + 3 * field, tl.sum(b_sb * tl.exp2(b_mb * slope - m_b * slope)))


@triton.jit(do_not_specialize=["t_step", "rows", "splits"])
def _merge_kernel(t_ptr, t_step, parts_ptr, scalars_ptr, rows, splits, BN: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_row = o_row < rows
    field = rows.to(tl.int64)
    b_slope = LOG2_E / tl.load(t_ptr + o_row * t_step, mask=m_row, other=1.0)
    for side in tl.static_range(2):
        b_m = tl.full([BN], -1e30, tl.float32)
        b_s = tl.zeros([BN], tl.float32)
        for i_split in range(splits):
            o_part = parts_ptr + (2 * side * splits + i_split) * field + o_row
            b_part = tl.load(o_part, mask=m_row, other=0.0)
            b_sum = tl.load(o_part + splits * field, mask=m_row, other=0.0)
            b_next = tl.maximum(b_m, b_part)
            b_c = b_next * b_slope
            b_s = b_s * tl.exp2(b_m * b_slope - b_c) + b_sum * tl.exp2(b_part * b_slope - b_c)
            b_m = b_next
        tl.store(scalars_ptr + 2 * side * field + o_row, b_m, mask=m_row)
        tl.store(scalars_ptr + (2 * side + 1) * field + o_row, b_s, mask=m_row)


@triton.jit
def _add(b_sum, b_term, BV: tl.constexpr, NEIGHBOURS: tl.constexpr):
    return b_sum + sum_neighbours(b_term, 1, BV, NEIGHBOURS)


@triton.jit
def _add_terms(
    sums,
    b_x,
    b_y,
    x_offset,
    y_offset,
    x_log_sum,
    scale,
    slope,
    gap,
    shift,
    beta,
    skew,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Add a tile to the sums of the kinds asked for; what ``_finish_kernel`` makes of them is written there."""
    s_fkl, s_rkl, s_pd, s_qd, s_jsp, s_jsq, s_tv, s_tvp, s_h, s_ce, s_sf, s_sfp, s_sr, s_srp, s_d = sums
    b_u, b_v, b_half_log_p = probabilities(b_x, b_y, x_offset, y_offset, scale, 0.5 * slope)
    b_p, b_q = b_u * b_u, b_v * b_v
    b_d = tl.fma((b_x - b_y) - gap, slope, -shift)
    b_difference = difference_of(b_p, b_q, b_d)
    b_pd, b_qd = times_ratio(b_p, b_d), times_ratio(b_q, b_d)
    forward: tl.constexpr = (FORWARD_KL & KINDS != 0) or (SKEW_FORWARD & KINDS != 0 and not SKEWED)
    reverse: tl.constexpr = (REVERSE_KL & KINDS != 0) or (SKEW_REVERSE & KINDS != 0 and not SKEWED)
    if forward:
        s_fkl = _add(s_fkl, b_difference - b_qd * LN2, BV, NEIGHBOURS)
    if reverse:
        s_rkl = _add(s_rkl, b_pd * LN2 - b_difference, BV, NEIGHBOURS)
    if forward or reverse or LINEAR & KINDS != 0:
        s_d = _add(s_d, b_difference, BV, NEIGHBOURS)
    if JEFFREYS & KINDS:
        s_pd = _add(s_pd, b_pd, BV, NEIGHBOURS)
        s_qd = _add(s_qd, b_qd, BV, NEIGHBOURS)
    if TOTAL_VARIATION & KINDS:
        s_tv = _add(s_tv, tl.abs(b_difference), BV, NEIGHBOURS)
        s_tvp = _add(s_tvp, sign_of(b_d, b_p), BV, NEIGHBOURS)
    if HELLINGER & KINDS:
        s_h = _add(s_h, (b_u - b_v) * (b_u - b_v), BV, NEIGHBOURS)
    if CROSS_ENTROPY & KINDS:
        s_ce = _add(s_ce, times_ratio(b_q, x_log_sum - 2.0 * b_half_log_p), BV, NEIGHBOURS)
    b_finite = clamped(b_d)
    if JENSEN_SHANNON & KINDS:
        b_log_m, _ = mixture(b_p, b_q, b_finite, b_difference, beta)
        s_jsp = _add(s_jsp, b_p * (tl.maximum(-b_finite, 0.0) + b_log_m), BV, NEIGHBOURS)
        s_jsq = _add(s_jsq, b_q * (tl.maximum(b_finite, 0.0) + b_log_m), BV, NEIGHBOURS)
    if SKEWED and SKEW_FORWARD & KINDS != 0:
        b_term, b_to_p, _ = skew_partials(b_p, b_q, b_finite, b_difference, skew)
        s_sf = _add(s_sf, b_term, BV, NEIGHBOURS)
        s_sfp = _add(s_sfp, b_to_p, BV, NEIGHBOURS)
    if SKEWED and SKEW_REVERSE & KINDS != 0:
        b_term, _, b_to_p = skew_partials(b_q, b_p, -b_finite, -b_difference, skew)
        s_sr = _add(s_sr, b_term, BV, NEIGHBOURS)
        s_srp = _add(s_srp, b_to_p, BV, NEIGHBOURS)
    return s_fkl, s_rkl, s_pd, s_qd, s_jsp, s_jsq, s_tv, s_tvp, s_h, s_ce, s_sf, s_sfp, s_sr, s_srp, s_d


@triton.jit(do_not_specialize=["rows", "t_step", "a_inner", "b_inner", "beta", "skew"])
def _forward_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    lse_ptr,
    sums_ptr,
    rows,
    width,
    span,
    a_inner,
    a_outer_stride,
    a_inner_stride,
    b_inner,
    b_outer_stride,
    b_inner_stride,
    beta,
    skew,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    BV: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    field = rows.to(tl.int64)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, width)
    if mask_ptr is not None:
        stop = tl.where(tl.load(mask_ptr + i_row) != 0, stop, start)
    slope = LOG2_E / tl.load(t_ptr + i_row * t_step)
    a_row = a_ptr + row_start(i_row, a_inner, a_outer_stride, a_inner_stride)
    b_row = b_ptr + row_start(i_row, b_inner, b_outer_stride, b_inner_stride)
    o_col = tl.arange(0, BV)[None, :]
    m_a, s_a = tl.load(lse_ptr + i_row), tl.load(lse_ptr + field + i_row)
    m_b, s_b = tl.load(lse_ptr + 2 * field + i_row), tl.load(lse_ptr + 3 * field + i_row)
    c_a, c_b, gap, shift = offsets(m_a, s_a, m_b, s_b, slope)
    scale, a_log_sum = tl.sqrt(s_b / s_a), tl.log2(s_a)

    b_0 = tl.zeros([1, BV // NEIGHBOURS], tl.float32)
    sums = (b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0, b_0)
    tail = start + (stop - start) // BV * BV
    for i_col in tl.range(start, tail, BV, num_stages=3):
        b_a = tl.load(a_row + i_col + o_col).to(tl.float32)
        b_b = tl.load(b_row + i_col + o_col).to(tl.float32)
        sums = _add_terms(
            sums, b_a, b_b, c_a, c_b, a_log_sum, scale, slope, gap, shift, beta, skew, KINDS, SKEWED, BV, NEIGHBOURS
        )
    if tail < stop:
        m_col = tail + o_col < stop
        b_a = tl.load(a_row + tail + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        b_b = tl.load(b_row + tail + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        sums = _add_terms(
            sums, b_a, b_b, c_a, c_b, a_log_sum, scale, slope, gap, shift, beta, skew, KINDS, SKEWED, BV, NEIGHBOURS
        )
    o_part = sums_ptr + tl.program_id(1) * field + i_row
    for i in tl.static_range(15):
        tl.store(o_part + i * tl.num_programs(1) * field, tl.sum(sums[i]))


@triton.jit
def _total(sums_ptr, i_sum, splits, field, o_row, m_row):
    b_sum = tl.zeros(o_row.shape, tl.float32)
    for i_split in range(splits):
        b_sum += tl.load(sums_ptr + (i_sum * splits + i_split) * field + o_row, mask=m_row, other=0.0)
    return b_sum


@triton.jit
def _store_kind(values_ptr, scalars_ptr, i_kind, field, o_row, m_row, m_read, b_valid, b_value, b_to_p, b_to_q):
    # Each value is a sum of terms that are ≥ 0 but for rounding.
    b_value = tl.where(b_valid, tl.maximum(b_value, 0.0), float("nan"))
    tl.store(values_ptr + i_kind * field + o_row, tl.where(m_read, b_value, 0.0), mask=m_row)
    tl.store(scalars_ptr + (4 + 2 * i_kind) * field + o_row, tl.where(m_read, b_to_p, 0.0), mask=m_row)
    tl.store(scalars_ptr + (5 + 2 * i_kind) * field + o_row, tl.where(m_read, b_to_q, 0.0), mask=m_row)


@triton.jit(
    do_not_specialize=["rows", "splits", "i_fkl", "i_rkl", "i_jef", "i_js", "i_tv", "i_h", "i_ce", "i_sf", "i_sr"]
)
def _finish_kernel(
    mask_ptr,
    lse_ptr,
    sums_ptr,
    values_ptr,
    scalars_ptr,
    rows,
    splits,
    i_fkl,
    i_rkl,
    i_jef,
    i_js,
    i_tv,
    i_h,
    i_ce,
    i_sf,
    i_sr,
    beta,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    BN: tl.constexpr,
):
    """From sums over logits to values, ΣA and ΣB, and the scalars of ``lse_pair`` beside them."""
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    field = rows.to(tl.int64)
    m_row = o_row < rows
    m_read = m_row
    if mask_ptr is not None:
        m_read = m_row & (tl.load(mask_ptr + o_row, mask=m_row, other=0) != 0)
    b_valid = m_row
    for i in tl.static_range(4):
        b_scalar = tl.load(lse_ptr + i * field + o_row, mask=m_row, other=0.0)
        tl.store(scalars_ptr + i * field + o_row, tl.where(m_read, b_scalar, 0.0), mask=m_row)
        if i % 2 == 1:
            b_valid &= (b_scalar > 0) & (b_scalar < float("inf"))
    b_1 = 1.0 / b_scalar
    b_d = tl.zeros([BN], tl.float32)
    if (LINEAR | SKEW_FORWARD | SKEW_REVERSE) & KINDS != 0:
        b_d = b_1 * _total(sums_ptr, 14, splits, field, o_row, m_row)

    if FORWARD_KL & KINDS or (SKEW_FORWARD & KINDS and not SKEWED):
        b_v = b_1 * _total(sums_ptr, 0, splits, field, o_row, m_row)
        if FORWARD_KL & KINDS:
            _store_kind(values_ptr, scalars_ptr, i_fkl, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v - b_d)
        if SKEW_FORWARD & KINDS and not SKEWED:
            _store_kind(values_ptr, scalars_ptr, i_sf, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v - b_d)
    if REVERSE_KL & KINDS or (SKEW_REVERSE & KINDS and not SKEWED):
        b_v = b_1 * _total(sums_ptr, 1, splits, field, o_row, m_row)
        if REVERSE_KL & KINDS:
            _store_kind(values_ptr, scalars_ptr, i_rkl, field, o_row, m_row, m_read, b_valid, b_v, b_v + b_d, -b_d)
        if SKEW_REVERSE & KINDS and not SKEWED:
            _store_kind(values_ptr, scalars_ptr, i_sr, field, o_row, m_row, m_read, b_valid, b_v, b_v + b_d, -b_d)
    if JEFFREYS & KINDS:
        b_a = b_1 * _total(sums_ptr, 2, splits, field, o_row, m_row) * LN2
        b_b = -b_1 * _total(sums_ptr, 3, splits, field, o_row, m_row) * LN2
        b_v, b_a, b_b = b_a + b_b, b_a + b_d, b_b - b_d
        _store_kind(values_ptr, scalars_ptr, i_jef, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_b)
    if JENSEN_SHANNON & KINDS:
        b_a = (beta - 1.0) * b_1 * _total(sums_ptr, 4, splits, field, o_row, m_row) * LN2
        b_b = -beta * b_1 * _total(sums_ptr, 5, splits, field, o_row, m_row) * LN2
        _store_kind(values_ptr, scalars_ptr, i_js, field, o_row, m_row, m_read, b_valid, b_a + b_b, b_a, b_b)
    if TOTAL_VARIATION & KINDS:
        b_v = 0.5 * b_1 * _total(sums_ptr, 6, splits, field, o_row, m_row)
        b_a = 0.5 * b_1 * _total(sums_ptr, 7, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_tv, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if HELLINGER & KINDS:
        b_v = 0.5 * b_1 * _total(sums_ptr, 8, splits, field, o_row, m_row)
        b_a = 0.5 * b_v + 0.25 * b_d
        _store_kind(values_ptr, scalars_ptr, i_h, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if CROSS_ENTROPY & KINDS:
        b_v = b_1 * _total(sums_ptr, 9, splits, field, o_row, m_row) * LN2
        _store_kind(values_ptr, scalars_ptr, i_ce, field, o_row, m_row, m_read, b_valid, b_v, b_d, b_v)
    if SKEW_FORWARD & KINDS and SKEWED:
        b_v = b_1 * _total(sums_ptr, 10, splits, field, o_row, m_row)
        b_a = b_1 * _total(sums_ptr, 11, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_sf, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)
    if SKEW_REVERSE & KINDS and SKEWED:
        b_v = b_1 * _total(sums_ptr, 12, splits, field, o_row, m_row)
        b_a = b_1 * _total(sums_ptr, 13, splits, field, o_row, m_row)
        _store_kind(values_ptr, scalars_ptr, i_sr, field, o_row, m_row, m_read, b_valid, b_v, b_a, b_v - b_a)


@triton.jit
def _coefficients(upstream_ptr, scalars_ptr, i_kind, field, i_row, m_read):
    """Upstream towards log p and log q, 0 where the row's partial is infinite, and what they take off."""
    g = tl.load(upstream_ptr + i_kind * field + i_row, mask=m_read, other=0.0)
    to_p = tl.load(scalars_ptr + (4 + 2 * i_kind) * field + i_row, mask=m_read, other=0.0)
    to_q = tl.load(scalars_ptr + (5 + 2 * i_kind) * field + i_row, mask=m_read, other=0.0)
    p_finite, q_finite = tl.abs(to_p) < float("inf"), tl.abs(to_q) < float("inf")
    g_p, g_q = tl.where(p_finite, g, 0.0), tl.where(q_finite, g, 0.0)
    return g_p, g_q, tl.where(p_finite, g * to_p, 0.0), tl.where(q_finite, g * to_q, 0.0)


@triton.jit(
    do_not_specialize=[
        *("rows", "t_step", "a_inner", "b_inner", "beta", "skew"),
        *("i_fkl", "i_rkl", "i_jef", "i_js", "i_tv", "i_h", "i_ce", "i_sf", "i_sr"),
    ]
)
def _backward_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    upstream_ptr,
    scalars_ptr,
    a_gradient_ptr,
    b_gradient_ptr,
    rows,
    width,
    a_inner,
    a_outer_stride,
    a_inner_stride,
    b_inner,
    b_outer_stride,
    b_inner_stride,
    beta,
    skew,
    i_fkl,
    i_rkl,
    i_jef,
    i_js,
    i_tv,
    i_h,
    i_ce,
    i_sf,
    i_sr,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    field = rows.to(tl.int64)
    o_col = tl.program_id(1) * BV + tl.arange(0, BV)
    m_col = o_col < width
    m_read = i_row < rows
    if mask_ptr is not None:
        m_read = tl.load(mask_ptr + i_row) != 0
    m_tile = o_col < tl.where(m_read, width, 0)
    a_row = a_ptr + row_start(i_row, a_inner, a_outer_stride, a_inner_stride)
    b_row = b_ptr + row_start(i_row, b_inner, b_outer_stride, b_inner_stride)
    b_x = tl.load(a_row + o_col, mask=m_tile, other=float("-inf")).to(tl.float32)
    b_y = tl.load(b_row + o_col, mask=m_tile, other=float("-inf")).to(tl.float32)

    temperature = tl.load(t_ptr + i_row * t_step)
    slope = LOG2_E / temperature
    # What masked rows make of these is not stored.
    m_a = tl.load(scalars_ptr + i_row, mask=m_read, other=0.0)
    s_a = tl.load(scalars_ptr + field + i_row, mask=m_read, other=1.0)
    m_b = tl.load(scalars_ptr + 2 * field + i_row, mask=m_read, other=0.0)
    s_b = tl.load(scalars_ptr + 3 * field + i_row, mask=m_read, other=1.0)
    c_a, c_b, gap, shift = offsets(m_a, s_a, m_b, s_b, slope)
    b_u, b_v, b_half_log_p = probabilities(b_x, b_y, c_a, c_b, tl.sqrt(s_b / s_a), 0.5 * slope)
    b_p, b_q = b_u * b_u, b_v * b_v
    # A product with a clamped ratio is 0 where the probability is, and is multiplied by 0 in rows that are infinite.
    b_d = clamped(tl.fma((b_x - b_y) - gap, slope, -shift))
    b_difference = difference_of(b_p, b_q, b_d)

    # Gradients as combinations p·(a₀ + a₁ d) + a₂ (p − q) + …: coefficients per row.
    a_0, a_1, a_2, b_0, b_1, b_2 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if FORWARD_KL & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_fkl, field, i_row, m_read)
        a_2 += g_p
        a_0 -= sum_p
        b_1 -= g_q
        b_0 -= sum_q
    if SKEW_FORWARD & KINDS and not SKEWED:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_sf, field, i_row, m_read)
        a_2 += g_p
        a_0 -= sum_p
        b_1 -= g_q
        b_0 -= sum_q
    if REVERSE_KL & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_rkl, field, i_row, m_read)
        a_1 += g_p
        a_0 -= sum_p
        b_2 -= g_q
        b_0 -= sum_q
    if SKEW_REVERSE & KINDS and not SKEWED:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_sr, field, i_row, m_read)
        a_1 += g_p
        a_0 -= sum_p
        b_2 -= g_q
        b_0 -= sum_q
    if JEFFREYS & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_jef, field, i_row, m_read)
        a_1 += g_p
        a_2 += g_p
        a_0 -= sum_p
        b_1 -= g_q
        b_2 -= g_q
        b_0 -= sum_q
    if CROSS_ENTROPY & KINDS:
        g_p, g_ce, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_ce, field, i_row, m_read)
        a_2 += g_p
        a_0 -= sum_p
        b_0 -= sum_q
    b_a = b_p * (b_d * (a_1 * LN2) + a_0) + a_2 * b_difference
    b_b = b_q * (b_d * (b_1 * LN2) + b_0) + b_2 * b_difference
    if CROSS_ENTROPY & KINDS:
        b_bits = clamped(tl.log2(s_a) - 2.0 * b_half_log_p)
        b_b += b_q * b_bits * (g_ce * LN2)
    if JENSEN_SHANNON & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_js, field, i_row, m_read)
        b_log_m, _ = mixture(b_p, b_q, b_d, b_difference, beta)
        b_a += b_p * ((tl.maximum(-b_d, 0.0) + b_log_m) * (g_p * (beta - 1.0) * LN2) - sum_p)
        b_b += b_q * ((tl.maximum(b_d, 0.0) + b_log_m) * (-g_q * beta * LN2) - sum_q)
    if TOTAL_VARIATION & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_tv, field, i_row, m_read)
        b_a += 0.5 * g_p * sign_of(b_d, b_p) - sum_p * b_p
        b_b -= 0.5 * g_q * sign_of(b_d, b_q) + sum_q * b_q
    if HELLINGER & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_h, field, i_row, m_read)
        b_apart = b_difference / tl.maximum(b_u + b_v, TINY)  # √P − √Q
        b_a += b_u * (0.5 * g_p * b_apart - sum_p * b_u)
        b_b -= b_v * (0.5 * g_q * b_apart + sum_q * b_v)
    if SKEW_FORWARD & KINDS and SKEWED:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_sf, field, i_row, m_read)
        _, b_to_p, b_to_q = skew_partials(b_p, b_q, b_d, b_difference, skew)
        b_a += g_p * b_to_p - sum_p * b_p
        b_b += g_q * b_to_q - sum_q * b_q
    if SKEW_REVERSE & KINDS and SKEWED:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_sr, field, i_row, m_read)
        _, b_to_q, b_to_p = skew_partials(b_q, b_p, -b_d, -b_difference, skew)
        b_a += g_p * b_to_p - sum_p * b_p
        b_b += g_q * b_to_q - sum_q * b_q

    rate = 1.0 / (s_b * temperature)
    valid = (s_a > 0) & (s_a < float("inf")) & (s_b > 0) & (s_b < float("inf"))
    rate = tl.where(valid, rate, float("nan"))
    if a_gradient_ptr is not None:
        b_a = tl.where(m_read, b_a * rate, 0.0)
        tl.store(a_gradient_ptr + i_row * width + o_col, b_a.to(a_gradient_ptr.dtype.element_ty), mask=m_col)
    if b_gradient_ptr is not None:
        b_b = tl.where(m_read, b_b * rate, 0.0)
        tl.store(b_gradient_ptr + i_row * width + o_col, b_b.to(b_gradient_ptr.dtype.element_ty), mask=m_col)
