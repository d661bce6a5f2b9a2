"""Gradients of divergences over the union of both sides' top-k.

Outside the support a gradient is a constant of the row times the logit's probability (``truncate``), the constant times
the logit's share of the tail (``tail``), or 0 (``renormalize``). One launch per side writes these gradients. The launch
reads its own side if probabilities are needed, and never the other side. A second launch overwrites the gradients
inside the support, O(k) a row.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import LAUNCH_OPTIONS, mask_rows, on_device_of, required_layout, row_count, row_start
from .atoms import (
    RENORMALIZE,
    ROW_SCALARS,
    SUPPORTS,
    TAIL,
    atoms,
    finite_or_zero,
    load_support,
    rows_and_atoms,
    term_and_partials,
)
from .kinds import DIVERGENCE_COUNT, acting_kind, asked, kind_bits, place_of, places_of
from .terms import LOG2_E, reference
from .tiles import temperature_rows, weights_of

_FIRST_FIELDS = tl.constexpr(ROW_SCALARS)


def divergence_topk_backward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    upstream: Tensor,
    union: Tensor,
    row_scalars: Tensor,
    support: str,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    needs_noisy: bool,
    needs_clean: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients to ``noisy`` and ``clean`` that are needed, contiguous.

    Args:
        noisy: as in ``divergence_topk_forward``.
        clean: as in ``divergence_topk_forward``.
        mask: as in ``divergence_topk_forward``.
        temperature: as in ``divergence_topk_forward``.
        upstream: (kinds, ...) float32, the gradient of the values.
        union: indices from ``divergence_topk_forward``.
        row_scalars: from ``divergence_topk_forward``.
        support: as in ``divergence_topk_forward``.
        kinds: as in ``divergence_topk_forward``.
        beta: as in ``divergence_topk_forward``.
        skew: as in ``divergence_topk_forward``.
        needs_noisy: whether to compute the gradient to ``noisy``.
        needs_clean: whether to compute the gradient to ``clean``.
    """
    rows, width = row_count(noisy), noisy.shape[-1]
    upstream, row_scalars, union = upstream.contiguous(), row_scalars.contiguous(), union.contiguous()
    gradients: list[Tensor | None] = [None, None]
    with on_device_of(noisy):
        for i, (side, needed) in enumerate(((noisy, needs_noisy), (clean, needs_clean))):
            if needed:
                gradients[i] = torch.empty_like(side, memory_format=torch.contiguous_format)
            if needed and rows > 0:
                columns = min(max(triton.next_power_of_2(width), 256), 2**13 // side.element_size())
                _outside_kernel[(rows, triton.cdiv(width, columns))](
                    side,
                    mask_rows(mask),
                    *temperature_rows(temperature),
                    upstream,
                    row_scalars,
                    gradients[i],
                    rows,
                    width,
                    len(kinds),
                    *required_layout(side),
                    SIDE=i,
                    SUPPORT=SUPPORTS.index(support),
                    BV=columns,
                    num_warps=max(1, columns * side.element_size() // 1024),
                    **LAUNCH_OPTIONS,
                )
        if rows > 0 and (needs_noisy or needs_clean):
            tile = rows_and_atoms(union.shape[-1])
            _inside_kernel[(triton.cdiv(rows, tile["BN"]),)](
                noisy,
                clean,
                mask_rows(mask),
                *temperature_rows(temperature),
                upstream,
                union,
                row_scalars,
                *gradients,
                rows,
                width,
                union.shape[-1],
                *required_layout(noisy),
                *required_layout(clean),
                weights_of(beta),
                weights_of(skew),
                places_of(kinds),
                KINDS=kind_bits(kinds),
                SKEWED=skew > 0,
                SUPPORT=SUPPORTS.index(support),
                **tile,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return gradients[0], gradients[1]


@triton.jit(do_not_specialize=["t_step", "rows", "kinds", "inner"])
def _outside_kernel(
    x_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    upstream_ptr,
    scalars_ptr,
    gradient_ptr,
    rows,
    width,
    kinds,
    inner,
    strides,
    SIDE: tl.constexpr,
    SUPPORT: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    field = rows.to(tl.int64)
    o_col = tl.program_id(1) * BV + tl.arange(0, BV)
    b_gradient = tl.zeros([BV], tl.float32)
    if SUPPORT != RENORMALIZE:
        m_read = i_row < rows
        if mask_ptr is not None:
            m_read = tl.load(mask_ptr + i_row) != 0
        temperature = tl.load(t_ptr + i_row * t_step)
        slope = LOG2_E / temperature
        o_kind = tl.arange(0, 16)
        m_kind = o_kind < tl.where(m_read, kinds, 0)
        b_g = tl.load(upstream_ptr + o_kind * field + i_row, mask=m_kind, other=0.0)
        o_field = _FIRST_FIELDS + SIDE + 2 * o_kind
        b_g *= tl.load(scalars_ptr + o_field * field + i_row, mask=m_kind, other=0.0)
        whole = scalars_ptr + (2 * SIDE + (4 if SUPPORT == TAIL else 0)) * field + i_row
        maximum, total = tl.load(whole, mask=m_read, other=0.0), tl.load(whole + field, mask=m_read, other=1.0)
        row_total = tl.load(scalars_ptr + (2 * SIDE + 1) * field + i_row, mask=m_read, other=1.0)
        # With an empty tail, every logit outside the support has weight 0.
        rate = tl.where(total > 0, tl.sum(b_g) / (total * temperature), 0.0)
        rate = tl.where(row_total == row_total, rate, float("nan"))
        x_row = x_ptr + row_start(i_row, inner, strides)
        m_tile = o_col < tl.where(m_read, width, 0)
        b_x = tl.load(x_row + o_col, mask=m_tile, other=float("-inf")).to(tl.float32)
        b_gradient = tl.exp2(tl.fma(b_x, slope, -reference(maximum, slope))) * rate
        b_gradient = tl.where(m_read, b_gradient, 0.0)
    b_gradient = b_gradient.to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + i_row * width + o_col, b_gradient, mask=o_col < width)


@triton.jit(do_not_specialize=["rows", "t_step", "size", "a_inner", "b_inner", "places"])
def _inside_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    upstream_ptr,
    union_ptr,
    scalars_ptr,
    a_gradient_ptr,
    b_gradient_ptr,
    rows,
    width,
    size,
    a_inner,
    a_strides,
    b_inner,
    b_strides,
    betas,
    skews,
    places: tl.int64,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    SUPPORT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    o_row = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    field = rows.to(tl.int64)
    m_read = o_row < rows
    if mask_ptr is not None:
        m_read &= tl.load(mask_ptr + o_row, mask=m_read, other=0) != 0
    temperature = tl.load(t_ptr + o_row * t_step, mask=m_read, other=1.0)
    slope = LOG2_E / temperature
    a_row = a_ptr + row_start(o_row, a_inner, a_strides)
    b_row = b_ptr + row_start(o_row, b_inner, b_strides)
    b_index, b_x, b_y = load_support(union_ptr, o_row, m_read, size, a_row, b_row, BK)
    m_a = tl.load(scalars_ptr + o_row, mask=m_read, other=0.0)
    s_a = tl.load(scalars_ptr + field + o_row, mask=m_read, other=1.0)
    m_b = tl.load(scalars_ptr + 2 * field + o_row, mask=m_read, other=0.0)
    s_b = tl.load(scalars_ptr + 3 * field + o_row, mask=m_read, other=1.0)
    r_a = tl.load(scalars_ptr + 4 * field + o_row, mask=m_read, other=0.0)
    t_a = tl.load(scalars_ptr + 5 * field + o_row, mask=m_read, other=0.0)
    r_b = tl.load(scalars_ptr + 6 * field + o_row, mask=m_read, other=0.0)
    t_b = tl.load(scalars_ptr + 7 * field + o_row, mask=m_read, other=0.0)
    b_p, b_q, b_d, b_log_p, _ = atoms(b_x, b_y, m_a, s_a, m_b, s_b, r_a, t_a, r_b, t_b, slope, size, SUPPORT, BK)
    b_a, b_b = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BK], tl.float32)
    for i in tl.static_range(DIVERGENCE_COUNT):
        if asked(KINDS, i):
            place = place_of(places, i)
            g = tl.load(upstream_ptr + place * field + o_row, mask=m_read, other=0.0)
            _, b_to_p, b_to_q = term_and_partials(b_p, b_q, b_d, b_log_p, betas, skews, acting_kind(i, SKEWED), SUPPORT)
            b_to_p, p_total = finite_or_zero(b_to_p)
            b_to_q, q_total = finite_or_zero(b_to_q)
            b_a += g * (b_to_p - b_p * p_total)
            b_b += g * (b_to_q - b_q * q_total)
    m_inside = b_index >= 0
    valid = s_a == s_a
    if a_gradient_ptr is not None:
        b_a = tl.where(valid, b_a / temperature, float("nan")).to(a_gradient_ptr.dtype.element_ty)
        tl.store(a_gradient_ptr + o_row * width + b_index, b_a, mask=m_inside)
    if b_gradient_ptr is not None:
        b_b = tl.where(valid, b_b / temperature, float("nan")).to(b_gradient_ptr.dtype.element_ty)
        tl.store(b_gradient_ptr + o_row * width + b_index, b_b, mask=m_inside)
