"""Gradients of divergences over the whole vocabulary: one read of both sides, one write per side.

``divergence_backward``  ∂/∂x = Σ upstream·(A − p·ΣA) / T and ∂/∂y = Σ upstream·(B − q·ΣB) / T, all kinds at once, from
                         the row scalars of ``divergence_forward``.

The side towards which a row's partial is infinite gets gradient 0 there; masked rows are not read and get zeros.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import fast_log2
from ._divergence_launch import (
    CROSS_ENTROPY,
    FORWARD_KL,
    HELLINGER,
    JEFFREYS,
    JENSEN_SHANNON,
    LABEL_CROSS_ENTROPY,
    LOG2_E,
    REVERSE_KL,
    SKEW_FORWARD,
    SKEW_REVERSE,
    TOTAL_VARIATION,
    kind_bits,
    labels_of,
    positions,
    row_count,
    rows_of,
    temperature_rows,
    tile,
)
from ._divergence_terms import (
    LN2,
    TINY,
    bits_per_unit,
    clamped,
    difference_of,
    joint_offsets,
    mixture,
    offsets,
    probabilities,
    sign_of,
    skew_partials,
    squares,
)
from ._rows import LAUNCH_OPTIONS, on_device_of, row_layout, row_start


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
    labels: Tensor | None = None,
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
        labels: as in ``divergence_forward``.
    """
    contiguous = torch.contiguous_format
    noisy_gradient = torch.empty_like(noisy, memory_format=contiguous) if needs_noisy else None
    clean_gradient = torch.empty_like(clean, memory_format=contiguous) if needs_clean else None
    rows, width = row_count(noisy), noisy.shape[-1]
    if rows > 0 and (needs_noisy or needs_clean):
        sizes = tile(noisy, clean, len(kinds), backward=True)
        with on_device_of(noisy):
            _backward_kernel[(rows, triton.cdiv(width, sizes["BV"]))](
                noisy,
                clean,
                labels_of(labels),
                rows_of(mask),
                *temperature_rows(temperature),
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
                *positions(kinds),
                KINDS=kind_bits(kinds),
                SKEWED=skew > 0,
                EXACT=torch.float32 in (noisy.dtype, clean.dtype),
                **sizes,
                **LAUNCH_OPTIONS,
            )
    return noisy_gradient, clean_gradient


@triton.jit
def _coefficients(upstream_ptr, scalars_ptr, i_kind, field, i_row, m_read):
    """Upstream towards log p and log q, 0 where the row's partial is infinite, and what they take off."""
    g = tl.load(upstream_ptr + i_kind * field + i_row, mask=m_read, other=0.0)
    to_p = tl.load(scalars_ptr + (4 + 2 * i_kind) * field + i_row, mask=m_read, other=0.0)
    to_q = tl.load(scalars_ptr + (5 + 2 * i_kind) * field + i_row, mask=m_read, other=0.0)
    p_finite, q_finite = tl.abs(to_p) < float("inf"), tl.abs(to_q) < float("inf")
    g_p, g_q = tl.where(p_finite, g, 0.0), tl.where(q_finite, g, 0.0)
    return g_p, g_q, tl.where(p_finite, g * to_p, 0.0), tl.where(q_finite, g * to_q, 0.0)


@triton.jit
def _log_ratios_to_mixture(b_p, b_q, b_log_p, b_log_q, b_d, b_difference, beta, EXACT: tl.constexpr):
    """log2 of P and of Q over beta·Q + (1 − beta)·P; exactly 0 where the sides are equal."""
    if EXACT:
        b_log_m, _ = mixture(b_p, b_q, b_d, b_difference, beta)  # over the larger side
        b_to_p, b_to_q = tl.minimum(b_d, 0.0) - b_log_m, tl.minimum(-b_d, 0.0) - b_log_m
    else:
        b_log_m = fast_log2(tl.fma(b_p, 1.0 - beta, tl.fma(b_q, beta, TINY)))
        b_to_p = tl.where(b_d == 0, 0.0, clamped(b_log_p - b_log_m))
        b_to_q = tl.where(b_d == 0, 0.0, clamped(b_log_q - b_log_m))
    return b_to_p, b_to_q


@triton.jit
def _label_gradient(b_x, m_a, o_col, label_ptr, upstream_ptr, scalars_ptr, i_kind, field, i_row, m_read):
    """upstream · (softmax − 1 at the label), at temperature 1; 0 where the label is ignored."""
    g = tl.load(upstream_ptr + i_kind * field + i_row, mask=m_read, other=0.0)
    s = tl.load(scalars_ptr + (4 + 2 * i_kind) * field + i_row, mask=m_read, other=1.0)
    label = tl.load(label_ptr + i_row, mask=m_read, other=-1)
    b_p = tl.exp2(tl.fma(b_x, LOG2_E, -m_a * LOG2_E)) / tl.where((s > 0) & (s < float("inf")), s, float("nan"))
    return tl.where(label >= 0, g * (b_p - (o_col == label).to(tl.float32)), 0.0)


@triton.jit(
    do_not_specialize=[
        *("rows", "t_step", "a_inner", "b_inner", "beta", "skew"),
        *("i_fkl", "i_rkl", "i_jef", "i_js", "i_tv", "i_h", "i_ce", "i_sf", "i_sr", "i_label"),
    ]
)
def _backward_kernel(
    a_ptr,
    b_ptr,
    label_ptr,
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
    i_label,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    EXACT: tl.constexpr,
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
    c_a, c_b, correction = joint_offsets(m_a, s_a, m_b, s_b, slope)
    rescale = tl.exp2(correction)
    b_log_p, b_log_q, b_u, b_v = probabilities(b_x, b_y, (slope, c_a, c_b, rescale), KINDS)
    b_p, b_q = squares(b_u, b_v, KINDS)
    # Its sign is the one that forward summed by.
    b_apart = tl.fma(b_p, rescale, -b_q)
    b_p *= rescale
    b_log_p = tl.fma(b_log_p, bits_per_unit(KINDS), correction)
    b_log_q *= bits_per_unit(KINDS)
    # A product with a clamped ratio is 0 where the probability is, and is multiplied by 0 in rows that are infinite.
    if EXACT:
        _, _, gap, shift = offsets(m_a, s_a, m_b, s_b, slope)
        b_d = clamped(tl.fma((b_x - b_y) - gap, slope, -shift))
        b_difference = difference_of(b_p, b_q, b_d)
    else:
        b_d = clamped(b_log_p - b_log_q)
        b_difference = b_apart

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
        b_bits = clamped(tl.log2(s_b) - b_log_p)
        b_b += b_q * b_bits * (g_ce * LN2)
    if JENSEN_SHANNON & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_js, field, i_row, m_read)
        b_to_p, b_to_q = _log_ratios_to_mixture(b_p, b_q, b_log_p, b_log_q, b_d, b_difference, beta, EXACT)
        b_a += b_p * (b_to_p * (g_p * (1.0 - beta) * LN2) - sum_p)
        b_b += b_q * (b_to_q * (g_q * beta * LN2) - sum_q)
    if TOTAL_VARIATION & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_tv, field, i_row, m_read)
        b_a += 0.5 * g_p * sign_of(b_apart, b_p) - sum_p * b_p
        b_b -= 0.5 * g_q * sign_of(b_apart, b_q) + sum_q * b_q
    if HELLINGER & KINDS:
        g_p, g_q, sum_p, sum_q = _coefficients(upstream_ptr, scalars_ptr, i_h, field, i_row, m_read)
        b_u *= tl.sqrt(rescale)
        b_roots_apart = b_difference / tl.maximum(b_u + b_v, TINY) if EXACT else b_u - b_v
        b_a += b_u * (0.5 * g_p * b_roots_apart - sum_p * b_u)
        b_b -= b_v * (0.5 * g_q * b_roots_apart + sum_q * b_v)
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
        b_a = tl.zeros([BV], tl.float32) if KINDS == LABEL_CROSS_ENTROPY else b_a * rate
        if LABEL_CROSS_ENTROPY & KINDS:
            b_a += _label_gradient(b_x, m_a, o_col, label_ptr, upstream_ptr, scalars_ptr, i_label, field, i_row, m_read)
        b_a = tl.where(m_read, b_a, 0.0)
        tl.store(a_gradient_ptr + i_row * width + o_col, b_a.to(a_gradient_ptr.dtype.element_ty), mask=m_col)
    if b_gradient_ptr is not None:
        b_b = tl.where(m_read, b_b * rate, 0.0)
        tl.store(b_gradient_ptr + i_row * width + o_col, b_b.to(b_gradient_ptr.dtype.element_ty), mask=m_col)
