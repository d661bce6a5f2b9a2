r"""Kullback–Leibler divergences between all pairs of two sets of diagonal Gaussians, by matrix products.

For N(m, diag σ²) with features f, over the set S_ij of features that a pair (i, j) has in common:

    KL_ij = ½ Σ_{f ∈ S_ij} [ ln(σ_j²/σ_i²) + σ_i²/σ_j² + (m_i − m_j)²/σ_j² − 1 ]

With x = m_i − c, y = m_j − c, ρ = 1/σ_j² (each 0 where masked) and any c, here the mean of both sets at that feature,

    Σ (σ_i² + (x − y)²) ρ = (σ_i² + x²)·ρ + 1·(y² ρ) − 2 x·(y ρ)

are inner products, so that no (A, B, T, D) tensor is ever made. They are taken in float64. Their rounding is at most
(features + 8) 2⁻⁵² times the first two summands: nothing beside a KL of that size, but too much for two Gaussians that
nearly agree 10⁵ σ from c. Pairs that this bound does not prove right to 10⁻⁶ relative or 10⁻⁷ nats a feature, and those
that came out NaN, are summed again term by term: on a CPU all of them, on a GPU, where counting them would stop the
queue, the A + B least certain ones. Negative results (rounding) become 0.

Gradients are matrix products too (``sgfast.ops.gaussian_products``), off by about 10⁻¹⁶ (|m − c| / σ)² of 1/σ. Backward
keeps the inputs and nothing else. There is no Triton kernel: the time goes into float64 matrix products, which PyTorch
hands to the vendor's library.

Inputs (A, T, D) and (B, T, D) in float32, bfloat16, float16 or float64; results in float32 (float64 if an input is).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows, validation
from sgfast.ops.autograd import double_backward, leave_out_unwanted
from sgfast.ops.gaussian_products import Block, Triple, gradients_of_products, products, reference
from sgfast.ops.operator import define, keep, kept

DEFAULT_CHUNK_BYTES = 64 * 2**20
# Bytes for a feature of a Gaussian on its way through the products, and for one of a pair that is summed term by term.
_PRODUCT_BYTES = 96
_DIRECT_BYTES = 96
# What a pair's rounding may amount to before it is summed again.
_RELATIVE, _PER_FEATURE = 1e-6, 1e-7

_DIFFERENTIABLE = ("mean_a", "std_a", "mean_b", "std_b")
_EVERYTHING = (slice(None), slice(None))

# Means, stds (n, T, D) and their mask as the caller gave them.
_Side = tuple[Tensor, Tensor, Tensor | None]


def feature_chunks(like: Tensor, row_count: int, feature_bytes: int, max_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Slices of (positions, features), as many as fit ``row_count`` times: whole positions if one does."""
    _, positions, width = like.shape
    features = max(1, max_bytes // (feature_bytes * max(row_count, 1)))
    step, feature_step = max(1, features // width), min(features, width)
    for first in range(0, positions, step):
        for first_feature in range(0, width, feature_step):
            yield slice(first, first + step), slice(first_feature, first_feature + feature_step)


def _read(side: _Side, chunk: tuple[slice, slice], by_feature: bool, index: Tensor | None = None) -> Triple:
    """Means, stds (n, p, d) and what is used (n, p); ``by_feature``, every feature is a position of width 1."""
    mean, std, mask = side
    mean, std = mean[:, *chunk], std[:, *chunk]
    mask = None if mask is None else mask[:, *chunk[: mask.dim() - 1]]
    if index is not None:
        mean, std = mean.index_select(0, index), std.index_select(0, index)
        mask = None if mask is None else mask.index_select(0, index)
    if mask is None:
        mask = mean.new_ones(mean.shape[:2], dtype=torch.bool)
    if not by_feature:
        return mean, std, mask
    mask = mask if mask.dim() == 3 else mask[..., None].expand(mean.shape)
    return mean.flatten(1)[..., None], std.flatten(1)[..., None], mask.flatten(1)


def _triton_refusal(*_: Any, **__: Any) -> str | None:
    return "pairwise_gaussian_kl is float64 matrix products, which the vendor's library computes"


class _Problem(NamedTuple):
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
        """What has a gradient."""
        return self.mean_a, self.std_a, self.mean_b, self.std_b

    @property
    def a(self) -> _Side:
        """The first side."""
        return self.mean_a, self.std_a, self.mask_a

    @property
    def b(self) -> _Side:
        """The second side."""
        return self.mean_b, self.std_b, self.mask_b

    @property
    def by_feature(self) -> bool:
        """Whether a mask selects single features."""
        return any(mask is not None and mask.dim() == 3 for mask in (self.mask_a, self.mask_b))

    def block(self, chunk: tuple[slice, slice]) -> Block:
        """Both sides at a chunk of features."""
        return *_read(self.a, chunk, self.by_feature), *_read(self.b, chunk, self.by_feature)


@define("pairwise_gaussian_kl", _Problem)
def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    """The divergences and how many features entered them, (A, B) each."""
    mean_a, mean_b = problem.mean_a, problem.mean_b
    choice = dispatch.select(problem.impl, _triton_refusal())
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
    """Indices into the flattened (A, B) of the pairs to sum term by term, in groups of at most A + B."""
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


def _direct(problem: _Problem, pairs: Tensor) -> Tensor:
    """2 KL of some pairs, (pairs,) in float64."""
    columns, by_feature = problem.mean_b.shape[0], problem.by_feature
    twice = torch.zeros(pairs.shape, dtype=torch.float64, device=pairs.device)
    for chunk in feature_chunks(problem.mean_a, pairs.shape[0], _DIRECT_BYTES, problem.max_chunk_bytes):
        some_a = _read(problem.a, chunk, by_feature, pairs // columns)
        some_b = _read(problem.b, chunk, by_feature, pairs % columns)
        twice += reference(*some_a[:2], *some_b[:2], (some_a[2] & some_b[2])[..., None])
    return twice


@_forward.register_fake
def _(problem: _Problem) -> tuple[Tensor, Tensor]:
    shape = (problem.mean_a.shape[0], problem.mean_b.shape[0])
    kl = problem.mean_a.new_empty(shape, dtype=rows.compute_dtype(*problem.tensors))
    return kl, torch.empty_like(kl, dtype=torch.int64)


class _Backward(NamedTuple):
    """What the gradients are computed from: the problem and upstream (A, B)."""

    problem: _Problem
    upstream: Tensor
    wanted: Sequence[bool]  # to mean_a, std_a, mean_b and std_b


@define("pairwise_gaussian_kl_backward", _Backward)
def _backward(arguments: _Backward) -> list[Tensor]:
    """Gradients to the four tensors; an unwanted one comes back empty."""
    problem, upstream, wanted = arguments
    choice = dispatch.select(problem.impl, _triton_refusal())
    body = dispatch.implementation_of(gradients_of_products, choice.implementation)
    upstream = upstream.to(torch.float64)
    gradients = rows.room_for_gradients(problem.tensors, wanted)
    for chunk in feature_chunks(problem.mean_a, sum(upstream.shape), _PRODUCT_BYTES, problem.max_chunk_bytes):
        found = body(problem.block(chunk), upstream)
        for gradient, chunk_gradient, needed in zip(gradients, found, wanted, strict=True):
            if needed:
                gradient[:, *chunk] = chunk_gradient.view(gradient[:, *chunk].shape)
    return gradients


@_backward.register_fake
def _(arguments: _Backward) -> list[Tensor]:
    return rows.room_for_gradients(arguments.problem.tensors, arguments.wanted)


def _setup(ctx: Any, problem: _Problem, output: tuple[Tensor, Tensor]) -> None:
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
            _backward(_Backward(problem, upstream, _forward.wanted(ctx, *_DIFFERENTIABLE))),
            strict=True,
        )
    )


def _setup_second(ctx: Any, arguments: _Backward, output: list[Tensor]) -> None:
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
        _triton_refusal(),
        kl,
        problem.tensors,
        upstream,
        upstream_of_gradients,
    )
    return dict(zip((*_DIFFERENTIABLE, "upstream"), found, strict=True))


_forward.register_gradients(_setup, _gradients)
_backward.register_gradients(_setup_second, _second_gradients)


@dispatch.describe_triton(_triton_refusal)
def pairwise_gaussian_kl(
    mean_a: Tensor,
    std_a: Tensor,
    mean_b: Tensor,
    std_b: Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    *,
    combine_masks: bool = True,
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(N(mean_a[i], std_a[i]²) ‖ N(mean_b[j], std_b[j]²)) of diagonal Gaussians, for every pair (i, j), in nats.

    Args:
        mean_a: (A, T, D), float32, bfloat16, float16 or float64.
        std_a: of ``mean_a``'s shape, positive wherever it is used.
        mean_b: (B, T, D).
        std_b: of ``mean_b``'s shape.
        mask_a: (A, T) or, to select single features, (A, T, D); 1 = used. What is masked never reaches a result
            or a gradient, NaN included.
        mask_b: (B, T) or (B, T, D).
        combine_masks: a pair uses what both masks select; False: what ``mask_a`` selects, whatever ``mask_b`` says.
        max_chunk_bytes: bound on temporaries beyond a few (A, B) matrices in float64; one feature of every Gaussian is
            read at least. Default 64 MiB, or the size of such a matrix.
        impl: see ``sgfast.ops.dispatch``; there is no Triton kernel.

    Returns:
        ``(kl, count)``, (A, B) each: the sums over positions and features, ≥ 0, in float32 (float64 if an input is),
        differentiable with respect to means and stds; and the number of features that entered, int64. A pair with
        nothing in common gives 0 and 0.

    Raises:
        TypeError: an input is not a floating tensor, or a mask is not a tensor.
        ValueError: shapes or devices do not fit.

    Example:
        >>> import torch
        >>> from sgfast.ops import pairwise_gaussian_kl
        >>> mean = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])
        >>> pairwise_gaussian_kl(mean, torch.ones(2, 1, 2), mean, torch.ones(2, 1, 2))
        (tensor([[ 0.0000, 12.5000],
                [12.5000,  0.0000]]), tensor([[2, 2],
                [2, 2]]))
    """
    validation.check_pair("mean_a", mean_a, "std_a", std_a)
    validation.check_pair("mean_b", mean_b, "std_b", std_b, beside=mean_a)
    for name, mean in (("mean_a", mean_a), ("mean_b", mean_b)):
        if mean.dim() != 3 or mean.shape[1:] != mean_a.shape[1:]:
            raise ValueError(
                "mean_a and mean_b must have shapes (A, T, D) and (B, T, D); "
                f"got {tuple(mean_a.shape)} and {tuple(mean_b.shape)}"
            )
        validation.check_device(name, mean, "mean_a", mean_a)
    masks = _feature_mask(mask_a, "mask_a", "mean_a", mean_a), _feature_mask(mask_b, "mask_b", "mean_b", mean_b)
    if not combine_masks:
        masks = masks[0], None
    if max_chunk_bytes is None:
        # Every chunk passes over the (A, B) results: it should be worth it.
        max_bytes = max(DEFAULT_CHUNK_BYTES, 8 * mean_a.shape[0] * mean_b.shape[0])
    else:
        max_bytes = validation.chunk_bytes(max_chunk_bytes)
    dispatch.check_impl(impl)
    dispatch.refuse_forward_mode("pairwise_gaussian_kl", mean_a, std_a, mean_b, std_b)
    kl, count = _forward(_Problem(mean_a, std_a, mean_b, std_b, *masks, max_bytes, impl))
    return kl, count


def _feature_mask(mask: Tensor | None, name: str, like_name: str, like: Tensor) -> Tensor | None:
    """Check a mask of positions, (n, T), or of features, (n, T, D), and return it as bool."""
    if mask is None:
        return None
    validation.check_tensor(name, mask, "a torch.Tensor or None", like)
    if mask.shape not in (like.shape, like.shape[:2]):
        raise ValueError(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, or that without its last dimension; "
            f"got {tuple(mask.shape)}"
        )
    validation.check_device(name, mask, like_name, like)
    return validation.as_bool(name, mask)
