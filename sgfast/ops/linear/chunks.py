"""The walk over chunks of rows: logits by products, their divergences, and the gradients of what made the logits."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.linear import products
from sgfast.ops.linear.gradients import Gradients, SixTensors
from sgfast.ops.linear.problem import LinearProblem, Side, share_a_head
from sgfast.ops.linear.rows import solve_rows
from sgfast.ops.precision import full_precision_products

# The share of the bound for what lives beside a chunk's logits: temporaries of the divergences, copies of the heads.
_SCRATCH = 1 / 6


def solve(
    problem: LinearProblem,
    choice: dispatch.Choice,
    upstream: Tensor | None,
    dtype_of: Callable[[int, Tensor], torch.dtype],
) -> tuple[Tensor, SixTensors]:
    """Compute values (kinds, rows) and the wanted gradients of Σ upstream · value.

    Args:
        problem: the sides and what is asked.
        choice: the implementation of the divergences.
        upstream: (kinds, rows); None for no gradients.
        dtype_of: the dtype of a gradient, by its index among `DIFFERENTIABLE` and its tensor.
    """
    with_gradients = upstream is not None
    selected = None if problem.mask is None else problem.mask.reshape(-1).nonzero().squeeze(-1)
    count = problem.row_shape.numel() if selected is None else len(selected)
    values = problem.noisy.new_zeros((len(problem.kind_names), problem.row_shape.numel()), dtype=problem.dtype)
    gradients = Gradients(problem, with_gradients, dtype_of)
    scratch = int(problem.max_chunk_bytes * _SCRATCH)
    height = max(1, (problem.max_chunk_bytes - scratch) // _row_bytes(problem, choice, with_gradients, selected))
    buffers = _Buffers(problem, choice, with_gradients, min(height, max(count, 1)))

    def solve_chunk(place: Tensor | slice) -> None:
        (noisy, clean), factors, difference = _read(problem, choice, place, buffers.logits, scratch)
        values[:, place], logit_gradients = solve_rows(
            problem.chunk(place, noisy, clean, scratch),
            choice,
            None if upstream is None else upstream[:, place],
            [None if target is None else target[: len(noisy)] for target in buffers.targets],
            [side.softcap for side in problem.sides],
            difference,
        )
        for index, gradient in enumerate(logit_gradients):
            if gradient is not None:
                gradients.add(index, place, gradient, factors[index], scratch)

    with full_precision_products(problem.noisy.device):
        for place in _places(count, selected, height):
            solve_chunk(place)  # a function, so that nothing of a chunk lives while the next is read
    return values, gradients.finished()


class _Buffers:
    """Memory that all chunks share.

    Attributes:
        logits: for each side (height, V); None for a side that is given as logits.
        targets: for each side the place for the gradient of the logits, which may be the place of the logits; None if
            the gradient is not wanted, or if kernels make a place for each chunk.
    """

    def __init__(self, problem: LinearProblem, choice: dispatch.Choice, with_gradients: bool, height: int) -> None:
        def room() -> Tensor:
            return problem.noisy.new_empty((height, problem.width), dtype=problem.dtype)

        self.logits = [None if side.weight is None else room() for side in problem.sides]
        wanted = problem.sides_wanted if with_gradients else (False, False)
        self.targets: list[Tensor | None] = []
        for side, logits, one in zip(problem.sides, self.logits, wanted, strict=True):
            if one and not _needs_other_room(problem, choice, side):
                self.targets.append(logits)
            else:
                self.targets.append(room() if one and choice.implementation != "triton" else None)


def _needs_other_room(problem: LinearProblem, choice: dispatch.Choice, side: Side) -> bool:
    """Return True if the gradient of a side's logits cannot be written where the logits are.

    All implementations read what they need before they write, apart from the kernels for a top-k support. A soft cap
    needs the logits after compiled code or a kernel has run.
    """
    if side.weight is None:
        return True
    if choice.implementation == "torch":
        return False
    return side.softcap != 0 or (choice.implementation == "triton" and problem.top_k > 0)


def _row_bytes(problem: LinearProblem, choice: dispatch.Choice, with_gradients: bool, selected: Tensor | None) -> int:
    """Return the bytes of one row of a chunk, without the scratch."""
    size, total = problem.dtype.itemsize, 0
    for side, one in zip(problem.sides, problem.sides_wanted, strict=True):
        total += problem.width * size * (one and with_gradients and _needs_other_room(problem, choice, side))
        if side.weight is None:
            copied = side.input.shape[-1] * side.input.element_size()
            total += rows.copied_bytes(side.input) if selected is None else copied
        else:
            total += problem.width * size
            # The hidden states as they are, wide and scaled, the difference of both sides, and a gradient.
            total += side.input.shape[-1] * (side.input.element_size() + 4 * size)
    return total


def _places(count: int, selected: Tensor | None, height: int) -> Iterator[Tensor | slice]:
    """Yield the rows of each chunk."""
    for start in range(0, count, height):
        place = slice(start, min(start + height, count))
        yield place if selected is None else selected[place]


def _read(
    problem: LinearProblem,
    choice: dispatch.Choice,
    place: Tensor | slice,
    buffers: Sequence[Tensor | None],
    scratch: int,
) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
    """Return both sides' logits (rows, V), the factors of their products, and the difference of the logits.

    The difference is known if the sides share a head. The noisy side's logits are then still the difference where
    `solve_rows` wants the difference; elsewhere they are whole and the difference is None.
    """
    sides, dtype = problem.sides, problem.dtype
    inputs = [rows.read_rows(side.input, place) for side in sides]
    factors = [
        None if side.weight is None else products.scaled_rows(side, one, dtype)
        for side, one in zip(sides, inputs, strict=True)
    ]
    logits = [one if room is None else room[: len(one)] for one, room in zip(inputs, buffers, strict=True)]
    if not share_a_head(*sides):
        for side, factor, out in zip(sides, factors, logits, strict=True):
            if factor is not None:
                products.write_logits(out, side, factor, scratch)
        return logits, factors, None
    noisy, clean = sides
    assert factors[1] is not None
    products.write_logits(logits[1], clean, factors[1], scratch)
    apart = products.scaled_rows(noisy, inputs[0].to(dtype) - inputs[1].to(dtype), dtype)
    products.write_logits(logits[0], noisy, apart, scratch, with_bias=False)
    if choice.implementation == "torch" and problem.clean_temperature is None:
        return logits, factors, logits[0]
    logits[0].add_(logits[1])
    return logits, factors, None
