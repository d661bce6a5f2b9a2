r"""Squared error and cross entropy between rows of scores, as TextBrewer compares logits and attention scores.

For rows s (student) and t (teacher) of width K, with weights k of the columns (a key mask):

    squared_error    Σ k (s − t)²
    cross_entropy    −Σ k q log p,   p = softmax(s), q = softmax(t) over all columns, masked ones too

``threshold`` is TextBrewer's guess of a mask if the caller gives no mask. A score at or below the threshold counts as
masked. ``squared_error`` replaces masked scores by 0, on each side separately. ``cross_entropy`` leaves the columns
whose teacher's score is masked out of the sum. Without a threshold, a column that is −inf on either side is not
compared. A row of −inf alone gives 0.

Gradients, with w = k q where the column counts and f = −k log p there:

    squared_error    ∂/∂s = 2 k (s − t),   ∂/∂t = −∂/∂s
    cross_entropy    ∂/∂s = p Σ w − w,     ∂/∂t = q (f − Σ q f)

The arithmetic is in float32 (float64 if an input is), in chunks of rows. Backward needs the inputs alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
from sgfast.ops.double_backward import double_backward, leave_out_unwanted
from sgfast.ops.operator import define, keep, kept


def _triton_refusal() -> str:
    return "there is no Triton kernel for TextBrewer's presets"


# Temporaries of one row: both sides in the arithmetic's dtype, exponentials, log p, weights, products, gradients.
_TEMPORARIES = 12


class _Problem(NamedTuple):
    """The arguments of ``sgfast::score_rows``, checked by the caller."""

    student: Tensor
    teacher: Tensor
    keys: Tensor | None
    mask: Tensor | None
    kind: str
    threshold: float | None
    impl: str | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the values."""
        return rows.compute_dtype(self.student, self.teacher)


_Chunk = tuple[Tensor | slice, Tensor, Tensor, Tensor | None]


def _chunks(problem: _Problem) -> Iterator[_Chunk]:
    """Yield chunks of rows: their places, both sides, and the keys. With keys the sides are (samples, rows, K)."""
    student, teacher, keys = problem.student, problem.teacher, problem.keys
    shape, width = student.shape[:-1], student.shape[-1]
    row_bytes = width * problem.dtype.itemsize * _TEMPORARIES
    if keys is None:
        for chunk in rows.row_chunks(shape, problem.mask, row_bytes, rows.DEFAULT_CHUNK_BYTES):
            yield chunk, rows.read_rows(student, chunk), rows.read_rows(teacher, chunk), None
        return
    of_a_sample = shape[1:].numel()
    for samples, block in _blocks(shape[0], of_a_sample, max(1, rows.DEFAULT_CHUNK_BYTES // row_bytes)):
        first, count = samples.start, samples.stop - samples.start
        lie = slice(first * of_a_sample + block.start, (first + count - 1) * of_a_sample + block.stop)
        some_student, some_teacher = (rows.read_rows(side, lie).view(count, -1, width) for side in (student, teacher))
        yield lie, some_student, some_teacher, keys[samples].unsqueeze(1)


def _blocks(samples: int, of_a_sample: int, rows_at_once: int) -> Iterator[tuple[slice, slice]]:
    """Yield (samples, rows of each sample): several whole samples, or a part of one sample."""
    step = max(1, rows_at_once // max(of_a_sample, 1))
    for first in range(0, samples, step):
        for start in range(0, of_a_sample, max(rows_at_once, 1)):
            stop = min(start + rows_at_once, of_a_sample)
            yield slice(first, min(first + step, samples)), slice(start, stop)


def _body(problem: _Problem, careful: Callable[..., Any], on_cpu: Callable[..., Any]) -> Callable[..., Any]:
    implementation = dispatch.select(problem.impl, _triton_refusal()).implementation
    if implementation == "torch" and problem.student.device.type == "cpu":
        return on_cpu
    return dispatch.implementation_of(careful, implementation)


@define("score_rows", _Problem)
def _forward(problem: _Problem) -> Tensor:
    """Values of the row shape."""
    body = _body(problem, forward_rows, forward_rows_on_cpu)
    values = problem.student.new_zeros(problem.student.shape[:-1], dtype=problem.dtype)
    for lie, some_student, some_teacher, some_keys in _chunks(problem):
        found = body(some_student, some_teacher, some_keys, problem.kind, problem.threshold)
        values.view(-1)[lie] = rows.zero_masked(found.reshape(-1), problem.mask, lie)
    return values


@_forward.register_fake
def _(problem: _Problem) -> Tensor:
    return problem.student.new_empty(problem.student.shape[:-1], dtype=problem.dtype)


class _Backward(NamedTuple):
    """The arguments of the backward operator: the problem and upstream of the row shape."""

    problem: _Problem
    upstream: Tensor
    wanted: Sequence[bool]  # to student, to teacher


@define("score_rows_backward", _Backward)
def _backward(arguments: _Backward) -> tuple[Tensor, Tensor]:
    """Compute the gradients to both sides. A gradient that nobody asked for is empty."""
    problem, upstream, wanted = arguments
    body = _body(problem, backward_rows, backward_rows_on_cpu)
    gradients = rows.empty_gradients(problem.student, problem.teacher, wanted)
    if problem.mask is not None:
        for gradient in gradients:
            gradient.zero_()
    flat_upstream = upstream.reshape(-1)
    for lie, some_student, some_teacher, some_keys in _chunks(problem):
        some_upstream = flat_upstream[lie].view(some_student.shape[:-1])
        found = body(some_student, some_teacher, some_keys, some_upstream, problem.kind, problem.threshold, *wanted)
        for gradient, some in zip(gradients, found, strict=True):
            if some is not None:
                selected = rows.zero_masked(some.reshape(-1, some.shape[-1]), problem.mask, lie)
                gradient.view(-1, gradient.shape[-1])[lie] = selected.to(gradient.dtype)
    return gradients


@_backward.register_fake
def _(arguments: _Backward) -> tuple[Tensor, Tensor]:
    return rows.empty_gradients(arguments.problem.student, arguments.problem.teacher, arguments.wanted)


def _setup(ctx: Any, problem: _Problem, output: Tensor) -> None:
    keep(ctx, problem._replace(impl=dispatch.pinned(problem.impl)))


def _gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor]:
    (problem,) = kept(ctx)
    to_student, to_teacher = _backward(_Backward(problem, upstream, _forward.wanted(ctx, "student", "teacher")))
    return {"student": to_student, "teacher": to_teacher}


def _setup_second(ctx: Any, arguments: _Backward, output: tuple[Tensor, Tensor]) -> None:
    leave_out_unwanted(ctx, output, arguments.wanted)
    keep(ctx, arguments.problem, arguments.upstream)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> dict[str, Tensor | None]:
    problem, upstream = kept(ctx)
    keys, mask = problem.keys, problem.mask

    def reference(student: Tensor, teacher: Tensor) -> Tensor:
        if mask is not None:
            # Masked rows are replaced before the arithmetic, so that a NaN in a masked row cannot reach a gradient.
            student, teacher = (torch.where(mask[..., None], side, 0) for side in (student, teacher))
        every_key = keys if keys is None else keys.view(keys.shape[0], *[1] * (student.dim() - 2), -1)
        values = forward_rows(student, teacher, every_key, problem.kind, problem.threshold)
        return values if mask is None else torch.where(mask, values, 0)

    to_student, to_teacher, to_upstream = double_backward(
        "the presets' losses",
        problem.impl,
        _triton_refusal(),
        reference,
        (problem.student, problem.teacher),
        upstream,
        upstream_of_gradients,
    )
    return {"student": to_student, "teacher": to_teacher, "upstream": to_upstream}


_forward.register_gradients(_setup, _gradients)
_backward.register_gradients(_setup_second, _second_gradients)


def score_rows(
    student: Tensor,
    teacher: Tensor,
    kind: Kind,
    *,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Compute one value per row of scores. The formulas are at the top of this module.

    Args:
        student: (B, ..., K), checked by the caller.
        teacher: of the same shape.
        kind: ``squared_error`` or ``cross_entropy``.
        keys: (B, K), contiguous, in the arithmetic's dtype, weights of the columns.
        mask: (B, ...) bool. Masked rows are not read; they give 0 and zero gradient.
        threshold: a score at or below the threshold counts as masked. Not together with ``keys``.

    Returns:
        (B, ...), float32 or float64.
    """
    dispatch.refuse_forward_mode("the presets' losses", student, teacher)
    values: Tensor = _forward(_Problem(student, teacher, keys, mask, kind, threshold, None))
    return values
