"""Gradients of divergences over the whole vocabulary: one read of both sides, one write per side.

``divergence_backward``  ∂/∂x = Σ upstream·(A − p·ΣA) / T and ∂/∂y = Σ upstream·(B − q·ΣB) / T, all kinds at once, from
                         the row scalars of ``divergence_forward``.

If a row's partial towards a side is infinite, this side's gradient is 0 in the row. Masked rows are not read and get
zeros.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import fast_log2
from .._rows import LAUNCH_OPTIONS, mask_rows, on_device_of, required_layout, row_count, row_start, to_float32
from .kinds import (
    CROSS_ENTROPY,
    DIVERGENCE_COUNT,
    HELLINGER,
    JENSEN_SHANNON,
    LABEL_CROSS_ENTROPY,
    SKEW_FORWARD,
    SKEW_REVERSE,
    SUM_P_RATIO,
    SUM_Q_RATIO,
    TOTAL_VARIATION,
    any_divergence,
    asked,
    kind_bits,
    needed,
    place_of,
    places_of,
    reads,
)
from .lse import LSE_FIELDS
from .terms import (
    LN2,
    LOG2_E,
    TINY,
    bits_per_unit,
    clamped,
    difference_of,
    joint_offsets,
    log2_quotient,
    mixture,
    offsets,
    probabilities,
    sign_of,
    skew_partials,
    squares,
)
from .tiles import label_rows, split_rows, temperature_rows, tile, weights_of

# A program's work per row costs as much as twenty columns of each thread; a tile has 16 columns of each thread.
_TILES_EACH = 4
_LSE_FIELDS = tl.constexpr(LSE_FIELDS)


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
    targets: tuple[Tensor | None, Tensor | None] = (None, None),
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
        targets: contiguous places for the gradients; None for new tensors. A place may be the side itself, if the side
            is contiguous: a program loads its tile of both sides before it stores the tile's gradients.
    """
    noisy_gradient, clean_gradient = (
        (torch.empty_like(side, memory_format=torch.contiguous_format) if target is None else target)
        if needed
        else None
        for side, target, needed in zip((noisy, clean), targets, (needs_noisy, needs_clean), strict=True)
    )
    rows, width = row_count(noisy), noisy.shape[-1]
    if rows > 0 and (needs_noisy or needs_clean):
        sizes = tile(noisy, clean, len(kinds), backward=True)
        _, span = split_rows(noisy, rows, sizes["BV"])
        span = min(span, _TILES_EACH * sizes["BV"])
        with on_device_of(noisy):
            _backward_kernel[(rows, triton.cdiv(width, span))](
                noisy,
                clean,
                label_rows(labels),
                mask_rows(mask),
                *temperature_rows(temperature),
                upstream.contiguous(),
                row_scalars.contiguous(),
                noisy_gradient,
                clean_gradient,
                rows,
                width,
                span,
                *required_layout(noisy),
                *required_layout(clean),
                weights_of(beta),
                weights_of(skew),
                places_of(kinds),
                KINDS=kind_bits(kinds),
                SKEWED=skew > 0,
                EXACT=torch.float32 in (noisy.dtype, clean.dtype),
                **sizes,
                **LAUNCH_OPTIONS,
            )
    return noisy_gradient, clean_gradient


@triton.jit
def _coefficients(upstream_ptr, scalars_ptr, places, field, i_row, rate, KINDS: tl.constexpr, SKEWED: tl.constexpr):
    """Row scalars of the gradients p·(a₀ + a₁ d) + a₂ (p − q) + … and q·(b₀ + b₁ d) + b₂ (p − q) + …, times ``rate``.

    Returns a and b, and for each kind its upstream towards log p and log q: 0 where the row's partial is infinite.
    """
    a_0, a_1, a_2, b_0, b_1, b_2 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    upstream = ()
    for i in tl.static_range(DIVERGENCE_COUNT):
        g_p, g_q = 0.0, 0.0
        if asked(KINDS, i):
            place = place_of(places, i)
            o_field = scalars_ptr + (_LSE_FIELDS + 2 * place) * field + i_row
            g = tl.load(upstream_ptr + place * field + i_row)
            to_p, to_q = tl.load(o_field), tl.load(o_field + field)
            p_finite, q_finite = tl.abs(to_p) < float("inf"), tl.abs(to_q) < float("inf")
            g_p, g_q = tl.where(p_finite, g, 0.0) * rate, tl.where(q_finite, g, 0.0) * rate
            a_0 -= tl.where(p_finite, g * to_p, 0.0) * rate
            b_0 -= tl.where(q_finite, g * to_q, 0.0) * rate
            # A kind with the terms P·d has the partial p·d to log p, and a multiple of p − q to log q. With the terms
            # Q·d the two sides are exchanged.
            if reads(i, SKEWED, SUM_Q_RATIO) or i == CROSS_ENTROPY:
                a_2 += g_p
            if reads(i, SKEWED, SUM_P_RATIO):
                a_1 += g_p * LN2
                b_2 -= g_q
            if reads(i, SKEWED, SUM_Q_RATIO):
                b_1 -= g_q * LN2
        upstream += ((g_p, g_q),)  # type: ignore[assignment]
    return (a_0, a_1, a_2), (b_0, b_1, b_2), upstream


@triton.jit
def _log_ratios_to_mixture(b_p, b_q, b_log_p, b_log_q, b_d, b_difference, beta, EXACT: tl.constexpr):
    """log2 of P and of Q over the mixture of weights ``beta``; exactly 0 where the sides are equal."""
    if EXACT:
        b_log_m, _ = mixture(b_p, b_q, b_d, b_difference, beta)  # over the larger side
        b_to_p, b_to_q = tl.minimum(b_d, 0.0) - b_log_m, tl.minimum(-b_d, 0.0) - b_log_m
    else:
        b_log_m = fast_log2(tl.fma(b_p, beta[1], tl.fma(b_q, beta[0], TINY)))
        b_to_p = tl.where(b_d == 0, 0.0, clamped(b_log_p - b_log_m))
        b_to_q = tl.where(b_d == 0, 0.0, clamped(b_log_q - b_log_m))
    return b_to_p, b_to_q


@triton.jit
def _gradients(
    b_x,
    b_y,
    row,
    a,
    b,
    upstream,
    beta,
    skew,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Both sides' gradients of all kinds but that of labels."""
    slope, c_a, c_b, rescale, correction, ratio_row, log_s_b = row
    b_log_p, b_log_q, b_u, b_v = probabilities(b_x, b_y, (slope, c_a, c_b, rescale), KINDS)
    b_p, b_q = squares(b_u, b_v, KINDS)
    # Forward has taken the signs of its terms from this difference.
    b_apart = tl.fma(b_p, rescale, -b_q)
    b_p *= rescale
    b_log_p = tl.fma(b_log_p, bits_per_unit(KINDS), correction)
    b_log_q *= bits_per_unit(KINDS)
    # A product with a clamped ratio is 0 where the probability is 0. In infinite rows the product is multiplied by 0.
    if EXACT:
        b_d = clamped(log2_quotient(b_x, b_y, ratio_row))
        b_difference = difference_of(b_p, b_q, b_d)
    else:
        b_d = clamped(b_log_p - b_log_q)
        b_difference = b_apart

    # Terms that no kind needs are left out. The compiler would keep a product 0 · d, which might be NaN.
    b_to_p, b_to_q = a[0], b[0]
    if needed(KINDS, SKEWED, SUM_P_RATIO):
        b_to_p += b_d * a[1]
    if needed(KINDS, SKEWED, SUM_Q_RATIO):
        b_to_q += b_d * b[1]
    if asked(KINDS, CROSS_ENTROPY):
        b_to_q += clamped(log_s_b - b_log_p) * (upstream[CROSS_ENTROPY][1] * LN2)
    if asked(KINDS, JENSEN_SHANNON):
        b_p_over_m, b_q_over_m = _log_ratios_to_mixture(b_p, b_q, b_log_p, b_log_q, b_d, b_difference, beta, EXACT)
        b_to_p += b_p_over_m * (upstream[JENSEN_SHANNON][0] * beta[1] * LN2)
        b_to_q += b_q_over_m * (upstream[JENSEN_SHANNON][1] * beta[0] * LN2)
    b_a, b_b = b_p * b_to_p, b_q * b_to_q
    if needed(KINDS, SKEWED, SUM_Q_RATIO) or asked(KINDS, CROSS_ENTROPY):
        b_a += b_difference * a[2]
    if needed(KINDS, SKEWED, SUM_P_RATIO):
        b_b += b_difference * b[2]
    if asked(KINDS, TOTAL_VARIATION):
        b_a += sign_of(b_apart, b_p) * (0.5 * upstream[TOTAL_VARIATION][0])
        b_b -= sign_of(b_apart, b_q) * (0.5 * upstream[TOTAL_VARIATION][1])
    if asked(KINDS, HELLINGER):
        b_u *= tl.sqrt(rescale)
        b_roots_apart = b_difference / tl.maximum(b_u + b_v, TINY) if EXACT else b_u - b_v
        b_a += b_u * b_roots_apart * (0.5 * upstream[HELLINGER][0])
        b_b -= b_v * b_roots_apart * (0.5 * upstream[HELLINGER][1])
    if asked(KINDS, SKEW_FORWARD) and SKEWED:
        _, b_partial_p, b_partial_q = skew_partials(b_p, b_q, b_d, b_difference, skew)
        b_a += b_partial_p * upstream[SKEW_FORWARD][0]
        b_b += b_partial_q * upstream[SKEW_FORWARD][1]
    if asked(KINDS, SKEW_REVERSE) and SKEWED:
        _, b_partial_q, b_partial_p = skew_partials(b_q, b_p, -b_d, -b_difference, skew)
        b_a += b_partial_p * upstream[SKEW_REVERSE][0]
        b_b += b_partial_q * upstream[SKEW_REVERSE][1]
    return b_a, b_b


@triton.jit
def _store(gradient_ptr, b_gradient, o_col, width):
    tl.store(gradient_ptr + o_col, b_gradient.to(gradient_ptr.dtype.element_ty), mask=o_col < width)


@triton.jit(do_not_specialize=["rows", "t_step", "a_inner", "b_inner", "places"])
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
    span,
    a_inner,
    a_strides,
    b_inner,
    b_strides,
    betas,
    skews,
    places: tl.int64,
    KINDS: tl.constexpr,
    SKEWED: tl.constexpr,
    EXACT: tl.constexpr,
    BV: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    field = rows.to(tl.int64)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, width)
    if a_gradient_ptr is not None:
        a_gradient_ptr += i_row * width
    if b_gradient_ptr is not None:
        b_gradient_ptr += i_row * width
    selected = 1
    if mask_ptr is not None:
        selected = tl.load(mask_ptr + i_row)
    if selected == 0:
        for i_col in range(start, stop, BV):
            o_col = i_col + tl.arange(0, BV)
            if a_gradient_ptr is not None:
                _store(a_gradient_ptr, tl.zeros([BV], tl.float32), o_col, width)
            if b_gradient_ptr is not None:
                _store(b_gradient_ptr, tl.zeros([BV], tl.float32), o_col, width)
        return
    a_row = a_ptr + row_start(i_row, a_inner, a_strides)
    b_row = b_ptr + row_start(i_row, b_inner, b_strides)
    temperature = tl.load(t_ptr + i_row * t_step)
    slope = LOG2_E / temperature
    m_a, s_a = tl.load(scalars_ptr + i_row), tl.load(scalars_ptr + field + i_row)
    m_b, s_b = tl.load(scalars_ptr + 2 * field + i_row), tl.load(scalars_ptr + 3 * field + i_row)
    c_a, c_b, correction = joint_offsets(m_a, s_a, m_b, s_b, slope)
    _, _, ratio_row = offsets(m_a, s_a, m_b, s_b, slope)
    row = (slope, c_a, c_b, tl.exp2(correction), correction, ratio_row, tl.log2(s_b))
    valid = (s_a > 0) & (s_a < float("inf")) & (s_b > 0) & (s_b < float("inf"))
    rate = tl.where(valid, 1.0 / (s_b * temperature), float("nan"))
    a, b, upstream = _coefficients(upstream_ptr, scalars_ptr, places, field, i_row, rate, KINDS, SKEWED)
    label, label_upstream, label_rate = -1, 0.0, 0.0
    if asked(KINDS, LABEL_CROSS_ENTROPY):
        label = tl.maximum(tl.minimum(tl.load(label_ptr + i_row), width), -1).to(tl.int32)
        place = place_of(places, LABEL_CROSS_ENTROPY)
        label_upstream = tl.load(upstream_ptr + place * field + i_row)
        s = tl.load(scalars_ptr + (_LSE_FIELDS + 2 * place) * field + i_row)
        label_rate = label_upstream / tl.where((s > 0) & (s < float("inf")), s, float("nan"))

    for i_col in range(start, stop, BV):
        o_col = i_col + tl.arange(0, BV)
        # Columns beyond the row are not stored.
        b_x = to_float32(tl.load(a_row + o_col, mask=o_col < width))
        b_y = to_float32(tl.load(b_row + o_col, mask=o_col < width))
        b_a, b_b = tl.zeros([BV], tl.float32), tl.zeros([BV], tl.float32)
        if any_divergence(KINDS):
            b_a, b_b = _gradients(b_x, b_y, row, a, b, upstream, betas, skews, KINDS, SKEWED, EXACT)
        if asked(KINDS, LABEL_CROSS_ENTROPY):
            # upstream · (softmax − 1 at the label), at temperature 1.
            b_label = tl.exp2(tl.fma(b_x, LOG2_E, -m_a * LOG2_E)) * label_rate
            b_label -= tl.where(o_col == label, label_upstream, 0.0)
            b_a += tl.where(label >= 0, b_label, 0.0)
        if a_gradient_ptr is not None:
            _store(a_gradient_ptr, b_a, o_col, width)
        if b_gradient_ptr is not None:
            _store(b_gradient_ptr, b_b, o_col, width)
