r"""Distances between two sets of hidden states, per position, from one read of each.

For rows a (noisy) and b (clean) of width D:

    l2                 ‖a − b‖
    normalized_l2      ‖a − b‖ / max(‖b‖, eps)
    cosine_distance    1 − cos(a, b) = (‖a−b‖² − (‖a‖−‖b‖)²) / (2‖a‖‖b‖),  ‖a‖−‖b‖ = Σ(a−b)(a+b) / (‖a‖+‖b‖)
    cosine_similarity  1 − cosine_distance

The cosine is formed from differences because 1 − a·b/(‖a‖‖b‖) has lost all its digits when a ≈ b, which is where
distillation spends its time. Where ‖a−b‖ > min(‖a‖, ‖b‖) it is 1 − a·b/(‖a‖‖b‖) after all: there differences lose as
many digits as the norms are apart. Where a row is zero (its squared norm underflows: below 1.1e-19 in float32) the
similarity is 0 and its gradient 0; at a = b the gradient of l2 is 0. Gradients, for δ = ‖a‖−‖b‖, are combinations of
a − b and of the row itself:

    ∂cosine_distance/∂a = (a−b) / (‖a‖‖b‖) − a · (δ/(‖a‖‖b‖) + cosine_distance/‖a‖) / ‖a‖
    ∂l2/∂a = (a−b) / l2,   ∂normalized_l2/∂b = (b−a) / (l2·‖b‖) − b · l2 / ‖b‖³   (second term 0 if ‖b‖ ≤ eps)

Inputs (..., D) in float32, bfloat16, float16 or float64; arithmetic and outputs in float32 (float64 if an input is).
Kept for backward besides the inputs: four scalars a row. The Triton kernels are in ``sgfast_kernels.hidden``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows, validation
from sgfast.ops.autograd import double_backward, leave_out_unwanted
from sgfast.ops.operator import define, keep, kept


class HiddenDistances(NamedTuple):
    """Per-position distances, each of shape ``noisy.shape[:-1]``."""

    cosine_distance: Tensor
    l2: Tensor
    normalized_l2: Tensor
    cosine_similarity: Tensor


def reference(noisy: Tensor, clean: Tensor, eps: float) -> Tensor:
    """The four fields stacked in front, differentiable by autograd: (4, ...)."""
    a, b = (side.to(rows.compute_dtype(noisy, clean)) for side in (noisy, clean))
    difference = a - b
    squared_l2 = difference.square().sum(-1)
    a_norm, b_norm = _safe_sqrt(a.square().sum(-1)), _safe_sqrt(b.square().sum(-1))
    l2 = _safe_sqrt(squared_l2)
    both = _both_nonzero(a_norm, b_norm)
    norm_difference = (difference * (a + b)).sum(-1) / torch.where(both, a_norm + b_norm, 1)
    product = torch.where(both, 2 * a_norm * b_norm, 1)
    cosine_distance = (squared_l2 - norm_difference.square()) / product
    far = _far(l2, a_norm, b_norm)
    similarity = torch.where(far, 2 * (a * b).sum(-1) / product, 1 - cosine_distance)
    cosine_distance = torch.where(far, 1 - similarity, cosine_distance)
    similarity, cosine_distance = torch.where(both, similarity, 0), torch.where(both, cosine_distance, 1)
    return torch.stack([cosine_distance, l2, l2 / b_norm.clamp(min=eps), similarity])


def _far(l2: Tensor, a_norm: Tensor, b_norm: Tensor) -> Tensor:
    """Where the rows are farther from each other than one of them from 0."""
    return l2 > torch.minimum(a_norm, b_norm)


def _safe_sqrt(squares: Tensor) -> Tensor:
    """√ with gradient 0 at 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def _both_nonzero(a_norm: Tensor, b_norm: Tensor) -> Tensor:
    """Where both squared norms are normal numbers, so that they have digits and 1/(‖a‖‖b‖) is finite."""
    tiny = torch.finfo(a_norm.dtype).tiny
    return (a_norm.square() >= tiny) & (b_norm.square() >= tiny)


def _forward_rows(noisy: Tensor, clean: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rows, D) twice → values (4, rows) and the row scalars (4, rows) that backward needs."""
    a, b = (side.to(rows.compute_dtype(noisy, clean)) for side in (noisy, clean))
    difference = a - b
    # sum() adds in pairs; vector_norm and vecdot add in sequence, which costs a digit by D = 16384.
    l2, a_norm, b_norm = (side.square().sum(-1).sqrt() for side in (difference, a, b))
    both = _both_nonzero(a_norm, b_norm)
    norm_difference = (difference * (a + b)).sum(-1) / torch.where(both, a_norm + b_norm, 1)
    norm_difference = torch.where(both, norm_difference, 0)
    # The numerator is ≥ 0 by the triangle inequality; rounding may leave −1 ulp.
    numerator = (l2.square() - norm_difference.square()).clamp(min=0)
    product = torch.where(both, 2 * a_norm * b_norm, 1)
    cosine_distance = numerator / product
    far = _far(l2, a_norm, b_norm)
    similarity = torch.where(far, (2 * (a * b).sum(-1) / product).clamp(-1, 1), 1 - cosine_distance)
    cosine_distance = torch.where(far, 1 - similarity, cosine_distance)
    similarity, cosine_distance = torch.where(both, similarity, 0), torch.where(both, cosine_distance, 1)
    values = torch.stack([cosine_distance, l2, l2 / b_norm.clamp(min=eps), similarity])
    return values, torch.stack([l2, a_norm, b_norm, norm_difference])


def _row_coefficients(upstream: Tensor, row_scalars: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(t, r, s) of the gradients t·(a − b) + r·a to a and t·(b − a) + s·b to b."""
    g_cosine, g_l2, g_normalized, g_similarity = upstream
    l2, a_norm, b_norm, norm_difference = row_scalars
    both, apart = _both_nonzero(a_norm, b_norm), l2 > 0
    a_safe, b_safe, l2_safe = (torch.where(ok, norm, 1) for ok, norm in ((both, a_norm), (both, b_norm), (apart, l2)))
    g_cosine = torch.where(both, g_cosine - g_similarity, 0)
    inverse = 1 / (a_safe * b_safe)
    cosine_distance = (l2.square() - norm_difference.square()).clamp(min=0) * inverse / 2
    clamped = b_norm.clamp(min=eps)
    towards = torch.where(apart, (g_l2 + g_normalized / clamped) / l2_safe, 0) + g_cosine * inverse
    along_a = -g_cosine * (norm_difference * inverse + cosine_distance / a_safe) / a_safe
    along_b = -g_cosine * (-norm_difference * inverse + cosine_distance / b_safe) / b_safe
    shrinking = torch.where(b_norm > eps, g_normalized * l2 / clamped / clamped / clamped, 0)
    return towards, along_a, along_b - shrinking


def _backward_rows(
    noisy: Tensor,
    clean: Tensor,
    upstream: Tensor,
    row_scalars: Tensor,
    eps: float,
    needs_noisy: bool,
    needs_clean: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (rows, D) to the sides that need one, in the arithmetic's dtype."""
    a, b = (side.to(rows.compute_dtype(noisy, clean)) for side in (noisy, clean))
    towards, along_a, along_b = (one[:, None] for one in _row_coefficients(upstream, row_scalars, eps))
    step = towards * (a - b)
    return step + along_a * a if needs_noisy else None, along_b * b - step if needs_clean else None


def _triton_refusal(noisy: Tensor, clean: Tensor, mask: Tensor | None = None, **_: Any) -> str | None:
    return dispatch.triton_device_refusal(noisy, clean, mask) or dispatch.triton_rows_refusal(noisy=noisy, clean=clean)


# Temporaries of one row: both sides in the arithmetic's dtype, difference, sum, products, gradients.
_TEMPORARIES = 6


class _Problem(NamedTuple):
    """The arguments of ``sgfast::hidden_distances``, checked."""

    noisy: Tensor
    clean: Tensor
    mask: Tensor | None
    eps: float
    impl: str | None


def _refusal_of(problem: _Problem) -> str | None:
    return _triton_refusal(problem.noisy, problem.clean, problem.mask)


def _row_chunks(problem: _Problem, dtype: torch.dtype) -> Iterator[Tensor | slice]:
    *shape, width = problem.noisy.shape
    return rows.row_chunks(shape, problem.mask, width * dtype.itemsize * _TEMPORARIES, rows.DEFAULT_CHUNK_BYTES)


@define("hidden_distances", _Problem)
def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    """The values and the row scalars, (4, ...) each."""
    noisy, clean, mask, eps, impl = problem
    choice = dispatch.select(impl, _refusal_of(problem))
    if choice.implementation == "triton":
        return dispatch.kernels().hidden_forward(noisy, clean, mask, eps)  # type: ignore[no-any-return]
    body = dispatch.implementation_of(_forward_rows, choice.implementation)
    values = noisy.new_zeros((4, *noisy.shape[:-1]), dtype=rows.compute_dtype(noisy, clean))
    row_scalars = torch.zeros_like(values)
    for chunk in _row_chunks(problem, row_scalars.dtype):
        chunk_values, chunk_scalars = body(rows.read_rows(noisy, chunk), rows.read_rows(clean, chunk), eps)
        values.view(4, -1)[:, chunk] = rows.zero_masked(chunk_values.T, mask, chunk).T
        row_scalars.view(4, -1)[:, chunk] = chunk_scalars
    return values, row_scalars


@_forward.register_fake
def _(problem: _Problem) -> tuple[Tensor, Tensor]:
    noisy = problem.noisy
    values = noisy.new_empty((4, *noisy.shape[:-1]), dtype=rows.compute_dtype(noisy, problem.clean))
    return values, torch.empty_like(values)


class _Backward(NamedTuple):
    """What the gradients are computed from: the problem, upstream and forward's row scalars, (4, ...) each."""

    problem: _Problem
    upstream: Tensor
    row_scalars: Tensor
    wanted: Sequence[bool]  # to noisy, to clean


@define("hidden_distances_backward", _Backward)
def _backward(arguments: _Backward) -> tuple[Tensor, Tensor]:
    """Gradients to the sides wanted; an unwanted one comes back empty."""
    problem, upstream, row_scalars, wanted = arguments
    noisy, clean, mask, eps, impl = problem
    choice = dispatch.select(impl, _refusal_of(problem))
    if choice.implementation == "triton":
        found = dispatch.kernels().hidden_backward(noisy, clean, mask, upstream, row_scalars, eps, *wanted)
        to_noisy, to_clean = (noisy.new_empty(0) if one is None else one for one in found)
        return to_noisy, to_clean
    body = dispatch.implementation_of(_backward_rows, choice.implementation)
    gradients = rows.empty_gradients(noisy, clean, wanted)
    if mask is not None:
        for gradient in gradients:
            gradient.zero_()
    for chunk in _row_chunks(problem, row_scalars.dtype):
        some_noisy, some_clean = rows.read_rows(noisy, chunk), rows.read_rows(clean, chunk)
        per_row = upstream.reshape(4, -1)[:, chunk], row_scalars.view(4, -1)[:, chunk]
        found = body(some_noisy, some_clean, *per_row, eps, *wanted)
        for gradient, chunk_gradient in zip(gradients, found, strict=True):
            if chunk_gradient is not None:
                selected = rows.zero_masked(chunk_gradient, mask, chunk)
                gradient.view(-1, gradient.shape[-1])[chunk] = selected.to(gradient.dtype)
    return gradients


@_backward.register_fake
def _(arguments: _Backward) -> tuple[Tensor, Tensor]:
    return rows.empty_gradients(arguments.problem.noisy, arguments.problem.clean, arguments.wanted)


def _setup(ctx: Any, problem: _Problem, output: tuple[Tensor, Tensor]) -> None:
    _, row_scalars = output
    ctx.mark_non_differentiable(row_scalars)
    ctx.set_materialize_grads(False)
    keep(ctx, problem._replace(impl=dispatch.pinned(problem.impl)), row_scalars)


def _gradients(ctx: Any, upstream: Tensor | None, _: None) -> dict[str, Tensor | None]:
    if upstream is None:
        return {}
    problem, row_scalars = kept(ctx)
    to_noisy, to_clean = _backward(_Backward(problem, upstream, row_scalars, _forward.wanted(ctx, "noisy", "clean")))
    return {"noisy": to_noisy, "clean": to_clean}


def _setup_second(ctx: Any, arguments: _Backward, output: tuple[Tensor, Tensor]) -> None:
    leave_out_unwanted(ctx, output, arguments.wanted)
    keep(ctx, arguments.problem, arguments.upstream)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> dict[str, Tensor | None]:
    problem, upstream = kept(ctx)
    mask = problem.mask

    def masked_reference(noisy: Tensor, clean: Tensor) -> Tensor:
        if mask is None:
            return reference(noisy, clean, problem.eps)
        # Masked rows are replaced before the arithmetic, so that a NaN there cannot reach a gradient.
        noisy, clean = (torch.where(mask[..., None], side, 1) for side in (noisy, clean))
        return torch.where(mask, reference(noisy, clean, problem.eps), 0)

    to_noisy, to_clean, to_upstream = double_backward(
        "hidden_distances",
        problem.impl,
        _refusal_of(problem),
        masked_reference,
        (problem.noisy, problem.clean),
        upstream,
        upstream_of_gradients,
    )
    return {"noisy": to_noisy, "clean": to_clean, "upstream": to_upstream}


_forward.register_gradients(_setup, _gradients)
_backward.register_gradients(_setup_second, _second_gradients)


@dispatch.describe_triton(_triton_refusal)
def hidden_distances(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-8,
    impl: dispatch.Implementation | None = None,
) -> HiddenDistances:
    """Cosine and Euclidean distances between hidden states, per position.

    Args:
        noisy: (..., D), float32, bfloat16, float16 or float64; row-strided views are read in place.
        clean: of the same shape.
        mask: (...), 1 = selected. Masked rows are not read; they give 0 in every field and zero gradient.
        eps: lower bound of ‖clean‖ in ``normalized_l2``.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        ``HiddenDistances(cosine_distance, l2, normalized_l2, cosine_similarity)``, each (...) in float32 (float64 if
        an input is), differentiable with respect to both sides; gradients are in the inputs' dtypes.

    Raises:
        TypeError: an input is not a floating tensor.
        ValueError: shapes or devices differ, or ``eps`` is not positive.

    Example:
        >>> import torch
        >>> from sgfast.ops import hidden_distances
        >>> distances = hidden_distances(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]]))
        >>> distances.cosine_distance, distances.normalized_l2
        (tensor([1.]), tensor([1.4142]))
    """
    validation.check_pair("noisy", noisy, "clean", clean)
    mask = validation.row_mask(mask, "mask", "noisy", noisy)
    if not eps > 0:
        raise ValueError(f"eps must be positive; got {eps}")
    dispatch.check_impl(impl)
    dispatch.refuse_forward_mode("hidden_distances", noisy, clean)
    values, _ = _forward(_Problem(noisy, clean, mask, eps, impl))
    return HiddenDistances(*values.unbind(0))
