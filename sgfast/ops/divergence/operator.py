"""The registered operator ``sgfast::divergences``: implementation, fake, gradients and second gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.divergence import kernels
from sgfast.ops.divergence.chunks import chunk_settings, forward_of, read_chunks
from sgfast.ops.divergence.definitions import definition_values
from sgfast.ops.divergence.problem import Problem, check_label_values
from sgfast.ops.divergence.rows import finish_values, write_gradients
from sgfast.ops.double_backward import double_backward
from sgfast.ops.operator import define, keep, kept


def _choice(problem: Problem) -> dispatch.Choice:
    return dispatch.select(problem.impl, kernels.refusal_of(problem))


@define("divergences", Problem)
def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Compute values (kinds, ...), indices of the top-k support, and row scalars.

    The indices are int32, (..., min(2k, V)) or (..., k), −1 where invalid. The row scalars, (4 + 2·kinds, ...) or with
    top_k (8 + 2·kinds, ...), are for the backward of the same implementation, towards the wanted sides. With a support
    the PyTorch implementation needs no row scalars, so they are zeros.
    """
    noisy, clean, labels, mask, top_k = problem.noisy, problem.clean, problem.labels, problem.mask, problem.top_k
    choice = _choice(problem)
    if choice.implementation == "triton":
        return kernels.forward(problem)
    if labels is not None:
        check_label_values(labels, mask, noisy.shape[-1])
    body = forward_of(choice.implementation)
    shape = noisy.shape[:-1]
    settings = chunk_settings(problem)
    kept_indices = noisy.new_full((*shape, problem.support_width), -1, dtype=torch.int32)
    found = noisy.new_zeros((shape.numel(), 3 * len(settings.kinds) + 4), dtype=rows.compute_dtype(noisy, clean))
    for place, chunk in read_chunks(problem, choice, settings):
        found[place] = rows.zero_masked(body(chunk, problem.sides_wanted), mask, place)
        if top_k:
            kept_indices.view(-1, kept_indices.shape[-1])[place] = chunk.indices.masked_fill(~chunk.valid, -1).int()
    values, row_scalars = (one.view(len(one), *shape) for one in finish_values(found, settings))
    if settings.support != "full":
        row_scalars = values.new_zeros(problem.row_scalars_shape)
    return values, kept_indices, row_scalars


@forward.register_fake
def _(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    noisy = problem.noisy
    dtype = rows.compute_dtype(noisy, problem.clean)
    values = noisy.new_empty((len(problem.kind_names), *noisy.shape[:-1]), dtype=dtype)
    kept_indices = noisy.new_empty((*noisy.shape[:-1], problem.support_width), dtype=torch.int32)
    return values, kept_indices, values.new_empty(problem.row_scalars_shape)


class BackwardProblem(NamedTuple):
    """Arguments of the backward operator: the problem, upstream (kinds, ...), and the tensors that forward kept."""

    problem: Problem
    upstream: Tensor
    kept_indices: Tensor
    row_scalars: Tensor | None


@define("divergences_backward", BackwardProblem)
def backward(arguments: BackwardProblem) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the wanted sides; an unwanted gradient has shape (0,)."""
    problem, upstream, kept_indices, row_scalars = arguments
    noisy, clean, mask = problem.noisy, problem.clean, problem.mask
    choice = _choice(problem)
    wanted = problem.sides_wanted
    if choice.implementation == "triton":
        found = kernels.backward(problem, upstream, kept_indices, row_scalars)
        noisy_gradient, clean_gradient = (noisy.new_empty(0) if one is None else one for one in found)
        return noisy_gradient, clean_gradient
    body = dispatch.implementation_of(write_gradients, choice.implementation, one_loop=True)
    size = noisy.shape[-1]
    settings = chunk_settings(problem)
    gradients = rows.empty_gradients(noisy, clean, wanted)
    if mask is not None:
        for gradient in gradients:
            gradient.zero_()
    flat_upstream = upstream.reshape(len(settings.kinds), -1)
    flat_scalars = None
    if row_scalars is not None and settings.support == "full":
        flat_scalars = row_scalars.view(row_scalars.shape[0], -1)
    flat_gradients = [gradient.view(gradient.numel() // size, size) for gradient in gradients]
    for place, chunk in read_chunks(problem, choice, settings, kept_indices):
        # Without a mask a chunk is a slice of the gradient. The result is therefore written in place.
        targets = [
            (gradient[place] if mask is None else gradient.new_empty(chunk.noisy.shape)) if side_wanted else None
            for gradient, side_wanted in zip(flat_gradients, wanted, strict=True)
        ]
        body(chunk, flat_upstream[:, place], targets, None if flat_scalars is None else flat_scalars[:, place])
        for gradient, target in zip(flat_gradients, targets, strict=True):
            if mask is not None and target is not None:
                gradient[place] = rows.zero_masked(target, mask, place)
    return gradients


@backward.register_fake
def _(arguments: BackwardProblem) -> tuple[Tensor, Tensor]:
    problem = arguments.problem
    return rows.empty_gradients(problem.noisy, problem.clean, problem.sides_wanted)


def _setup(ctx: Any, problem: Problem, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, kept_indices, row_scalars = output
    ctx.mark_non_differentiable(kept_indices, row_scalars)
    ctx.set_materialize_grads(False)  # no zeros are made for the outputs without a gradient
    # Only the implementation that made PyTorch's row scalars can use them. Backward may run another implementation
    # unless the choice is pinned.
    pinned = dispatch.pinned(problem.impl)
    useful = _choice(problem).implementation == "triton" or (pinned is not None and not problem.has_support)
    keep(ctx, problem._replace(impl=pinned), kept_indices, row_scalars if useful else None)


def _gradients(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
    if upstream is None:
        return {}
    problem, kept_indices, row_scalars = kept(ctx)
    noisy_wanted, clean_wanted = forward.wanted(ctx, "noisy", "clean")
    if (noisy_wanted and not problem.noisy_wanted) or (clean_wanted and not problem.clean_wanted):
        row_scalars = None
    problem = problem._replace(noisy_wanted=noisy_wanted, clean_wanted=clean_wanted)
    to_noisy, to_clean = backward(BackwardProblem(problem, upstream, kept_indices, row_scalars))
    return {"noisy": to_noisy if noisy_wanted else None, "clean": to_clean if clean_wanted else None}


def _setup_second(ctx: Any, arguments: BackwardProblem, output: tuple[Tensor, Tensor]) -> None:
    keep(ctx, arguments.problem, arguments.upstream, arguments.kept_indices)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> dict[str, Tensor | None]:
    problem, upstream, kept_indices = kept(ctx)
    wanted = problem.sides_wanted
    to_noisy, to_clean, to_upstream = double_backward(
        "divergences",
        problem.impl,
        kernels.refusal_of(problem),
        lambda noisy, clean: definition_values(problem._replace(noisy=noisy, clean=clean), kept_indices),
        (problem.noisy, problem.clean),
        upstream,
        [outer if side_wanted else None for outer, side_wanted in zip(upstream_of_gradients, wanted, strict=True)],
    )
    return {"noisy": to_noisy, "clean": to_clean, "upstream": to_upstream}


forward.register_gradients(_setup, _gradients)
backward.register_gradients(_setup_second, _second_gradients)
