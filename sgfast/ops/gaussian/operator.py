"""The registered operator ``sgfast::pairwise_gaussian_kl``: implementation, fake, gradients and second gradients."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.double_backward import double_backward, leave_out_unwanted
from sgfast.ops.gaussian.chunks import Side, feature_chunks, read_side
from sgfast.ops.gaussian.products import Block, gradients_of_products, pair_sums, products
from sgfast.ops.operator import define, keep, kept

# Bytes for a Gaussian's feature in the products, and for a feature of a pair that is summed term by term.
_PRODUCT_BYTES = 96
_DIRECT_BYTES = 96
# Largest rounding error that a pair may have without being summed again.
_RELATIVE, _PER_FEATURE = 1e-6, 1e-7

_DIFFERENTIABLE = ("mean_a", "std_a", "mean_b", "std_b")
_EVERYTHING = (slice(None), slice(None))


def triton_refusal(*_: Any, **__: Any) -> str | None:
    """Say why Triton cannot run."""
    return "pairwise_gaussian_kl is float64 matrix products, which the vendor's library computes"


class Problem(NamedTuple):
    """The arguments of ``sgfast::pairwise_gaussian_kl``, checked."""

    mean_a: Tensor
    std_a: Tensor
    mean_b: Tensor
    std_b: Tensor
    mask_a: Tensor | None
    mask_b: Tensor | None
    max_chunk_bytes: int
    impl: str | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that have a gradient."""
        return self.mean_a, self.std_a, self.mean_b, self.std_b

    @property
    def a(self) -> Side:
        """The first side."""
        return self.mean_a, self.std_a, self.mask_a

    @property
    def b(self) -> Side:
        """The second side."""
        return self.mean_b, self.std_b, self.mask_b

    @property
    def by_feature(self) -> bool:
        """True if a mask selects single features."""
        return any(mask is not None and mask.dim() == 3 for mask in (self.mask_a, self.mask_b))

    def block(self, chunk: tuple[slice, slice]) -> Block:
        """Both sides at a chunk of features."""
        return *read_side(self.a, chunk, self.by_feature), *read_side(self.b, chunk, self.by_feature)


@define("pairwise_gaussian_kl", Problem)
def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Compute the divergences and the number of features in each, (A, B) both."""
    mean_a, mean_b = problem.mean_a, problem.mean_b
    choice = dispatch.select(problem.impl, triton_refusal())
    body = dispatch.implementation_of(products, choice.implementation)
    twice, magnitude, count = mean_a.new_zeros((3, mean_a.shape[0], mean_b.shape[0]), dtype=torch.float64)
    for chunk in feature_chunks(mean_a, sum(twice.shape), _PRODUCT_BYTES, problem.max_chunk_bytes):
        block = problem.block(chunk)
        chunk_twice, chunk_magnitude, positions = body(block)
        twice += chunk_twice
        magnitude += chunk_magnitude
        count += positions * block[0].shape[-1]
    for pairs in _uncertain_pairs(twice, magnitude, count, mean_a[0].numel() if twice.numel() else 0):
        twice.view(-1)[pairs] = _direct(problem, pairs)
    kl = (twice / 2).clamp(min=0)
    return kl.to(rows.compute_dtype(*problem.tensors)), count.to(torch.int64)


def _uncertain_pairs(twice: Tensor, magnitude: Tensor, count: Tensor, features: int) -> Iterator[Tensor]:
    """Yield indices into the flattened (A, B) of the pairs to sum term by term, in groups of at most A + B."""
    rounding = (features + 8) * 2.0**-52 * magnitude
    uncertainty = rounding / (_RELATIVE * twice.clamp(min=0) + _PER_FEATURE * count)
    uncertainty = torch.where(count > 0, uncertainty.nan_to_num(torch.inf), 0).flatten()
    step = sum(twice.shape)
    if _on_cpu(twice):
        yield from torch.split((uncertainty > 1).nonzero().squeeze(1), step) if step else ()
    else:
        yield uncertainty.topk(min(step, uncertainty.numel())).indices


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _direct(problem: Problem, pairs: Tensor) -> Tensor:
    """2 KL of some pairs, (pairs,) in float64."""
    columns, by_feature = problem.mean_b.shape[0], problem.by_feature
    twice = torch.zeros(pairs.shape, dtype=torch.float64, device=pairs.device)
    for chunk in feature_chunks(problem.mean_a, pairs.shape[0], _DIRECT_BYTES, problem.max_chunk_bytes):
        some_a = read_side(problem.a, chunk, by_feature, pairs // columns)
        some_b = read_side(problem.b, chunk, by_feature, pairs % columns)
        twice += pair_sums(*some_a[:2], *some_b[:2], (some_a[2] & some_b[2])[..., None])
    return twice


@forward.register_fake
def _(problem: Problem) -> tuple[Tensor, Tensor]:
    shape = (problem.mean_a.shape[0], problem.mean_b.shape[0])
    kl = problem.mean_a.new_empty(shape, dtype=rows.compute_dtype(*problem.tensors))
    return kl, torch.empty_like(kl, dtype=torch.int64)


class BackwardProblem(NamedTuple):
    """Arguments of the backward operator: the problem and upstream (A, B)."""

    problem: Problem
    upstream: Tensor
    wanted: Sequence[bool]  # to mean_a, std_a, mean_b and std_b


@define("pairwise_gaussian_kl_backward", BackwardProblem)
def backward(arguments: BackwardProblem) -> list[Tensor]:
    """Compute the gradients of the four tensors; an unwanted gradient has shape (0,)."""
    problem, upstream, wanted = arguments
    choice = dispatch.select(problem.impl, triton_refusal())
    body = dispatch.implementation_of(gradients_of_products, choice.implementation)
    upstream = upstream.to(torch.float64)
    gradients = rows.room_for_gradients(problem.tensors, wanted)
    for chunk in feature_chunks(problem.mean_a, sum(upstream.shape), _PRODUCT_BYTES, problem.max_chunk_bytes):
        found = body(problem.block(chunk), upstream)
        for gradient, chunk_gradient, needed in zip(gradients, found, wanted, strict=True):
            if needed:
                gradient[:, *chunk] = chunk_gradient.view(gradient[:, *chunk].shape)
    return gradients


@backward.register_fake
def _(arguments: BackwardProblem) -> list[Tensor]:
    return rows.room_for_gradients(arguments.problem.tensors, arguments.wanted)


def _setup(ctx: Any, problem: Problem, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    keep(ctx, problem._replace(impl=dispatch.pinned(problem.impl)))


def _gradients(ctx: Any, upstream: Tensor | None, _: None) -> dict[str, Tensor]:
    if upstream is None:
        return {}
    (problem,) = kept(ctx)
    return dict(
        zip(
            _DIFFERENTIABLE,
            backward(BackwardProblem(problem, upstream, forward.wanted(ctx, *_DIFFERENTIABLE))),
            strict=True,
        )
    )


def _setup_second(ctx: Any, arguments: BackwardProblem, output: list[Tensor]) -> None:
    leave_out_unwanted(ctx, output, arguments.wanted)
    keep(ctx, arguments.problem, arguments.upstream)


def _second_gradients(ctx: Any, upstream_of_gradients: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    problem, upstream = kept(ctx)

    def kl(*tensors: Tensor) -> Tensor:
        twice, _, _ = products(problem._replace(**dict(zip(_DIFFERENTIABLE, tensors, strict=True))).block(_EVERYTHING))
        return (twice / 2).to(upstream.dtype)

    found = double_backward(
        "pairwise_gaussian_kl",
        problem.impl,
        triton_refusal(),
        kl,
        problem.tensors,
        upstream,
        upstream_of_gradients,
    )
    return dict(zip((*_DIFFERENTIABLE, "upstream"), found, strict=True))


forward.register_gradients(_setup, _gradients)
backward.register_gradients(_setup_second, _second_gradients)
