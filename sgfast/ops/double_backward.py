"""Double backward for operations whose backward is an op of its own.

The PyTorch implementations compute their gradients by formula, in chunks. Second gradients are rarely asked for
(gradient penalties, meta-learning), so autograd takes them through the plain definition instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.ops import dispatch


def double_backward(
    name: str,
    impl: str | None,
    triton_refusal: str | None,
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor,
    upstream_of_gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of Σ gradient · ``upstream_of_gradients`` to ``inputs`` and to ``upstream``.

    The results are None if nothing reached the gradients.

    Args:
        name: the operation, for the error.
        impl: the choice the forward was called with.
        triton_refusal: why Triton would not have run.
        definition: ``definition(*inputs)`` is the differentiable operation, of ``upstream``'s shape.
        inputs: the operation's differentiable inputs.
        upstream: the gradient that reached the operation's output.
        upstream_of_gradients: for each input, the gradient that reached its gradient, or None.

    Raises:
        RuntimeError: the implementation is not ``"torch"``.
    """
    if all(outer is None for outer in upstream_of_gradients):
        return [None] * (len(inputs) + 1)
    implementation = dispatch.select(impl, triton_refusal).implementation
    if implementation != "torch":
        raise RuntimeError(
            f"{name} has no double backward under impl={implementation!r}; use impl='torch' (or use_impl('torch'))"
        )
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        upstream_leaf = upstream.detach().requires_grad_()
        gradients = torch.autograd.grad(definition(*leaves), leaves, upstream_leaf, create_graph=True)
        pairs = [
            (gradient, outer)
            for gradient, outer in zip(gradients, upstream_of_gradients, strict=True)
            if outer is not None
        ]
        return list(
            torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                [*leaves, upstream_leaf],
                [outer for _, outer in pairs],
                allow_unused=True,
            )
        )


def leave_out_unwanted(ctx: Any, gradients: Sequence[Tensor], wanted: Sequence[bool]) -> None:
    """Mark the unwanted gradients of a backward operator as constants.

    Second gradients that do not reach the operator's outputs stay None instead of becoming zeros.
    """
    ctx.mark_non_differentiable(*(one for one, is_wanted in zip(gradients, wanted, strict=True) if not is_wanted))
    ctx.set_materialize_grads(False)


def once_differentiable(found: dict[str, Tensor | None], message: str) -> dict[str, Tensor | None]:
    """Let a second backward raise ``message``, where gradients were computed by formula and have no graph."""
    if not torch.is_grad_enabled():
        return found
    leaves = {name: one.detach().requires_grad_() for name, one in found.items() if one is not None}
    raising = torch._C._functions.DelayedError(message, len(leaves))(*leaves.values())
    outputs = (raising,) if isinstance(raising, Tensor) else raising
    return found | dict(zip(leaves, outputs, strict=True))
