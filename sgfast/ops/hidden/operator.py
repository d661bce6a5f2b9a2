"""The registered operator ``sgfast::hidden_distances``: implementation, fake, gradients and second gradients."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.double_backward import double_backward, leave_out_unwanted
from sgfast.ops.hidden.definitions import definition_values
from sgfast.ops.hidden.rows import backward_rows, forward_rows
from sgfast.ops.operator import define, keep, kept


def triton_refusal(noisy: Tensor, clean: Tensor, mask: Tensor | None = None, **_: Any) -> str | None:
    """Say why Triton cannot run these arguments, or return None."""
    return dispatch.triton_device_refusal(noisy, clean, mask) or dispatch.triton_rows_refusal(noisy=noisy, clean=clean)


# Temporaries of one row: both sides in the arithmetic's dtype, difference, sum, products, gradients.
_TEMPORARIES = 6


class Problem(NamedTuple):
    """The arguments of ``sgfast::hidden_distances``, checked."""

    noisy: Tensor
    clean: Tensor
    mask: Tensor | None
    eps: float
    impl: str | None


def _refusal_of(problem: Problem) -> str | None:
    return triton_refusal(problem.noisy, problem.clean, problem.mask)


def _row_chunks(problem: Problem, dtype: torch.dtype) -> Iterator[Tensor | slice]:
    *shape, width = problem.noisy.shape
    return rows.row_chunks(shape, problem.mask, width * dtype.itemsize * _TEMPORARIES, rows.DEFAULT_CHUNK_BYTES)


@define("hidden_distances", Problem)
def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Compute the values and the row scalars, (4, ...) each."""
    noisy, clean, mask, eps, impl = problem
    choice = dispatch.select(impl, _refusal_of(problem))
    if choice.implementation == "triton":
        import sgfast_kernels

        return sgfast_kernels.hidden_forward(noisy, clean, mask, eps)
    body = dispatch.implementation_of(forward_rows, choice.implementation)
    values = noisy.new_zeros((4, *noisy.shape[:-1]), dtype=rows.compute_dtype(noisy, clean))
    row_scalars = torch.zeros_like(values)
    for chunk in _row_chunks(problem, row_scalars.dtype):
        chunk_values, chunk_scalars = body(rows.read_rows(noisy, chunk), rows.read_rows(clean, chunk), eps)
        values.view(4, -1)[:, chunk] = rows.zero_masked(chunk_values.T, mask, chunk).T
        row_scalars.view(4, -1)[:, chunk] = chunk_scalars
    return values, row_scalars


@forward.register_fake
def _(problem: Problem) -> tuple[Tensor, Tensor]:
    noisy = problem.noisy
    values = noisy.new_empty((4, *noisy.shape[:-1]), dtype=rows.compute_dtype(noisy, problem.clean))
    return values, torch.empty_like(values)


class BackwardProblem(NamedTuple):
    """Arguments of the backward operator: the problem, and upstream and forward's row scalars, (4, ...) each."""

    problem: Problem
    upstream: Tensor
    row_scalars: Tensor
    wanted: Sequence[bool]  # to noisy, to clean


@define("hidden_distances_backward", BackwardProblem)
def backward(arguments: BackwardProblem) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the wanted sides; an unwanted gradient has shape (0,)."""
    problem, upstream, row_scalars, wanted = arguments
    noisy, clean, mask, eps, impl = problem
    choice = dispatch.select(impl, _refusal_of(problem))
    if choice.implementation == "triton":
        import sgfast_kernels

        found = sgfast_kernels.hidden_backward(noisy, clean, mask, upstream, row_scalars, eps, *wanted)
        to_noisy, to_clean = (noisy.new_empty(0) if one is None else one for one in found)
        return to_noisy, to_clean
    body = dispatch.implementation_of(backward_rows, choice.implementation)
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


@backward.register_fake
def _(arguments: BackwardProblem) -> tuple[Tensor, Tensor]:
    return rows.empty_gradients(arguments.problem.noisy, arguments.problem.clean, arguments.wanted)


def _setup(ctx: Any, problem: Problem, output: tuple[Tensor, Tensor]) -> None:
    _, row_scalars = output
    ctx.mark_non_differentiable(row_scalars)
    ctx.set_materialize_grads(False)
    keep(ctx, problem._replace(impl=dispatch.pinned(problem.impl)), row_scalars)


def _gradients(ctx: Any, upstream: Tensor | None, _: None) -> dict[str, Tensor | None]:
    if upstream is None:
        return {}
    problem, row_scalars = kept(ctx)
    to_noisy, to_clean = backward(
        BackwardProblem(problem, upstream, row_scalars, forward.wanted(ctx, "noisy", "clean"))
    )
    return {"noisy": to_noisy, "clean": to_clean}


def _setup_second(ctx: Any, arguments: BackwardProblem, output: tuple[Tensor, Tensor]) -> None:
    leave_out_unwanted(ctx, output, arguments.wanted)
    keep(ctx, arguments.problem, arguments.upstream)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> dict[str, Tensor | None]:
    problem, upstream = kept(ctx)
    mask = problem.mask

    def masked_reference(noisy: Tensor, clean: Tensor) -> Tensor:
        if mask is None:
            return definition_values(noisy, clean, problem.eps)
        # Masked rows are replaced before the arithmetic, so that a NaN in a masked row cannot reach a gradient.
        noisy, clean = (torch.where(mask[..., None], side, 1) for side in (noisy, clean))
        return torch.where(mask, definition_values(noisy, clean, problem.eps), 0)

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


forward.register_gradients(_setup, _gradients)
backward.register_gradients(_setup_second, _second_gradients)
