r"""Squared error and cross entropy between rows of scores, as TextBrewer compares logits and attention scores.

For rows s (student) and t (teacher) of width K, with weights k of the columns (a key mask):

    squared_error    Σ k (s − t)²
    cross_entropy    −Σ k q log p,   p = softmax(s), q = softmax(t) over all columns, masked ones too

``threshold`` is TextBrewer's guess at a mask where none is given: a score at or below it is taken for a masked one.
``squared_error`` then replaces it by 0, each side on its own; ``cross_entropy`` leaves the teacher's out of the sum.
Without a threshold a column that is −inf on either side is not compared; a row of nothing but −inf gives 0.

Gradients, with w = k q where the column counts and f = −k log p there:

    squared_error    ∂/∂s = 2 k (s − t),   ∂/∂t = −∂/∂s
    cross_entropy    ∂/∂s = p Σ w − w,     ∂/∂t = q (f − Σ q f)

Arithmetic in float32 (float64 if an input is), in chunks of rows; nothing is kept for backward besides the inputs.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.autograd import double_backward

Kind = Literal["squared_error", "cross_entropy"]


class _Distributions(NamedTuple):
    """What the cross entropy and its gradients are made of; every field is (rows, K)."""

    p: Tensor
    q: Tensor
    weights: Tensor  # k where the column counts, else 0
    log_p: Tensor  # 0 where the column does not count


def _differences(
    student: Tensor, teacher: Tensor, keys: Tensor | None, threshold: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return s − t, and where it moves with s and with t."""
    if threshold is None:
        both = (student != -math.inf) & (teacher != -math.inf)
        student_counts = teacher_counts = both if keys is None else both & (keys != 0)
    else:
        # Not `>`: a NaN must come through.
        student_counts, teacher_counts = ~(student <= threshold), ~(teacher <= threshold)
    difference = torch.where(student_counts, student, 0) - torch.where(teacher_counts, teacher, 0)
    return difference, student_counts, teacher_counts


def _log_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, p); p is 0 throughout a row of nothing but −inf."""
    maximum = scores.detach().amax(-1, keepdim=True)
    shifted = scores - torch.where(maximum == -math.inf, 0, maximum)
    exponentials = shifted.exp()
    total = exponentials.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1, total)
    return shifted - total.log(), exponentials / total


def _distributions(student: Tensor, teacher: Tensor, keys: Tensor | None, threshold: float | None) -> _Distributions:
    if keys is not None:
        # A masked key's score stays in the softmax, unless it is NaN or infinite.
        student, teacher = (torch.where((keys == 0) & ~side.isfinite(), -math.inf, side) for side in (student, teacher))
    counts = student != -math.inf
    if threshold is not None:
        counts = counts & ~(teacher <= threshold)
    weights = counts.to(student.dtype) if keys is None else torch.where(counts, keys, 0)
    log_p, p = _log_softmax(student)
    _, q = _log_softmax(teacher)
    return _Distributions(p, q, weights, torch.where(counts, log_p, 0))


def _forward_rows(student: Tensor, teacher: Tensor, keys: Tensor | None, kind: Kind, threshold: float | None) -> Tensor:
    """(rows, K) twice → (rows,). Differentiable by autograd: the reference for second derivatives."""
    student, teacher = (side.to(rows.compute_dtype(student, teacher)) for side in (student, teacher))
    if kind == "squared_error":
        squares = _differences(student, teacher, keys, threshold)[0].square()
        return (squares if keys is None else squares * keys).sum(-1)
    found = _distributions(student, teacher, keys, threshold)
    return -(found.weights * found.q * found.log_p).sum(-1)


def _backward_rows(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | None,
    upstream: Tensor,
    kind: Kind,
    threshold: float | None,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (rows, K) to the sides that need one, in the arithmetic's dtype."""
    student, teacher = (side.to(rows.compute_dtype(student, teacher)) for side in (student, teacher))
    upstream = upstream[:, None]
    if kind == "squared_error":
        difference, student_counts, teacher_counts = _differences(student, teacher, keys, threshold)
        slope = 2 * upstream * (difference if keys is None else difference * keys)
        return (
            torch.where(student_counts, slope, 0) if needs_student else None,
            torch.where(teacher_counts, -slope, 0) if needs_teacher else None,
        )
    p, q, weights, log_p = _distributions(student, teacher, keys, threshold)
    student_gradient = teacher_gradient = None
    if needs_student:
        mass = weights * q
        student_gradient = upstream * (p * mass.sum(-1, keepdim=True) - mass)
    if needs_teacher:
        surprise = -weights * log_p
        teacher_gradient = upstream * q * (surprise - (q * surprise).sum(-1, keepdim=True))
    return student_gradient, teacher_gradient


def _triton_refusal() -> str:
    return "there is no Triton kernel for TextBrewer's presets"


# Temporaries of one row: both sides in the arithmetic's dtype, exponentials, log p, weights, products, gradients.
_TEMPORARIES = 12


def _read_keys(keys: Tensor | None, chunk: Tensor | slice, row_shape: torch.Size) -> Tensor | None:
    """The key weights of every row of a chunk, (rows, K), from those of its sample, (B, K)."""
    if keys is None:
        return None
    return rows.read_rows(keys.reshape(keys.shape[0], *[1] * (len(row_shape) - 1), -1).expand(*row_shape, -1), chunk)


@torch.library.custom_op("sgfast::score_rows", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | None,
    mask: Tensor | None,
    kind: str,
    threshold: float | None,
    impl: str | None,
) -> Tensor:
    implementation = dispatch.select(impl, _triton_refusal()).implementation
    body = dispatch.implementation_of(_forward_rows, implementation)
    dtype, shape = rows.compute_dtype(student, teacher), student.shape[:-1]
    values = student.new_zeros(shape, dtype=dtype)
    row_bytes = student.shape[-1] * dtype.itemsize * _TEMPORARIES
    for chunk in rows.row_chunks(shape, mask, row_bytes, rows.DEFAULT_CHUNK_BYTES):
        found = body(
            rows.read_rows(student, chunk),
            rows.read_rows(teacher, chunk),
            _read_keys(keys, chunk, shape),
            kind,  # type: ignore[arg-type]  # an operator's schema knows str alone
            threshold,
        )
        values.view(-1)[chunk] = rows.zero_masked(found, mask, chunk)
    return values


@_forward.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | None,
    mask: Tensor | None,
    kind: str,
    threshold: float | None,
    impl: str | None,
) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=rows.compute_dtype(student, teacher))


@torch.library.custom_op("sgfast::score_rows_backward", mutates_args=())
def _backward(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor,
    kind: str,
    threshold: float | None,
    needs_student: bool,
    needs_teacher: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Gradients to both sides; one that is not needed is an empty tensor, for an op cannot return None."""
    implementation = dispatch.select(impl, _triton_refusal()).implementation
    body = dispatch.implementation_of(_backward_rows, implementation)
    shape, needs = student.shape[:-1], (needs_student, needs_teacher)
    gradients = _empty_gradients(student, teacher, *needs)
    if mask is not None:
        for gradient in gradients:
            gradient.zero_()
    row_bytes = student.shape[-1] * upstream.dtype.itemsize * _TEMPORARIES
    for chunk in rows.row_chunks(shape, mask, row_bytes, rows.DEFAULT_CHUNK_BYTES):
        found = body(
            rows.read_rows(student, chunk),
            rows.read_rows(teacher, chunk),
            _read_keys(keys, chunk, shape),
            upstream.reshape(-1)[chunk],
            kind,  # type: ignore[arg-type]
            threshold,
            *needs,
        )
        for gradient, chunk_gradient in zip(gradients, found, strict=True):
            if chunk_gradient is not None:
                selected = rows.zero_masked(chunk_gradient, mask, chunk)
                gradient.view(-1, gradient.shape[-1])[chunk] = selected.to(gradient.dtype)
    return gradients


@_backward.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor,
    kind: str,
    threshold: float | None,
    needs_student: bool,
    needs_teacher: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(student, teacher, needs_student, needs_teacher)


def _empty_gradients(
    student: Tensor, teacher: Tensor, needs_student: bool, needs_teacher: bool
) -> tuple[Tensor, Tensor]:
    first, second = (
        side.new_empty(side.shape if needed else 0)
        for side, needed in ((student, needs_student), (teacher, needs_teacher))
    )
    return first, second


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, keys, mask, ctx.kind, ctx.threshold, impl = inputs
    ctx.impl = dispatch.pinned(impl)
    ctx.save_for_backward(student, teacher, keys, mask)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    found = _backward(*ctx.saved_tensors, upstream, ctx.kind, ctx.threshold, *needs, ctx.impl)
    return *(one if needed else None for one, needed in zip(found, needs, strict=True)), *(None,) * 5


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, keys, mask, upstream, ctx.kind, ctx.threshold, *ctx.needs, ctx.impl = inputs
    ctx.save_for_backward(student, teacher, keys, mask, upstream)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    student, teacher, keys, mask, upstream = ctx.saved_tensors

    def reference(student: Tensor, teacher: Tensor) -> Tensor:
        if mask is not None:
            # Masked rows are replaced before the arithmetic, so that a NaN there cannot reach a gradient.
            student, teacher = (torch.where(mask[..., None], side, 0) for side in (student, teacher))
        every = slice(0, math.prod(mask.shape if mask is not None else student.shape[:-1]))
        flat_keys = _read_keys(keys, every, student.shape[:-1])
        flat_student, flat_teacher = (side.reshape(-1, side.shape[-1]) for side in (student, teacher))
        values = _forward_rows(flat_student, flat_teacher, flat_keys, ctx.kind, ctx.threshold).view(student.shape[:-1])
        return values if mask is None else torch.where(mask, values, 0)

    wanted = [one if needed else None for one, needed in zip(upstream_of_gradients, ctx.needs, strict=True)]
    student_gradient, teacher_gradient, upstream_gradient = double_backward(
        "the presets' losses", ctx.impl, _triton_refusal(), reference, (student, teacher), upstream, wanted
    )
    return student_gradient, teacher_gradient, None, None, upstream_gradient, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_setup_context)
_backward.register_autograd(_second_gradients, setup_context=_setup_second_context)


def score_rows(
    student: Tensor,
    teacher: Tensor,
    kind: Kind,
    *,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """One value per row of scores; the formulas are at the top of this module.

    Args:
        student: (B, ..., K), checked by the caller.
        teacher: of the same shape.
        kind: ``squared_error`` or ``cross_entropy``.
        keys: (B, K) in the arithmetic's dtype, weights of the columns.
        mask: (B, ...) bool. Masked rows are not read; they give 0 and zero gradient.
        threshold: at or below it a score is taken for a masked one; not together with ``keys``.

    Returns:
        (B, ...), float32 or float64.
    """
    dispatch.refuse_forward_mode("the presets' losses", student, teacher)
    values: Tensor = _forward(student, teacher, keys, mask, kind, threshold, None)
    return values
