r"""Squared distance between the Gram matrices of two layers of a student and of a teacher, sample by sample.

For layers A, A' (student) and B, B' (teacher) of one sample, each (L, D), and weights w of its positions:

    features     G = Σ_i w_i A_iᵀ A'_i − Σ_i w_i B_iᵀ B'_i                  (D, D')    value = Σ G²
    positions    G = A A'ᵀ / D_A − B B'ᵀ / D_B                             (L, L)     value = Σ w_i w_j G_ij²

Both forms are G = XᵀY of stacked factors. If the sides have one shape, the factors are

    X = [A − B; B],    Y = [A'; A' − B']

These factors keep the digits of G where student and teacher are close. For X of shape (K, U) and Y of shape (K, V),

    Σ_uv G_uv² = Σ_kl (X Xᵀ)_kl (Y Yᵀ)_kl

so the value can be computed from U·V numbers or from K·K numbers. The computation takes the form with fewer products.
The matrix is never held whole: a block of its rows is made, used and dropped. Backward makes the blocks again.
Gradients, with the weights on the diagonal of W:

    ∂/∂X = 2 Y W Gᵀ W = 2 (Y W Yᵀ) X W,    ∂/∂Y = 2 X W G W = 2 (X W Xᵀ) Y W

Products are in float32 (float64 if an input is), whatever autocast and TF32 say. Nothing is kept besides the inputs.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.double_backward import double_backward, leave_out_unwanted
from sgfast.ops.operator import define, keep, kept
from sgfast.ops.precision import full_precision_products

Form = Literal["features", "positions"]

_Layers = tuple[Tensor, Tensor, Tensor, Tensor]


class _Factors(NamedTuple):
    """G = XᵀY of one sample, and the weights of G's rows and columns (None: all 1)."""

    x: Tensor  # (K, U)
    y: Tensor  # (K, V)
    weights: Tensor | None  # (U,), where U = V


def reference(weights: Tensor, form: str, *layers: Tensor) -> Tensor:
    """Compute the definition with whole Gram matrices: (B,)."""
    student, student_to, teacher, teacher_to = (
        torch.where(weights[..., None] == 0, 0, side.to(weights.dtype)) for side in layers
    )
    if form == "features":
        weighted = weights[..., None]
        gram = (weighted * student).mT @ student_to - (weighted * teacher).mT @ teacher_to
        return gram.square().sum((1, 2))
    gram = student @ student_to.mT / student.shape[-1] - teacher @ teacher_to.mT / teacher.shape[-1]
    return (gram.square() * weights[:, :, None] * weights[:, None, :]).sum((1, 2))


def _factors(layers: _Layers, weights: Tensor, form: str) -> _Factors:
    """Return the stacked factors of one sample, without the positions of weight 0, whose values may be NaN."""
    student, student_to, teacher, teacher_to = (
        torch.where(weights[:, None] == 0, 0, side.to(weights.dtype)) for side in layers
    )
    if form == "features":
        x = torch.cat([student - teacher, teacher]) * torch.cat([weights, weights])[:, None]
        return _Factors(x, torch.cat([student_to, student_to - teacher_to]), None)
    if student.shape == teacher.shape:
        x = torch.cat([student - teacher, teacher], 1) / student.shape[1]
        return _Factors(x.T, torch.cat([student_to, student_to - teacher_to], 1).T, weights)
    x = torch.cat([student / student.shape[1], -teacher / teacher.shape[1]], 1)
    return _Factors(x.T, torch.cat([student_to, teacher_to], 1).T, weights)


def _layer_gradients(to_x: Tensor, to_y: Tensor, layers: _Layers, weights: Tensor, form: str) -> list[Tensor]:
    """Turn the gradients of the factors into the gradients of the four layers, (L, D) each."""
    if form == "positions":
        to_x, to_y = to_x.T, to_y.T
    first, second = layers[0], layers[2]
    stacked = 0 if form == "features" else 1
    x_parts, y_parts = (
        torch.split(one, [first.shape[stacked], second.shape[stacked]], stacked) for one in (to_x, to_y)
    )
    if first.shape == second.shape:
        scale = weights[:, None] if form == "features" else 1 / first.shape[1]
        gradients = [x_parts[0] * scale, y_parts[0] + y_parts[1], (x_parts[1] - x_parts[0]) * scale, -y_parts[1]]
    else:
        gradients = [x_parts[0] / first.shape[1], y_parts[0], -x_parts[1] / second.shape[1], y_parts[1]]
    return [torch.where(weights[:, None] == 0, 0, gradient) for gradient in gradients]


def _scaled(factor: Tensor, weights: Tensor | None) -> Tensor:
    return factor if weights is None else factor * weights


def _direct_value(x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None) -> Tensor:
    squares = (x.T @ y).square()
    return _scaled(_scaled(squares, y_weights).sum(1), x_weights).sum()


def _dual_value(x: Tensor, y: Tensor, x_rows: Tensor, y_rows: Tensor, weights: Tensor | None) -> Tensor:
    return ((_scaled(x_rows, weights) @ x.T) * (_scaled(y_rows, weights) @ y.T)).sum()


def _prefers_dual(factors: _Factors) -> bool:
    depth, width, height = factors.x.shape[0], factors.x.shape[1], factors.y.shape[1]
    return depth * (width + height) < width * height


def _blocks(length: int, row: int, itemsize: int) -> Iterator[slice]:
    """Cut the rows of a (length, row) matrix into blocks. Two blocks fit into the bytes for temporaries."""
    step = max(1, rows.DEFAULT_CHUNK_BYTES // max(2 * row * itemsize, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _sample_value(factors: _Factors, compile_or_not: Callable[[Any], Any]) -> Tensor:
    x, y, weights = factors
    value = x.new_zeros(())
    if _prefers_dual(factors):
        body = compile_or_not(_dual_value)
        for block in _blocks(x.shape[0], x.shape[0], x.itemsize):
            value = value + body(x, y, x[block], y[block], weights)
        return value.clamp(min=0)  # a sum of squares, which rounding may leave below 0
    body = compile_or_not(_direct_value)
    for block in _blocks(x.shape[1], y.shape[1], x.itemsize):
        value = value + body(x[:, block], y, None if weights is None else weights[block], weights)
    return value


def _factor_gradients(factors: _Factors, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x, y, weights = factors
    to_x, to_y = torch.zeros_like(x), torch.zeros_like(y)
    if _prefers_dual(factors):
        weighted_x, weighted_y = _scaled(x, weights), _scaled(y, weights)
        for block in _blocks(x.shape[0], x.shape[0], x.itemsize):
            to_x[block] = (weighted_y[block] @ y.T) @ weighted_x
            to_y[block] = (weighted_x[block] @ x.T) @ weighted_y
    else:
        for block in _blocks(x.shape[1], y.shape[1], x.itemsize):
            gram = _scaled(x[:, block].T @ y, weights)
            if weights is not None:
                gram = gram * weights[block, None]
            to_x[:, block] = y @ gram.T
            to_y += x[:, block] @ gram
    return to_x * (2 * upstream), to_y * (2 * upstream)


def _triton_refusal() -> str:
    return "there is no Triton kernel for TextBrewer's presets"


_LAYERS = ("student", "student_to", "teacher", "teacher_to")


class _Problem(NamedTuple):
    """The arguments of ``sgfast::gram_distance``, checked by the caller."""

    student: Tensor
    student_to: Tensor
    teacher: Tensor
    teacher_to: Tensor
    weights: Tensor
    form: str
    impl: str | None

    @property
    def layers(self) -> _Layers:
        """The tensors that have a gradient."""
        return self.student, self.student_to, self.teacher, self.teacher_to


@define("gram_distance", _Problem)
def _forward(problem: _Problem) -> Tensor:
    """Values (B,)."""
    implementation = dispatch.select(problem.impl, _triton_refusal()).implementation
    weights = problem.weights
    values = weights.new_zeros(weights.shape[0])
    with full_precision_products(weights.device):
        for sample, layers in enumerate(zip(*problem.layers, strict=True)):
            factors = _factors(layers, weights[sample], problem.form)
            values[sample] = _sample_value(factors, lambda body: dispatch.implementation_of(body, implementation))
    return values


@_forward.register_fake
def _(problem: _Problem) -> Tensor:
    return problem.weights.new_empty(problem.weights.shape[0])


class _Backward(NamedTuple):
    """The arguments of the backward operator: the problem and upstream (B,)."""

    problem: _Problem
    upstream: Tensor
    wanted: Sequence[bool]  # to each of the four layers


@define("gram_distance_backward", _Backward)
def _backward(arguments: _Backward) -> list[Tensor]:
    """Compute the gradients to the four layers. A gradient that nobody asked for is empty.

    Forward has refused an ``impl`` that cannot run. Every other ``impl`` takes PyTorch's products.
    """
    problem, upstream, wanted = arguments
    form, weights = problem.form, problem.weights
    gradients = rows.room_for_gradients(problem.layers, wanted)
    with full_precision_products(weights.device):
        for sample, layers in enumerate(zip(*problem.layers, strict=True)):
            of_factors = _factor_gradients(_factors(layers, weights[sample], form), upstream[sample])
            found = _layer_gradients(*of_factors, layers, weights[sample], form)
            for gradient, needed, one in zip(gradients, wanted, found, strict=True):
                if needed:
                    gradient[sample] = one.to(gradient.dtype)
    return gradients


@_backward.register_fake
def _(arguments: _Backward) -> list[Tensor]:
    return rows.room_for_gradients(arguments.problem.layers, arguments.wanted)


def _setup(ctx: Any, problem: _Problem, output: Tensor) -> None:
    keep(ctx, problem)


def _gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor]:
    (problem,) = kept(ctx)
    found = _backward(_Backward(problem, upstream, _forward.wanted(ctx, *_LAYERS)))
    return dict(zip(_LAYERS, found, strict=True))


def _setup_second(ctx: Any, arguments: _Backward, output: list[Tensor]) -> None:
    leave_out_unwanted(ctx, output, arguments.wanted)
    keep(ctx, arguments.problem, arguments.upstream)


def _second_gradients(ctx: Any, upstream_of_gradients: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    problem, upstream = kept(ctx)
    found = double_backward(
        "the presets' losses",
        "torch",
        _triton_refusal(),
        functools.partial(reference, problem.weights, problem.form),
        problem.layers,
        upstream,
        upstream_of_gradients,
    )
    return dict(zip((*_LAYERS, "upstream"), found, strict=True))


_forward.register_gradients(_setup, _gradients)
_backward.register_gradients(_setup_second, _second_gradients)


def gram_distance(
    student: Tensor, student_to: Tensor, teacher: Tensor, teacher_to: Tensor, weights: Tensor, form: Form
) -> Tensor:
    """Compute one value per sample. The formulas are at the top of this module.

    Args:
        student: (B, L, D_A), checked by the caller.
        student_to: (B, L, D_A'), the second layer; D_A' = D_A for ``positions``.
        teacher: (B, L, D_B), of the student's shape for ``features``.
        teacher_to: the teacher's second layer.
        weights: (B, L) in the arithmetic's dtype. Positions of weight 0 add nothing, even if their values are NaN.
        form: ``features`` or ``positions``.

    Returns:
        (B,), float32 or float64.
    """
    dispatch.refuse_forward_mode("the presets' losses", student, student_to, teacher, teacher_to)
    values: Tensor = _forward(_Problem(student, student_to, teacher, teacher_to, weights, form, None))
    return values
