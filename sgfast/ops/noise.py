r"""Seeded Gaussian noise applied to embeddings.

With eps = ``standard_normal(input.shape, seed, offset=offset)``, a noise mask n and a keep mask k:

    apply_noise = where(n, clamp(where(k, input + std·eps, 0) + mean), input)

Arithmetic in float32 (float64 for a float64 input), eps rounded once to the input's dtype, output in the input's
dtype. Unselected elements are the input's, bit for bit; whatever lies there (NaN and inf too) reaches no gradient but
the input's own. For an upstream gradient g, zero where unselected or outside the clamp's range:

    ∂mean = g,   ∂std = where(k, g·eps, 0),   ∂input = where(k, g, 0), and the untouched upstream where unselected

each summed over the dimensions in which mean or std was broadcast. eps is regenerated in backward from the seed;
nothing but the inputs is kept. ``sgfast.ops.philox`` has the stream; the Triton kernels are in
``sgfast_kernels.noise`` and ``sgfast_kernels.noise_backward``.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, philox, rows, validation
from sgfast.ops.autograd import double_backward, leave_out_unwanted
from sgfast.ops.operator import define, keep, kept

_Index = tuple[int | slice, ...]


def reference(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    eps: Tensor,
    noise_mask: Tensor | None,
    keep_mask: Tensor | None,
    lowest: float | None,
    highest: float | None,
) -> Tensor:
    """The operation for given draws, differentiable by autograd."""
    noised = _noised(input, mean, std, eps, keep_mask)
    if lowest is not None or highest is not None:
        noised = noised.clamp(lowest, highest)
    noised = noised.to(input.dtype)
    return noised if noise_mask is None else torch.where(noise_mask, noised, input)


def _noised(input: Tensor, mean: Tensor, std: Tensor, eps: Tensor, keep_mask: Tensor | None) -> Tensor:
    """Every element's value before clamp and selection, in the arithmetic's dtype."""
    dtype = rows.compute_dtype(input)
    noised = (std.to(dtype) * eps.to(input.dtype).to(dtype)).add_(input.to(dtype))
    if keep_mask is not None:
        noised = torch.where(keep_mask, noised, 0)
    return noised.add_(mean.to(dtype))


def _triton_refusal(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    noise_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why Triton cannot run these arguments, in the public function's or the operator's form, or None."""
    refusal = dispatch.triton_device_refusal(input, mean, std, noise_mask, keep_mask)
    if refusal is not None:
        return refusal
    walk = dispatch.kernels().noise_walk(input, mean, std, _over_leading(noise_mask, input), keep_mask)
    return walk if isinstance(walk, str) else None


def _boxes(shape: Sequence[int]) -> Iterator[tuple[_Index, int, int]]:
    """Cut a tensor into boxes that are contiguous in the linear order: (index, first element, number of elements).

    A box fixes the leading dimensions, takes a range of the next one and all of the rest, so that it is a view of a
    tensor of any strides, broadcast ones included.
    """
    split, inner, most = len(shape), 1, philox.chunk_elements()
    while split > 0 and inner * shape[split - 1] <= most:
        split -= 1
        inner *= shape[split]
    if split == 0:
        if inner > 0:
            yield (), 0, inner
        return
    length, step = shape[split - 1], max(1, most // inner)
    for position, outer in enumerate(itertools.product(*map(range, shape[: split - 1]))):
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield (*outer, slice(start, stop)), (position * length + start) * inner, (stop - start) * inner


class _Problem(NamedTuple):
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


def _refusal_of(problem: _Problem) -> str | None:
    return _triton_refusal(problem.input, problem.mean, problem.std, problem.noise_mask, problem.keep_mask)


def _at(problem: _Problem, index: _Index) -> _Problem:
    """The problem of one box."""
    input = problem.input
    mean, std = (one.expand(input.shape)[index] for one in (problem.mean, problem.std))
    masks = (problem.noise_mask, problem.keep_mask)
    noise_mask, keep_mask = (None if one is None else one.expand(input.shape)[index] for one in masks)
    return problem._replace(input=input[index], mean=mean, std=std, noise_mask=noise_mask, keep_mask=keep_mask)


@define("apply_noise", _Problem)
def _forward(problem: _Problem) -> Tensor:
    input, mean, std, seed, offset, noise_mask, keep_mask, lowest, highest, impl = problem
    choice = dispatch.select(impl, _refusal_of(problem))
    if choice.implementation == "triton":
        arguments = (input, mean, std, seed, offset, noise_mask, keep_mask, lowest, highest)
        return dispatch.kernels().noise_forward(*arguments)  # type: ignore[no-any-return]
    keys = philox.round_keys(seed)
    rows.keep_freed_memory(16 * philox.chunk_elements())
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    for index, start, count in _boxes(input.shape):
        box = _at(problem, index)
        eps = philox.draws(keys, offset, start, count, choice.implementation).view(box.input.shape)
        output[index] = reference(box.input, box.mean, box.std, eps, box.noise_mask, box.keep_mask, lowest, highest)
        # Not to be held while the next are drawn.
        del eps
    return output


@_forward.register_fake
def _(problem: _Problem) -> Tensor:
    return torch.empty_like(problem.input, memory_format=torch.contiguous_format)


def _new_sum(like: Tensor, shape: Sequence[int], needed: bool) -> Tensor:
    """Where to collect the gradient of a tensor that was broadcast to ``shape``; (0,) if nobody needs it.

    A tensor of the full shape is written once, in its own dtype. A smaller one gets a contribution from each of
    possibly many thousand boxes: its sum is kept in float64.
    """
    if not needed:
        return like.new_empty(0)
    if like.shape == torch.Size(shape):
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    padded = (1,) * (len(shape) - like.dim()) + tuple(like.shape)
    return like.new_zeros(padded, dtype=torch.float64)


def _add_box(total: Tensor, index: _Index, gradient: Tensor, full: Sequence[int]) -> None:
    """Add a box of the ``full``-shaped gradient, summed over the dimensions that were broadcast."""
    if total.shape == torch.Size(full):
        total[index] = gradient
        return
    # Where the total has size 1, every position of the box falls on the one element.
    within = (
        position if size > 1 else 0 if isinstance(position, int) else slice(None)
        for position, size in zip(index, total.shape, strict=False)
    )
    part = total[tuple(within)]
    part += gradient.sum_to_size(part.shape)


def _box_gradients(
    upstream: Tensor,
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    eps: Tensor | None,
    noise_mask: Tensor | None,
    keep_mask: Tensor | None,
    lowest: float | None,
    highest: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients to input, mean and std, before any sum, in the arithmetic's dtype.

    Without ``eps``, for which nothing may be clamped, there is none to std.
    """
    of_mean = upstream = upstream.to(rows.compute_dtype(input))
    if noise_mask is not None:
        of_mean = torch.where(noise_mask, of_mean, 0)
    if eps is not None and not (lowest is None and highest is None):
        noised = _noised(input, mean, std, eps, keep_mask)
        low, high = -math.inf if lowest is None else lowest, math.inf if highest is None else highest
        of_mean = torch.where((noised >= low) & (noised <= high), of_mean, 0)
    kept = of_mean if keep_mask is None else torch.where(keep_mask, of_mean, 0)
    of_input = kept if noise_mask is None else torch.where(noise_mask, kept, upstream)
    return of_input, of_mean, None if eps is None else kept * eps.to(input.dtype).to(kept.dtype)


class _Backward(NamedTuple):
    """What the gradients are computed from: the problem and upstream."""

    problem: _Problem
    upstream: Tensor
    wanted: Sequence[bool]  # to input, mean and std


@define("apply_noise_backward", _Backward)
def _backward(arguments: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to input, mean and std; an unwanted one comes back empty."""
    problem, upstream, wanted = arguments
    input, mean, std, seed, offset, noise_mask, keep_mask, lowest, highest, impl = problem
    choice = dispatch.select(impl, _refusal_of(problem))
    if choice.implementation == "triton":
        operands = (upstream, input, mean, std, seed, offset, noise_mask, keep_mask, lowest, highest)
        found = dispatch.kernels().noise_backward(*operands, *wanted)
        to_input, to_mean, to_std = (input.new_empty(0) if one is None else one for one in found)
        return to_input, to_mean, to_std
    keys = philox.round_keys(seed)
    rows.keep_freed_memory(16 * philox.chunk_elements())
    reads_eps = wanted[2] or lowest is not None or highest is not None
    totals = [
        _new_sum(operand, input.shape, needed) for operand, needed in zip((input, mean, std), wanted, strict=True)
    ]
    for index, start, count in _boxes(input.shape):
        box = _at(problem, index)
        eps = None
        if reads_eps:
            eps = philox.draws(keys, offset, start, count, choice.implementation).view(box.input.shape)
        gradients = _box_gradients(
            upstream[index], box.input, box.mean, box.std, eps, box.noise_mask, box.keep_mask, lowest, highest
        )
        for total, gradient, needed in zip(totals, gradients, wanted, strict=True):
            if needed and gradient is not None:
                _add_box(total, index, gradient, input.shape)
        # Not to be held while the next are drawn.
        del eps, gradients, gradient
    to_input, to_mean, to_std = (
        total.to(operand.dtype).view(operand.shape) if needed else total
        for total, operand, needed in zip(totals, (input, mean, std), wanted, strict=True)
    )
    return to_input, to_mean, to_std


@_backward.register_fake
def _(arguments: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    problem = arguments.problem
    to_input, to_mean, to_std = rows.room_for_gradients((problem.input, problem.mean, problem.std), arguments.wanted)
    return to_input, to_mean, to_std


def _setup(ctx: Any, problem: _Problem, output: Tensor) -> None:
    keep(ctx, problem._replace(impl=dispatch.pinned(problem.impl)))


def _gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor]:
    (problem,) = kept(ctx)
    to_input, to_mean, to_std = _backward(_Backward(problem, upstream, _forward.wanted(ctx, "input", "mean", "std")))
    return {"input": to_input, "mean": to_mean, "std": to_std}


def _setup_second(ctx: Any, arguments: _Backward, output: tuple[Tensor, Tensor, Tensor]) -> None:
    leave_out_unwanted(ctx, output, arguments.wanted)
    keep(ctx, arguments.problem, arguments.upstream)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> dict[str, Tensor | None]:
    problem, upstream = kept(ctx)
    eps = philox.standard_normal(problem.input.shape, problem.seed, offset=problem.offset, impl=problem.impl)
    masks_and_range = (problem.noise_mask, problem.keep_mask, problem.lowest, problem.highest)
    to_input, to_mean, to_std, to_upstream = double_backward(
        "apply_noise",
        problem.impl,
        _refusal_of(problem),
        lambda input, mean, std: reference(input, mean, std, eps, *masks_and_range),
        (problem.input, problem.mean, problem.std),
        upstream,
        upstream_of_gradients,
    )
    return {"input": to_input, "mean": to_mean, "std": to_std, "upstream": to_upstream}


_forward.register_gradients(_setup, _gradients)
_backward.register_gradients(_setup_second, _second_gradients)


@dispatch.describe_triton(_triton_refusal)
def apply_noise(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int | Tensor,
    offset: int = 0,
    noise_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    value_range: tuple[float | None, float | None] | None = None,
    impl: dispatch.Implementation | None = None,
) -> Tensor:
    """Shift and perturb the selected elements: ``where(n, clamp(where(k, input + std·eps, 0) + mean), input)``.

    Args:
        input: any shape, float32, bfloat16, float16 or float64, any strides.
        mean: floating, broadcastable to the input: the full shape, (D,), (1, T, D), a scalar tensor.
        std: likewise; it is used as it is, negative values included.
        seed: of eps = ``standard_normal(input.shape, seed, offset=offset)``, see there. The draw depends on an
            element's index only, not on strides or masks.
        offset: how many groups of four draws to skip.
        noise_mask: 1 = transform; None transforms everything. A mask with the shape of the input's leading
            dimensions covers those; any other shape must broadcast to the input.
        keep_mask: 1 = keep the feature; elsewhere the mean alone replaces it. It broadcasts to the input.
        value_range: (low or None, high or None), a clamp on transformed elements; outside it their gradient is 0.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        A contiguous tensor of the input's shape and dtype, differentiable with respect to input, mean and std.
        Unselected elements are bit-equal to the input.

    Raises:
        TypeError: an operand is not a floating tensor, a mask not a tensor, seed or offset not an integer.
        ValueError: shapes do not broadcast to the input's, devices differ, seed or offset is out of range, or
            value_range is not an ordered pair.

    Example:
        >>> import torch
        >>> from sgfast.ops.noise import apply_noise
        >>> embeddings, noise_mask = torch.zeros(2, 3), torch.tensor([True, False])
        >>> apply_noise(embeddings, torch.tensor(5.0), torch.tensor(0.1), seed=7, noise_mask=noise_mask)
        tensor([[5.0000, 4.9695, 5.1789],
                [0.0000, 0.0000, 0.0000]])
    """
    validation.check_floating("input", input)
    for name, operand in (("mean", mean), ("std", std)):
        validation.check_floating(name, operand, input)
        _check_broadcast(name, operand, input)
    noise_mask = _boolean_mask("noise_mask", noise_mask, input)
    keep_mask = _boolean_mask("keep_mask", keep_mask, input)
    noise_mask = _over_leading(noise_mask, input)
    if noise_mask is not None:
        _check_broadcast("noise_mask", noise_mask, input)
    if keep_mask is not None:
        _check_broadcast("keep_mask", keep_mask, input)
    lowest, highest = _check_range(value_range)
    philox.check_offset(offset)
    dispatch.check_impl(impl)
    dispatch.refuse_forward_mode("apply_noise", input, mean, std)
    key = philox.seed_tensor(seed, input.device)
    problem = _Problem(input, mean, std, key, offset, noise_mask, keep_mask, lowest, highest, impl)
    noised: Tensor = _forward(problem)
    return noised


def _boolean_mask(name: str, mask: Tensor | None, input: Tensor) -> Tensor | None:
    if mask is None:
        return None
    validation.check_tensor(name, mask, "a torch.Tensor or None", input)
    return validation.as_bool(name, mask)


def _over_leading(noise_mask: Tensor | None, input: Tensor) -> Tensor | None:
    """A mask that has the shape of the input's leading dimensions, made to broadcast over the rest."""
    if noise_mask is None or noise_mask.shape != input.shape[: noise_mask.dim()]:
        return noise_mask
    return noise_mask.view(*noise_mask.shape, *[1] * (input.dim() - noise_mask.dim()))


def _check_broadcast(name: str, tensor: Tensor, input: Tensor) -> None:
    """Check that a tensor lies on the input's device and broadcasts to its shape."""
    validation.check_device(name, tensor, "input", input)
    trailing = input.shape[input.dim() - tensor.dim() :]
    if tensor.dim() > input.dim() or any(
        own not in (1, size) for own, size in zip(tensor.shape, trailing, strict=True)
    ):
        raise ValueError(
            f"{name} must broadcast to the shape of input, {tuple(input.shape)}; got {tuple(tensor.shape)}"
        )


def _check_range(value_range: tuple[float | None, float | None] | None) -> tuple[float | None, float | None]:
    if value_range is None:
        return None, None
    if len(value_range) != 2:
        raise ValueError(f"value_range must be (low or None, high or None); got {value_range}")
    lowest, highest = value_range
    if lowest is not None and highest is not None and not lowest <= highest:
        raise ValueError(f"value_range must have low ≤ high; got {value_range}")
    return lowest, highest
