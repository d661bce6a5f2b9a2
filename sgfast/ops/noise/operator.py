"""The registered operator ``sgfast::apply_noise``: implementation, fake, gradients and second gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.double_backward import double_backward, leave_out_unwanted
from sgfast.ops.noise import philox
from sgfast.ops.noise.boxes import Index, add_box, box_gradients, boxes_of, new_sum
from sgfast.ops.noise.definitions import definition_values
from sgfast.ops.noise.normal_draws import standard_normal
from sgfast.ops.operator import define, keep, kept


def triton_refusal(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    noise_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Say why Triton cannot run these arguments, the public function's or the operator's, or return None."""
    refusal = dispatch.triton_device_refusal(input, mean, std, noise_mask, keep_mask)
    if refusal is not None:
        return refusal
    import sgfast_kernels

    walk = sgfast_kernels.noise_walk(input, mean, std, over_leading(noise_mask, input), keep_mask)
    return walk if isinstance(walk, str) else None


def over_leading(noise_mask: Tensor | None, input: Tensor) -> Tensor | None:
    """Make a mask of the input's leading dimensions broadcast over the other dimensions."""
    if noise_mask is None or noise_mask.shape != input.shape[: noise_mask.dim()]:
        return noise_mask
    return noise_mask.view(*noise_mask.shape, *[1] * (input.dim() - noise_mask.dim()))


class Problem(NamedTuple):
    """The arguments of ``sgfast::apply_noise``, checked; means, stds and masks broadcast to the input."""

    input: Tensor
    mean: Tensor
    std: Tensor
    seed: Tensor
    offset: int
    noise_mask: Tensor | None
    keep_mask: Tensor | None
    lowest: float | None
    highest: float | None
    impl: str | None


def _refusal_of(problem: Problem) -> str | None:
    return triton_refusal(problem.input, problem.mean, problem.std, problem.noise_mask, problem.keep_mask)


def _at(problem: Problem, index: Index) -> Problem:
    """The problem of one box."""
    input = problem.input
    mean, std = (one.expand(input.shape)[index] for one in (problem.mean, problem.std))
    masks = (problem.noise_mask, problem.keep_mask)
    noise_mask, keep_mask = (None if one is None else one.expand(input.shape)[index] for one in masks)
    return problem._replace(input=input[index], mean=mean, std=std, noise_mask=noise_mask, keep_mask=keep_mask)


@define("apply_noise", Problem)
def forward(problem: Problem) -> Tensor:
    """Compute the noised tensor, box by box."""
    input, mean, std, seed, offset, noise_mask, keep_mask, lowest, highest, impl = problem
    choice = dispatch.select(impl, _refusal_of(problem))
    if choice.implementation == "triton":
        import sgfast_kernels

        return sgfast_kernels.noise_forward(input, mean, std, seed, offset, noise_mask, keep_mask, lowest, highest)
    keys = philox.round_keys(seed)
    rows.keep_freed_memory(16 * philox.chunk_elements())
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    for index, start, count in boxes_of(input.shape):
        box = _at(problem, index)
        eps = philox.draws(keys, offset, start, count, choice.implementation).view(box.input.shape)
        output[index] = definition_values(
            box.input, box.mean, box.std, eps, box.noise_mask, box.keep_mask, lowest, highest
        )
        # The draws of one box are freed before the next are made.
        del eps
    return output


@forward.register_fake
def _(problem: Problem) -> Tensor:
    return torch.empty_like(problem.input, memory_format=torch.contiguous_format)


class BackwardProblem(NamedTuple):
    """Arguments of the backward operator: the problem and upstream."""

    problem: Problem
    upstream: Tensor
    wanted: Sequence[bool]  # to input, mean and std


@define("apply_noise_backward", BackwardProblem)
def backward(arguments: BackwardProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of input, mean and std; an unwanted gradient has shape (0,)."""
    problem, upstream, wanted = arguments
    input, mean, std, seed, offset, noise_mask, keep_mask, lowest, highest, impl = problem
    choice = dispatch.select(impl, _refusal_of(problem))
    if choice.implementation == "triton":
        import sgfast_kernels

        operands = (upstream, input, mean, std, seed, offset, noise_mask, keep_mask, lowest, highest)
        found = sgfast_kernels.noise_backward(*operands, *wanted)
        to_input, to_mean, to_std = (input.new_empty(0) if one is None else one for one in found)
        return to_input, to_mean, to_std
    keys = philox.round_keys(seed)
    rows.keep_freed_memory(16 * philox.chunk_elements())
    reads_eps = wanted[2] or lowest is not None or highest is not None
    totals = [new_sum(operand, input.shape, needed) for operand, needed in zip((input, mean, std), wanted, strict=True)]
    for index, start, count in boxes_of(input.shape):
        box = _at(problem, index)
        eps = None
        if reads_eps:
            eps = philox.draws(keys, offset, start, count, choice.implementation).view(box.input.shape)
        gradients = box_gradients(
            upstream[index], box.input, box.mean, box.std, eps, box.noise_mask, box.keep_mask, lowest, highest
        )
        for total, gradient, needed in zip(totals, gradients, wanted, strict=True):
            if needed and gradient is not None:
                add_box(total, index, gradient, input.shape)
        # The draws of one box are freed before the next are made.
        del eps, gradients, gradient
    to_input, to_mean, to_std = (
        total.to(operand.dtype).view(operand.shape) if needed else total
        for total, operand, needed in zip(totals, (input, mean, std), wanted, strict=True)
    )
    return to_input, to_mean, to_std


@backward.register_fake
def _(arguments: BackwardProblem) -> tuple[Tensor, Tensor, Tensor]:
    problem = arguments.problem
    to_input, to_mean, to_std = rows.room_for_gradients((problem.input, problem.mean, problem.std), arguments.wanted)
    return to_input, to_mean, to_std


def _setup(ctx: Any, problem: Problem, output: Tensor) -> None:
    keep(ctx, problem._replace(impl=dispatch.pinned(problem.impl)))


def _gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor]:
    (problem,) = kept(ctx)
    to_input, to_mean, to_std = backward(
        BackwardProblem(problem, upstream, forward.wanted(ctx, "input", "mean", "std"))
    )
    return {"input": to_input, "mean": to_mean, "std": to_std}


def _setup_second(ctx: Any, arguments: BackwardProblem, output: tuple[Tensor, Tensor, Tensor]) -> None:
    leave_out_unwanted(ctx, output, arguments.wanted)
    keep(ctx, arguments.problem, arguments.upstream)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> dict[str, Tensor | None]:
    problem, upstream = kept(ctx)
    eps = standard_normal(problem.input.shape, problem.seed, offset=problem.offset, impl=problem.impl)
    masks_and_range = (problem.noise_mask, problem.keep_mask, problem.lowest, problem.highest)
    to_input, to_mean, to_std, to_upstream = double_backward(
        "apply_noise",
        problem.impl,
        _refusal_of(problem),
        lambda input, mean, std: definition_values(input, mean, std, eps, *masks_and_range),
        (problem.input, problem.mean, problem.std),
        upstream,
        upstream_of_gradients,
    )
    return {"input": to_input, "mean": to_mean, "std": to_std, "upstream": to_upstream}


forward.register_gradients(_setup, _gradients)
backward.register_gradients(_setup_second, _second_gradients)
