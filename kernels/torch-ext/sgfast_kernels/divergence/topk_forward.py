"""Divergences over the union of both sides' top-k: one read of each side (``topk_select``), then O(k) a row.

``divergence_topk_forward``  values (kinds, ...), the support's indices (..., min(2k, V)), and row scalars
                             (8 + 2·kinds, ...) for backward: m_x, S_x, m_y, S_y over what the support normalises by;
                             the same of the tails, 0 where there is none; then per kind and side the gradient of a
                             logit outside the support, in units of its share of the tail (``tail``) or of its
                             probability (``truncate``).

The tail of a side is the sum of its weights outside its own top-k, less the weights that the other side's top-k takes.
If an eighth or less would be left, the difference would lose digits. The row is then read once more. −inf, NaN and
masked rows are as in ``forward``.
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
    TRUNCATE,
    atoms,
    finite_or_zero,
    load_support,
    rows_and_atoms,
    term_and_partials,
)
from .kinds import DIVERGENCE_COUNT, acting_kind, asked, kind_bits, place_of, places_of, signed
from .terms import LOG2_E, reference
from .tiles import temperature_rows, weights_of
from .topk_select import MASSES, top_k_union

_FIELDS = tl.constexpr(MASSES)
_FIRST_FIELDS = tl.constexpr(ROW_SCALARS)


def divergence_topk_forward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    top_k: int,
    support: str,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    top_k_of: str = "both",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, indices (int32, ascending, then −1) and row scalars (see the module).

    Args:
        noisy: as in ``top_k_union``.
        clean: as in ``top_k_union``.
        mask: as in ``top_k_union``.
        temperature: as in ``top_k_union``.
        top_k: as in ``top_k_union``.
        support: what the restriction means, one of ``SUPPORTS``.
        kinds: names among ``KINDS``, each once; any number in one launch.
        beta: weight of the clean side in the Jensen–Shannon mixture.
        skew: weight of the first side in the mixtures of the skew kinds.
        top_k_of: as in ``top_k_union``.
    """
    rows, width, shape = row_count(noisy), noisy.shape[-1], noisy.shape[:-1]
    row_scalars = noisy.new_empty((ROW_SCALARS + 2 * len(kinds), *shape), dtype=torch.float32)
    values = noisy.new_empty((len(kinds), *shape), dtype=torch.float32)
    union, masses = top_k_union(noisy, clean, mask, temperature, top_k, top_k_of)
    if rows > 0:
        tile = rows_and_atoms(union.shape[-1])
        with on_device_of(noisy):
            _forward_kernel[(triton.cdiv(rows, tile["BN"]),)](
                noisy,
                clean,
                mask_rows(mask),
                *temperature_rows(temperature),
                masses,
                union,
                values,
                row_scalars,
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
                BV=1024 // tile["BN"],
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return values, union, row_scalars


@triton.jit
def _is_first(b_x, b_index, value, index):
    """True for logits in their row's top-k. The value and the index of the k-th decide."""
    return (b_x > value) | ((b_x == value) & (b_index <= index))


@triton.jit
def _tail(b_index, b_x, x_row, y_row, masses, other_masses, width, slope, BN: tl.constexpr, BV: tl.constexpr):
    """The largest logit of x outside the support, or a larger reference, and the weights outside against it."""
    _, _, r, total, value, index = masses
    _, _, _, _, other_value, other_index = other_masses
    m_taken = (b_index >= 0) & ~_is_first(b_x, b_index, value, index)
    b_taken = tl.where(m_taken, tl.exp2(tl.fma(b_x, slope, -reference(r, slope))), 0.0)
    taken = tl.sum(b_taken, axis=1, keep_dims=True)
    rest, m_again = total - taken, taken > 0.875 * total
    if tl.max(m_again.to(tl.int32)) != 0:
        o_col = tl.arange(0, BV)[None, :]
        b_m, b_s = tl.full([BN, BV], float("-inf"), tl.float32), tl.zeros([BN, BV], tl.float32)
        b_c = reference(b_m, slope)
        for i_col in range(0, width, BV):
            m_col = m_again & (i_col + o_col < width)
            b_a = tl.load(x_row + i_col + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
            b_b = tl.load(y_row + i_col + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
            m_first = _is_first(b_a, i_col + o_col, value, index)
            m_first |= _is_first(b_b, i_col + o_col, other_value, other_index)
            b_a = tl.where(m_first, float("-inf"), b_a)
            b_m = tl.maximum(b_m, b_a)
            b_next = reference(b_m, slope)
            b_s = b_s * tl.exp2(b_c - b_next) + tl.exp2(tl.fma(b_a, slope, -b_next))
            b_c = b_next
        again = tl.max(b_m, axis=1, keep_dims=True)
        b_s = b_s * tl.exp2(b_c - reference(again, slope))
        r = tl.where(m_again, again, r)
        rest = tl.where(m_again, tl.sum(b_s, axis=1, keep_dims=True), rest)
    return r, rest


@triton.jit
def _load_masses(masses_ptr, field, o_row, m_read):
    m = tl.load(masses_ptr + o_row, mask=m_read, other=0.0)
    s = tl.load(masses_ptr + field + o_row, mask=m_read, other=0.0)
    r = tl.load(masses_ptr + 2 * field + o_row, mask=m_read, other=0.0)
    total = tl.load(masses_ptr + 3 * field + o_row, mask=m_read, other=0.0)
    value = tl.load(masses_ptr + 4 * field + o_row, mask=m_read, other=0.0)
    return m, s, r, total, value, tl.load(masses_ptr + 5 * field + o_row, mask=m_read, other=0.0)


@triton.jit(do_not_specialize=["rows", "t_step", "size", "a_inner", "b_inner", "places"])
def _forward_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    t_ptr,
    t_step,
    masses_ptr,
    union_ptr,
    values_ptr,
    scalars_ptr,
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
    BV: tl.constexpr,
):
    o_row = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    field = rows.to(tl.int64)
    m_row = o_row < rows
    m_read = m_row
    if mask_ptr is not None:
        m_read = m_row & (tl.load(mask_ptr + o_row, mask=m_row, other=0) != 0)
    slope = LOG2_E / tl.load(t_ptr + o_row * t_step, mask=m_row, other=1.0)
    a_row = a_ptr + row_start(o_row, a_inner, a_strides)
    b_row = b_ptr + row_start(o_row, b_inner, b_strides)
    masses_a = _load_masses(masses_ptr, field, o_row, m_read)
    masses_b = _load_masses(masses_ptr + _FIELDS * field, field, o_row, m_read)
    b_index, b_x, b_y = load_support(union_ptr, o_row, m_read, size, a_row, b_row, BK)
    m_a, s_a, _, _, _, _ = masses_a
    m_b, s_b, _, _, _, _ = masses_b
    valid = (s_a > 0) & (s_a < float("inf")) & (s_b > 0) & (s_b < float("inf"))
    if SUPPORT == RENORMALIZE:
        # The largest logit is in the support.
        s_a = tl.sum(tl.exp2(tl.fma(b_x, slope, -reference(m_a, slope))), axis=1, keep_dims=True)
        s_b = tl.sum(tl.exp2(tl.fma(b_y, slope, -reference(m_b, slope))), axis=1, keep_dims=True)
    zero = tl.zeros([BN, 1], tl.float32)
    r_a, t_a, r_b, t_b = zero, zero, zero, zero
    if SUPPORT == TAIL:
        r_a, t_a = _tail(b_index, b_x, a_row, b_row, masses_a, masses_b, width, slope, BN, BV)
        r_b, t_b = _tail(b_index, b_y, b_row, a_row, masses_b, masses_a, width, slope, BN, BV)
    s_a, s_b = tl.where(valid, s_a, float("nan")), tl.where(valid, s_b, float("nan"))
    row_scalars = (m_a, s_a, m_b, s_b, r_a, t_a, r_b, t_b)
    for i in tl.static_range(_FIRST_FIELDS):
        tl.store(scalars_ptr + i * field + o_row, tl.where(m_read, row_scalars[i], 0.0), mask=m_row)

    b_p, b_q, b_d, b_log_p, m_tail = atoms(b_x, b_y, m_a, s_a, m_b, s_b, r_a, t_a, r_b, t_b, slope, size, SUPPORT, BK)
    for i in tl.static_range(DIVERGENCE_COUNT):
        if asked(KINDS, i):
            place = place_of(places, i)
            b_term, b_to_p, b_to_q = term_and_partials(
                b_p, b_q, b_d, b_log_p, betas, skews, acting_kind(i, SKEWED), SUPPORT
            )
            value = tl.sum(b_term, axis=1, keep_dims=True)
            if SUPPORT != TRUNCATE or not signed(i):
                value = tl.maximum(value, 0.0)  # rounding may leave the difference below 0
            value = tl.where(valid, value, float("nan"))
            tl.store(values_ptr + place * field + o_row, tl.where(m_read, value, 0.0), mask=m_row)
            b_to_p, p_total = finite_or_zero(b_to_p)
            b_to_q, q_total = finite_or_zero(b_to_q)
            if SUPPORT == TRUNCATE:
                to_p, to_q = -p_total, -q_total
            elif SUPPORT == TAIL:
                to_p = tl.sum(tl.where(m_tail, b_to_p - b_p * p_total, 0.0), axis=1, keep_dims=True)
                to_q = tl.sum(tl.where(m_tail, b_to_q - b_q * q_total, 0.0), axis=1, keep_dims=True)
            else:
                to_p, to_q = zero, zero
            o_field = scalars_ptr + (_FIRST_FIELDS + 2 * place) * field + o_row
            tl.store(o_field, tl.where(m_read, to_p, 0.0), mask=m_row)
            tl.store(o_field + field, tl.where(m_read, to_q, 0.0), mask=m_row)
