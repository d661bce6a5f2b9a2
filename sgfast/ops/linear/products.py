"""Matrix products of a side: logits from hidden states, and gradients of hidden states and heads from the logits'.

The library's products do the work. Numbers of 16 bits are multiplied in float32 on a CPU: a float32 copy of the head is
made by slices of the vocabulary, within ``scratch`` bytes. On a GPU hidden states and head of one 16-bit dtype are
multiplied as they are, with float32 sums; the gradient of the logits is rounded to that dtype for its two products.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sgfast.ops.linear.problem import Side


def factor_dtype(side: Side, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors of a side's products; the sums have ``dtype``."""
    assert side.weight is not None
    native = side.input.dtype == side.weight.dtype and side.input.device.type != "cpu" and dtype == torch.float32
    return side.input.dtype if native else dtype


def scaled_rows(side: Side, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``scale`` · hidden states (rows, D) as a factor of the products."""
    wide = hidden.to(dtype)
    wide = wide if side.scale == 1 else wide * side.scale
    return wide.to(factor_dtype(side, dtype))


def write_logits(out: Tensor, side: Side, hidden: Tensor, scratch: int, *, with_bias: bool = True) -> None:
    """Write the logits of `scaled_rows` (rows, D) to ``out`` (rows, V)."""
    for columns, weight in _slices(side, hidden, scratch):
        _multiply(hidden, weight.mT, out[:, columns])
    if side.bias is not None and with_bias:
        out.add_(side.bias.to(out.dtype), alpha=side.scale)
    if side.softcap:
        out.div_(side.softcap).tanh_().mul_(side.softcap)


def softcap_slope(logits: Tensor, softcap: float) -> Tensor:
    """Return the derivative of softcap · tanh(z / softcap), from its value."""
    slope = (logits / softcap).square_()
    return slope.neg_().add_(1)


def hidden_gradient(side: Side, gradient: Tensor, hidden: Tensor, scratch: int) -> Tensor:
    """Compute the gradient of hidden states, (rows, D), from the logits' (rows, V)."""
    total = None
    for columns, weight in _slices(side, hidden, scratch, also=gradient):
        part = _multiply(gradient[:, columns].to(weight.dtype), weight, gradient.new_empty(hidden.shape))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total if side.scale == 1 else total.mul_(side.scale)


def add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool, scratch: int) -> None:
    """Add the gradient of the head, from the logits' (rows, V) and `scaled_rows` (rows, D), to ``total`` (V, D).

    ``first`` writes, whatever ``total`` holds.
    """
    if gradient.dtype == hidden.dtype:
        torch.addmm(total, gradient.mT, hidden, beta=0 if first else 1, out=total)
        return
    width = max(1, scratch // (hidden.shape[1] * total.element_size() + len(gradient) * hidden.element_size()))
    for columns in _ranges(len(total), width):
        factor = gradient[:, columns].to(hidden.dtype).mT
        if first:
            _multiply(factor, hidden, total[columns])
        else:
            total[columns].add_(_multiply(factor, hidden, total.new_empty(total[columns].shape)))


def add_bias_gradient(total: Tensor, side: Side, gradient: Tensor) -> None:
    """Add the gradient of the bias, from the logits' (rows, V), to ``total`` (V)."""
    total.add_(gradient.sum(0), alpha=side.scale)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _slices(side: Side, hidden: Tensor, scratch: int, also: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the vocabulary and the head's rows there, as factors.

    A slice is as long as ``scratch`` holds two copies of its rows and, if it needs a copy, of the columns of ``also``:
    the caller still has a slice while the next is made.
    """
    assert side.weight is not None
    bytes_a_row = 0
    if side.weight.dtype != hidden.dtype:
        bytes_a_row += 2 * hidden.shape[1] * hidden.element_size()
    if also is not None and also.dtype != hidden.dtype:
        bytes_a_row += len(also) * hidden.element_size()
    width = max(1, scratch // bytes_a_row) if bytes_a_row else len(side.weight)
    for columns in _ranges(len(side.weight), width):
        yield columns, side.weight[columns].to(hidden.dtype)


def _ranges(total: int, width: int) -> Iterator[slice]:
    for start in range(0, total, width):
        yield slice(start, min(start + width, total))
