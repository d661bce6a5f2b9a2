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

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sgfast.loss.presets.score_arithmetic import (
    Kind,
    backward_rows,
    backward_rows_on_cpu,
    forward_rows,
    forward_rows_on_cpu,
)
from sgfast.ops import dispatch, rows
from sgfast.ops.autograd import double_backward


def _triton_refusal() -> str:
    return "there is no Triton kernel for TextBrewer's presets"


# Temporaries of one row: both sides in the arithmetic's dtype, exponentials, log p, weights, products, gradients.
_TEMPORARIES = 12


_Chunk = tuple[Tensor | slice, Tensor, Tensor, Tensor | None]


def _chunks(
    student: Tensor, teacher: Tensor, keys: Tensor | None, mask: Tensor | None, dtype: torch.dtype
) -> Iterator[_Chunk]:
    """Yield chunks of rows: where they lie, both sides, and with keys the sides as (samples, rows, K) beside them."""
    shape, width = student.shape[:-1], student.shape[-1]
    row_bytes = width * dtype.itemsize * _TEMPORARIES
    if keys is None:
        for chunk in rows.row_chunks(shape, mask, row_bytes, rows.DEFAULT_CHUNK_BYTES):
            yield chunk, rows.read_rows(student, chunk), rows.read_rows(teacher, chunk), None
        return
    of_a_sample = shape[1:].numel()
    for samples, block in _blocks(shape[0], of_a_sample, max(1, rows.DEFAULT_CHUNK_BYTES // row_bytes)):
        first, count = samples.start, samples.stop - samples.start
        lie = slice(first * of_a_sample + block.start, (first + count - 1) * of_a_sample + block.stop)
        some_student, some_teacher = (rows.read_rows(side, lie).view(count, -1, width) for side in (student, teacher))
        yield lie, some_student, some_teacher, keys[samples].unsqueeze(1)


def _blocks(samples: int, of_a_sample: int, rows_at_once: int) -> Iterator[tuple[slice, slice]]:
    """Yield (samples, rows of each): several whole samples, or a part of one."""
    step = max(1, rows_at_once // max(of_a_sample, 1))
    for first in range(0, samples, step):
        for start in range(0, of_a_sample, max(rows_at_once, 1)):
            stop = min(start + rows_at_once, of_a_sample)
            yield slice(first, min(first + step, samples)), slice(start, stop)


def _body(
    careful: Callable[..., Any], on_cpu: Callable[..., Any], like: Tensor, impl: str | None
) -> Callable[..., Any]:
    implementation = dispatch.select(impl, _triton_refusal()).implementation
    if implementation == "torch" and like.device.type == "cpu":
        return on_cpu
    return dispatch.implementation_of(careful, implementation)


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
    body = _body(forward_rows, forward_rows_on_cpu, student, impl)
    dtype = rows.compute_dtype(student, teacher)
    values = student.new_zeros(student.shape[:-1], dtype=dtype)
    for lie, some_student, some_teacher, some_keys in _chunks(student, teacher, keys, mask, dtype):
        found = body(some_student, some_teacher, some_keys, kind, threshold)
        values.view(-1)[lie] = rows.zero_masked(found.reshape(-1), mask, lie)
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
    body = _body(backward_rows, backward_rows_on_cpu, student, impl)
    needs = (needs_student, needs_teacher)
    gradients = _empty_gradients(student, teacher, *needs)
    if mask is not None:
        for gradient in gradients:
            gradient.zero_()
    flat_upstream = upstream.reshape(-1)
    for lie, some_student, some_teacher, some_keys in _chunks(student, teacher, keys, mask, upstream.dtype):
        some_upstream = flat_upstream[lie].view(some_student.shape[:-1])
        found = body(some_student, some_teacher, some_keys, some_upstream, kind, threshold, *needs)
        for gradient, some in zip(gradients, found, strict=True):
            if some is not None:
                selected = rows.zero_masked(some.reshape(-1, some.shape[-1]), mask, lie)
                gradient.view(-1, gradient.shape[-1])[lie] = selected.to(gradient.dtype)
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
        every_key = keys if keys is None else keys.view(keys.shape[0], *[1] * (student.dim() - 2), -1)
        values = forward_rows(student, teacher, every_key, ctx.kind, ctx.threshold)
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
        keys: (B, K), contiguous, in the arithmetic's dtype, weights of the columns.
        mask: (B, ...) bool. Masked rows are not read; they give 0 and zero gradient.
        threshold: at or below it a score is taken for a masked one; not together with ``keys``.

    Returns:
        (B, ...), float32 or float64.
    """
    dispatch.refuse_forward_mode("the presets' losses", student, teacher)
    values: Tensor = _forward(student, teacher, keys, mask, kind, threshold, None)
    return values
