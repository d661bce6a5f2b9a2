"""The registered operators ``sgfast::linear_divergences`` and its backward.

Forward computes values and, if a loss is asked for, the loss with its gradients: an upstream gradient multiplies them
later, because the sum of rows and the gradient of a row's hidden states are linear in it. Without a loss backward
computes the logits again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch
from sgfast.ops.divergence import kernels
from sgfast.ops.divergence.problem import check_label_values
from sgfast.ops.double_backward import once_differentiable
from sgfast.ops.linear.chunks import solve
from sgfast.ops.linear.gradients import SixTensors
from sgfast.ops.linear.problem import DIFFERENTIABLE, LinearProblem
from sgfast.ops.operator import define, keep, kept

_Output = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


#: What a second backward raises.
NO_DOUBLE_BACKWARD = (
    "divergences of LinearLogits have no double backward; compute the logits (hidden @ weight.T) for it"
)


def _choice(problem: LinearProblem) -> dispatch.Choice:
    """Choose the implementation of the chunks: their logits are contiguous where they are computed here."""
    nothing = problem.noisy.new_empty((0, problem.width), dtype=problem.dtype)
    noisy, clean = (side.input if side.weight is None else nothing for side in problem.sides)
    return dispatch.select(problem.impl, kernels.refusal_of(problem.chunk(slice(0, 0), noisy, clean, 1)))


@define("linear_divergences", LinearProblem)
def forward(problem: LinearProblem) -> _Output:
    """Compute values (kinds, ...), the loss, and the loss's gradients in the order of ``DIFFERENTIABLE``.

    The loss is a scalar for the reduction "sum", (...) for "rows", (0,) for "none". Gradients that nobody asked for,
    and all gradients without a loss, have the shape (0,). The dtypes are those of `kept_dtype`.
    """
    if problem.labels is not None:
        check_label_values(problem.labels, problem.mask, problem.width)
    upstream = None
    if problem.reduction != "none" and any(problem.wanted):
        ones = problem.temperature.new_ones(())
        upstream = _upstream_of_values(problem, ones).reshape(len(problem.factors), problem.row_shape.numel())
    values, gradients = solve(problem, _choice(problem), upstream, kept_dtype)
    values = values.view(len(values), *problem.row_shape)
    return values, _loss(problem, values), *gradients


@forward.register_fake
def _(problem: LinearProblem) -> _Output:
    values = problem.noisy.new_empty((len(problem.kind_names), *problem.row_shape), dtype=problem.dtype)
    shape: Any = {"none": (0,), "rows": problem.row_shape, "sum": ()}[problem.reduction]
    wanted = problem.wanted if problem.reduction != "none" else [False] * len(DIFFERENTIABLE)
    return values, values.new_empty(shape), *_room(problem, wanted, kept_dtype)


def _loss(problem: LinearProblem, values: Tensor) -> Tensor:
    if problem.reduction == "none":
        return values.new_empty(0)
    weighted = _combined(problem, values)
    if problem.reduction == "rows":
        return weighted
    return (weighted if problem.row_weights is None else weighted * problem.row_weights.to(values.dtype)).sum()


def _combined(problem: LinearProblem, values: Tensor) -> Tensor:
    """Return the weighted sum of the kinds, (...)."""
    return torch.stack([value * factor for value, factor in zip(values, problem.factors, strict=True)]).sum(0)


def kept_dtype(index: int, tensor: Tensor) -> torch.dtype:
    """Return the dtype of a gradient between forward and backward.

    A head's gradient is the sum of many rows, so it stays in float32. Hidden states of float16 lack the range for a
    gradient before a loss scale multiplies it.
    """
    if tensor.dtype == torch.float16 or (tensor.dtype == torch.bfloat16 and index not in (0, 3)):
        return torch.float32
    return tensor.dtype


def own_dtype(index: int, tensor: Tensor) -> torch.dtype:
    """Return the dtype of a gradient that is finished."""
    return tensor.dtype


def _room(problem: LinearProblem, wanted: Any, dtype_of: Any) -> SixTensors:
    room = [
        problem.noisy.new_empty(0)
        if tensor is None or not one
        else torch.empty_like(tensor, dtype=dtype_of(index, tensor), memory_format=torch.contiguous_format)
        for index, (tensor, one) in enumerate(zip(problem.differentiable, wanted, strict=True))
    ]
    return tuple(room)  # type: ignore[return-value]


class LinearBackwardProblem(NamedTuple):
    """Arguments of the backward operator: the problem and upstream (kinds, ...)."""

    problem: LinearProblem
    upstream: Tensor


@define("linear_divergences_backward", LinearBackwardProblem)
def backward(arguments: LinearBackwardProblem) -> SixTensors:
    """Compute the gradients of Σ upstream · value in the order of ``DIFFERENTIABLE``; (0,) for an unwanted one."""
    problem, upstream = arguments
    flat = upstream.reshape(len(problem.kind_names), -1).to(problem.dtype)
    _, gradients = solve(problem, _choice(problem), flat, own_dtype)
    return gradients


@backward.register_fake
def _(arguments: LinearBackwardProblem) -> SixTensors:
    return _room(arguments.problem, arguments.problem.wanted, own_dtype)


def _setup(ctx: Any, problem: LinearProblem, output: _Output) -> None:
    values, loss, *gradients = output
    pinned = problem._replace(impl=dispatch.pinned(problem.impl))
    ctx.set_materialize_grads(False)
    if problem.reduction == "none":
        ctx.mark_non_differentiable(loss, *gradients)
        keep(ctx, "none", pinned)
        return
    ctx.mark_non_differentiable(values, *gradients)
    wanted = forward.wanted(ctx, *DIFFERENTIABLE)
    # A graph that was traced for inference may be asked for gradients that forward has not made.
    complete = all(made or not one for made, one in zip(problem.wanted, wanted, strict=True))
    dtypes = [None if tensor is None else tensor.dtype for tensor in problem.differentiable]
    to_weights = None if problem.row_weights is None else _combined(problem, values)
    keep(ctx, problem.reduction, None if complete else pinned, dtypes, to_weights, *gradients)


def _gradients(ctx: Any, to_values: Tensor | None, to_loss: Tensor | None, *_: Tensor | None) -> dict[str, Any]:
    upstream = to_values if ctx.constants[0] == "none" else to_loss
    if upstream is None:
        return {}
    wanted = forward.wanted(ctx, *DIFFERENTIABLE)
    reduction, problem, *rest = kept(ctx)
    found: dict[str, Tensor | None] = {}
    if problem is not None:
        of_values = upstream if reduction == "none" else _upstream_of_values(problem, upstream)
        gradients = backward(LinearBackwardProblem(problem._replace(wanted=wanted), of_values))
        found |= {name: gradient for name, gradient, one in zip(DIFFERENTIABLE, gradients, wanted, strict=True) if one}
    if reduction != "none":
        dtypes, to_weights, *gradients = rest
        for name, gradient, dtype, one in zip(DIFFERENTIABLE, gradients, dtypes, wanted, strict=True):
            if one and problem is None:
                found[name] = _times(gradient, upstream, dtype)
        if to_weights is not None:
            found["row_weights"] = upstream * to_weights
    return once_differentiable(found, NO_DOUBLE_BACKWARD)


def _upstream_of_values(problem: LinearProblem, upstream: Tensor) -> Tensor:
    """Turn the gradient of the loss into that of the values, (kinds, ...)."""
    factors = torch.tensor(problem.factors, dtype=problem.dtype, device=problem.noisy.device)
    rows = upstream.to(problem.dtype).expand(problem.row_shape)
    if problem.row_weights is not None and problem.reduction == "sum":
        rows = rows * problem.row_weights.to(problem.dtype)
    return factors.view(-1, *[1] * rows.dim()) * rows


def _times(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a kept gradient by the upstream gradient of the loss, in place if nobody needs the kept one again."""
    if upstream.dim():
        upstream = upstream[..., None]
    reusable = gradient.dtype == dtype and not torch._C._autograd._get_current_graph_task_keep_graph()
    if reusable and not torch.is_grad_enabled():
        return gradient.mul_(upstream)
    return (gradient * upstream).to(dtype)


forward.register_gradients(_setup, _gradients)
