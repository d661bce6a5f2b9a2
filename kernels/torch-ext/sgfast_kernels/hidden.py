"""Distances between hidden states: one read of both sides forward, one read and one write a side backward.

For rows a (noisy) and b (clean), forward writes ``values`` (4, ...): cosine distance, l2, normalized l2, cosine
similarity; and ``row_scalars`` (4, ...) for backward: ‖a−b‖, ‖a‖, ‖b‖, ‖a‖−‖b‖. The cosine distance is formed from
differences, (‖a−b‖² − (‖a‖−‖b‖)²) / (2‖a‖‖b‖) with ‖a‖−‖b‖ = Σ(a−b)(a+b) / (‖a‖+‖b‖). This form keeps its digits if a ≈
b. If ‖a−b‖ > min(‖a‖, ‖b‖), the cosine distance is 1 − Σab / (‖a‖‖b‖), which keeps its digits if the norms are far
apart. A row whose squared norm underflows counts as zero: similarity 0, cosine gradient 0. Both gradients are
combinations of a − b and of the side's own row, with coefficients per row.

Masked rows are not read. Both passes write zeros for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import LAUNCH_OPTIONS, mask_rows, on_device_of, required_layout, row_start, sum_neighbours, vector_columns

# The smallest normal float32. Smaller squares have lost their digits; with larger squares 1/(‖a‖‖b‖) is finite.
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def hidden_forward(noisy: Tensor, clean: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``values`` and ``row_scalars``, both (4, ...) in float32, for (..., D) tensors (see the module).

    Args:
        noisy: (..., D) in float32, bfloat16 or float16, laid out as ``row_layout`` can describe.
        clean: of the same shape.
        mask: (...) bool, True = selected, or None.
        eps: lower bound of ‖clean‖ in the normalized l2.
    """
    values = noisy.new_empty((4, *noisy.shape[:-1]), dtype=torch.float32)
    row_scalars = torch.empty_like(values)
    rows, width = values[0].numel(), noisy.shape[-1]
    if rows > 0:
        tile = _tile(noisy, clean)
        with on_device_of(noisy):
            _forward_kernel[(triton.cdiv(rows, tile["BN"]),)](
                noisy,
                clean,
                mask_rows(mask),
                values,
                row_scalars,
                rows,
                width,
                *required_layout(noisy),
                *required_layout(clean),
                eps,
                **tile,
                **LAUNCH_OPTIONS,
            )
    return values, row_scalars


def hidden_backward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None,
    upstream: Tensor,
    row_scalars: Tensor,
    eps: float,
    needs_noisy: bool,
    needs_clean: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients to ``noisy`` and ``clean`` that are needed, contiguous, in one launch.

    Args:
        noisy: as in ``hidden_forward``.
        clean: as in ``hidden_forward``.
        mask: as in ``hidden_forward``.
        upstream: (4, ...) float32, the gradient of ``values``.
        row_scalars: from ``hidden_forward``.
        eps: as in ``hidden_forward``.
        needs_noisy: whether to compute the gradient to ``noisy``.
        needs_clean: whether to compute the gradient to ``clean``.
    """
    contiguous = torch.contiguous_format
    noisy_gradient = torch.empty_like(noisy, memory_format=contiguous) if needs_noisy else None
    clean_gradient = torch.empty_like(clean, memory_format=contiguous) if needs_clean else None
    rows, width = row_scalars[0].numel(), noisy.shape[-1]
    if rows > 0 and (needs_noisy or needs_clean):
        tile = _tile(noisy, clean)
        with on_device_of(noisy):
            _backward_kernel[(triton.cdiv(rows, tile["BN"]),)](
                noisy,
                clean,
                mask_rows(mask),
                upstream.contiguous(),
                row_scalars.contiguous(),
                noisy_gradient,
                clean_gradient,
                rows,
                width,
                *required_layout(noisy),
                *required_layout(clean),
                eps,
                BN=tile["BN"],
                BD=tile["BD"],
                num_warps=tile["num_warps"],
                **LAUNCH_OPTIONS,
            )
    return noisy_gradient, clean_gradient


def _tile(noisy: Tensor, clean: Tensor) -> dict[str, int]:
    """Return rows and columns of a program's tile, the columns that share a sum, and the warps.

    One warp takes one row in steps of 512 columns. Each thread has two 16-byte bf16 loads a side in flight, 40 to 60
    registers keep an SM full of warps, and no value crosses warps. Wider rows get more warps: up to 16384 columns no
    program makes more than eight steps. Narrow rows share a program. Sizes depend on the width's power of two alone, so
    that shapes share compiled kernels.
    """
    width, neighbours = noisy.shape[-1], vector_columns(noisy, clean)
    warps = 1 if width <= 4096 else 2 if width <= 8192 else 4
    # A thread of an unaligned tile keeps a sum for every column. With half the columns the sums fit into the registers.
    step = (512 if neighbours > 1 else 256) * warps
    columns = min(max(triton.next_power_of_2(width), 16), step)
    return {"BN": step // columns, "BD": columns, "NEIGHBOURS": neighbours, "num_warps": warps}


@triton.jit(do_not_specialize=["rows", "a_inner", "b_inner"])
def _forward_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    values_ptr,
    scalars_ptr,
    rows,
    width,
    a_inner,
    a_strides,
    b_inner,
    b_strides,
    eps,
    BN: tl.constexpr,
    BD: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    field = rows.to(tl.int64)
    m_row = o_row < rows
    m_read = m_row
    if mask_ptr is not None:
        m_read = m_row & (tl.load(mask_ptr + o_row, mask=m_row, other=0) != 0)
    a_row = a_ptr + row_start(o_row, a_inner, a_strides)[:, None]
    b_row = b_ptr + row_start(o_row, b_inner, b_strides)[:, None]

    b_aa = tl.zeros([BN, BD // NEIGHBOURS], tl.float32)
    b_bb = tl.zeros([BN, BD // NEIGHBOURS], tl.float32)
    b_dd = tl.zeros([BN, BD // NEIGHBOURS], tl.float32)
    b_ds = tl.zeros([BN, BD // NEIGHBOURS], tl.float32)
    b_ab = tl.zeros([BN, BD // NEIGHBOURS], tl.float32)
    # A program whose rows are all masked makes no trip.
    stop = width * tl.max(m_read.to(tl.int32), axis=0)
    for start in range(0, stop, BD):
        o_col = start + tl.arange(0, BD)[None, :]
        m_tile = m_read[:, None] & (o_col < width)
        b_a = tl.load(a_row + o_col, mask=m_tile, other=0.0).to(tl.float32)
        b_b = tl.load(b_row + o_col, mask=m_tile, other=0.0).to(tl.float32)
        b_d = b_a - b_b
        b_aa += sum_neighbours(b_a * b_a, BN, BD, NEIGHBOURS)
        b_bb += sum_neighbours(b_b * b_b, BN, BD, NEIGHBOURS)
        b_dd += sum_neighbours(b_d * b_d, BN, BD, NEIGHBOURS)
        b_ds += sum_neighbours(b_d * (b_a + b_b), BN, BD, NEIGHBOURS)
        b_ab += sum_neighbours(b_a * b_b, BN, BD, NEIGHBOURS)

    aa, bb, dd, ds = tl.sum(b_aa, axis=1), tl.sum(b_bb, axis=1), tl.sum(b_dd, axis=1), tl.sum(b_ds, axis=1)
    ab = tl.sum(b_ab, axis=1)
    a_norm, b_norm, l2 = tl.sqrt(aa), tl.sqrt(bb), tl.sqrt(dd)
    m_both = (aa >= TINY) & (bb >= TINY)
    norm_difference = tl.where(m_both, ds / tl.where(m_both, a_norm + b_norm, 1.0), 0.0)
    # The numerator is ≥ 0 by the triangle inequality; rounding may leave −1 ulp.
    numerator = tl.maximum(dd - norm_difference * norm_difference, 0.0)
    product = tl.where(m_both, 2 * a_norm * b_norm, 1.0)
    m_far = l2 > tl.minimum(a_norm, b_norm)
    near_distance = numerator / product
    far_similarity = tl.minimum(tl.maximum(2 * ab / product, -1.0), 1.0)
    similarity = tl.where(m_both, tl.where(m_far, far_similarity, 1 - near_distance), 0.0)
    cosine_distance = tl.where(m_both, tl.where(m_far, 1 - far_similarity, near_distance), 1.0)
    normalized_l2 = l2 / tl.maximum(b_norm, eps)

    tl.store(values_ptr + o_row, tl.where(m_read, cosine_distance, 0.0), mask=m_row)
    tl.store(values_ptr + field + o_row, l2, mask=m_row)
    tl.store(values_ptr + 2 * field + o_row, normalized_l2, mask=m_row)
    tl.store(values_ptr + 3 * field + o_row, tl.where(m_read, similarity, 0.0), mask=m_row)
    tl.store(scalars_ptr + o_row, l2, mask=m_row)
    tl.store(scalars_ptr + field + o_row, a_norm, mask=m_row)
    tl.store(scalars_ptr + 2 * field + o_row, b_norm, mask=m_row)
    tl.store(scalars_ptr + 3 * field + o_row, norm_difference, mask=m_row)


@triton.jit(do_not_specialize=["rows", "a_inner", "b_inner"])
def _backward_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    upstream_ptr,
    scalars_ptr,
    a_gradient_ptr,
    b_gradient_ptr,
    rows,
    width,
    a_inner,
    a_strides,
    b_inner,
    b_strides,
    eps,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    field = rows.to(tl.int64)
    m_row = o_row < rows
    m_read = m_row
    if mask_ptr is not None:
        m_read = m_row & (tl.load(mask_ptr + o_row, mask=m_row, other=0) != 0)
    a_row = a_ptr + row_start(o_row, a_inner, a_strides)[:, None]
    b_row = b_ptr + row_start(o_row, b_inner, b_strides)[:, None]

    g_cosine = tl.load(upstream_ptr + o_row, mask=m_read, other=0.0)
    g_l2 = tl.load(upstream_ptr + field + o_row, mask=m_read, other=0.0)
    g_normalized = tl.load(upstream_ptr + 2 * field + o_row, mask=m_read, other=0.0)
    g_cosine -= tl.load(upstream_ptr + 3 * field + o_row, mask=m_read, other=0.0)
    l2 = tl.load(scalars_ptr + o_row, mask=m_read, other=0.0)
    a_norm = tl.load(scalars_ptr + field + o_row, mask=m_read, other=0.0)
    b_norm = tl.load(scalars_ptr + 2 * field + o_row, mask=m_read, other=0.0)
    norm_difference = tl.load(scalars_ptr + 3 * field + o_row, mask=m_read, other=0.0)

    # The gradients are towards · (a − b) + along_a · a and −towards · (a − b) + along_b · b.
    m_both = (a_norm * a_norm >= TINY) & (b_norm * b_norm >= TINY)
    g_cosine = tl.where(m_both, g_cosine, 0.0)
    a_safe = tl.where(m_both, a_norm, 1.0)
    b_safe = tl.where(m_both, b_norm, 1.0)
    inverse = 1.0 / (a_safe * b_safe)
    b_clamped = tl.maximum(b_norm, eps)
    cosine_distance = tl.maximum(l2 * l2 - norm_difference * norm_difference, 0.0) * inverse / 2
    towards = tl.where(l2 > 0, (g_l2 + g_normalized / b_clamped) / tl.where(l2 > 0, l2, 1.0), 0.0) + g_cosine * inverse
    along_a = -g_cosine * (norm_difference * inverse + cosine_distance / a_safe) / a_safe
    along_b = -g_cosine * (cosine_distance / b_safe - norm_difference * inverse) / b_safe
    along_b -= tl.where(b_norm > eps, g_normalized * l2 / b_clamped / b_clamped / b_clamped, 0.0)

    for start in range(0, width, BD):
        o_col = start + tl.arange(0, BD)[None, :]
        m_col = o_col < width
        m_tile = m_read[:, None] & m_col
        b_a = tl.load(a_row + o_col, mask=m_tile, other=0.0).to(tl.float32)
        b_b = tl.load(b_row + o_col, mask=m_tile, other=0.0).to(tl.float32)
        b_towards = towards[:, None] * (b_a - b_b)
        # Masked rows were read as zeros and get zero gradients.
        if a_gradient_ptr is not None:
            b_ga = b_towards + along_a[:, None] * b_a
            o_ga = o_row[:, None] * width + o_col
            tl.store(a_gradient_ptr + o_ga, b_ga.to(a_gradient_ptr.dtype.element_ty), mask=m_row[:, None] & m_col)
        if b_gradient_ptr is not None:
            b_gb = along_b[:, None] * b_b - b_towards
            o_gb = o_row[:, None] * width + o_col
            tl.store(b_gradient_ptr + o_gb, b_gb.to(b_gradient_ptr.dtype.element_ty), mask=m_row[:, None] & m_col)
