"""The gradients of hidden states, heads and biases, added up over chunks of rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from sgfast.ops.linear import products
from sgfast.ops.linear.problem import LinearProblem

#: Gradients in the order of `DIFFERENTIABLE`.
SixTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Gradients:
    """The wanted gradients of a problem. A head's gradient is added up in the dtype of the arithmetic."""

    def __init__(self, problem: LinearProblem, asked: bool, dtype_of: Callable[[int, Tensor], torch.dtype]) -> None:
        """Take whether gradients are asked for at all, and the dtype of a finished gradient by index and tensor."""
        self._problem = problem
        tensors = problem.differentiable
        self._wanted = [asked and one for one in problem.wanted]
        self._dtypes = [None if one is None else dtype_of(index, one) for index, one in enumerate(tensors)]
        self._totals: list[Tensor | None] = [
            self._room(index) if one and index in (0, 3) else None for index, one in enumerate(self._wanted)
        ]

    def add(
        self, side_index: int, place: Tensor | slice, gradient: Tensor, factor: Tensor | None, scratch: int
    ) -> None:
        """Add what some rows contribute.

        Args:
            side_index: 0 for the noisy side, 1 for the clean side.
            place: the rows.
            gradient: the gradient of the side's logits there, (rows, V).
            factor: `products.scaled_rows` of the hidden states, (rows, D); None for a side that is given as logits.
            scratch: the bytes that products may use.
        """
        side, at_input = self._problem.sides[side_index], 3 * side_index
        at_weight = 1 if self._problem.tied else at_input + 1
        to_input = self._totals[at_input]
        if to_input is not None:
            found = gradient if factor is None else products.hidden_gradient(side, gradient, factor, scratch)
            to_input.view(-1, found.shape[1])[place] = found.to(to_input.dtype)
        if factor is not None and self._wanted[at_weight]:
            total = self._totals[at_weight]
            first = total is None
            if total is None:
                total = self._totals[at_weight] = gradient.new_empty((gradient.shape[1], factor.shape[1]))
            products.add_weight_gradient(total, gradient, factor, first, scratch)
        if factor is not None and self._wanted[at_weight + 1]:
            total = self._totals[at_weight + 1]
            if total is None:
                total = self._totals[at_weight + 1] = gradient.new_zeros(gradient.shape[1])
            products.add_bias_gradient(total, side, gradient)

    def finished(self) -> SixTensors:
        """Return the gradients; the shape is (0,) for an unwanted one."""
        return tuple(self._finished(index) for index in range(len(self._totals)))  # type: ignore[return-value]

    def _finished(self, index: int) -> Tensor:
        total = self._totals[index]
        if total is None:
            return self._room(index) if self._wanted[index] else self._problem.noisy.new_empty(0)
        self._totals[index] = None  # a total of another dtype is freed before the next is converted
        dtype = self._dtypes[index]
        assert dtype is not None
        return total.to(dtype)

    def _room(self, index: int) -> Tensor:
        """Return zeros for the gradient of an argument; rows that are not read keep them."""
        tensor = self._problem.differentiable[index]
        assert tensor is not None
        return tensor.new_zeros(tensor.shape, dtype=self._dtypes[index])
