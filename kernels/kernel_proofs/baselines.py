"""The computation of each launching function of ``kernel_proofs.cases``, written in PyTorch.

The results of every case are compared with these functions, in the interpreter and on a GPU. The GPU programme also
compiles them with torch.compile and times them beside the kernels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.ops.divergence import atoms as divergence_atoms
from sgfast.ops.divergence import rows as divergence_rows
from sgfast.ops.divergence.terms import Atoms, finish, may_be_infinite, nan_to_zero, partial_derivative, row_sum
from sgfast.ops.hidden import rows as hidden_rows
from sgfast.ops.noise import philox
from sgfast.ops.noise.boxes import box_gradients
from sgfast.ops.noise.definitions import definition_values
from sgfast.ops.topk import selection


def _hidden_forward(noisy: Tensor, clean: Tensor, mask: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values, row_scalars = hidden_rows.forward_rows(noisy, clean, eps)
    return torch.where(mask, values, 0), row_scalars


def _hidden_backward(
    noisy: Tensor, clean: Tensor, mask: Tensor, upstream: Tensor, row_scalars: Tensor, eps: float, *needs: bool
) -> tuple[Tensor | None, ...]:
    gradients = hidden_rows.backward_rows(noisy, clean, upstream, row_scalars, eps, *needs)
    return tuple(None if one is None else torch.where(mask[:, None], one, 0).to(noisy.dtype) for one in gradients)


def _lse_pair(noisy: Tensor, clean: Tensor, mask: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    scalars = []
    for side in (noisy, clean):
        maximum = side.float().amax(-1, keepdim=True)
        weights = ((side.float() - maximum) / temperature[:, None]).exp()
        scalars += [maximum.squeeze(-1), weights.sum(-1)]
    return tuple(torch.where(mask, one, 0) for one in scalars)


def _atoms(noisy: Tensor, clean: Tensor, temperature: Tensor, scalars: Sequence[Tensor]) -> Atoms:
    x, y = (side.float() / temperature[:, None] for side in (noisy, clean))
    x_max, x_sum, y_max, y_sum = (one[:, None] for one in scalars)
    log_p = x - x_max / temperature[:, None] - x_sum.log()
    log_q = y - y_max / temperature[:, None] - y_sum.log()
    return Atoms(log_p.exp(), log_q.exp(), (log_p - log_q).nan_to_num(0.0), log_p, reads_half_gaps=True)


def _partials(kind: str, atoms: Atoms, beta: float, skew: float, truncated: bool) -> list[Tensor]:
    """The partial derivatives of one kind with respect to log p and log q."""
    found = []
    for side, probability in enumerate((atoms.p, atoms.q)):
        factor, rest = partial_derivative(kind, side, atoms, beta, skew, truncated)
        partial = torch.zeros_like(probability) if factor is None else nan_to_zero(probability * factor)
        partial = partial if rest is None else partial + rest
        infinite = partial.sum(-1, keepdim=True).abs() == torch.inf
        found.append(partial.masked_fill(infinite, 0) if may_be_infinite(kind, side, skew) else partial)
    return found


def _divergence_forward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor,
    temperature: Tensor,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lse = _lse_pair(noisy, clean, mask, temperature)
    atoms = _atoms(noisy, clean, temperature, lse)
    values, sums = [], []
    for kind in kinds:
        if kind == "label_cross_entropy":
            taken = noisy.float().gather(-1, labels[:, None])[:, 0]
            values.append(noisy.float().logsumexp(-1) - taken)
            sums += [(noisy.float() - noisy.float().amax(-1, keepdim=True)).exp().sum(-1), torch.zeros_like(taken)]
        else:
            values.append(finish(kind, row_sum(kind, atoms, beta, skew, False)[:, 0], beta, skew, False))
            sums += [partial.sum(-1) for partial in _partials(kind, atoms, beta, skew, False)]
    return torch.where(mask, torch.stack(values), 0), torch.where(mask, torch.stack([*lse, *sums]), 0)


def _divergence_backward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor,
    temperature: Tensor,
    upstream: Tensor,
    row_scalars: Tensor,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    needs_noisy: bool,
    needs_clean: bool,
    labels: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    atoms = _atoms(noisy, clean, temperature, row_scalars[:4].unbind(0))
    totals = [torch.zeros_like(atoms.p), torch.zeros_like(atoms.q)]
    label_gradient = torch.zeros_like(atoms.p)
    for i, kind in enumerate(kinds):
        if kind == "label_cross_entropy":
            weights = (noisy.float() - row_scalars[0][:, None]).exp() / row_scalars[4 + 2 * i][:, None]
            at_label = torch.arange(noisy.shape[-1], device=noisy.device) == labels[:, None]
            label_gradient = upstream[i][:, None] * (weights - at_label.float())
            continue
        for side, partial in enumerate(_partials(kind, atoms, beta, skew, False)):
            probability, taken_off = (atoms.p, atoms.q)[side], row_scalars[4 + 2 * i + side][:, None]
            totals[side] = totals[side] + upstream[i][:, None] * (partial - probability * taken_off)
    return tuple(
        torch.where(mask[:, None], total / temperature[:, None] + extra, 0).to(noisy.dtype) if needed else None
        for total, extra, needed in zip(totals, (label_gradient, 0), (needs_noisy, needs_clean), strict=True)
    )


def _top_k_union(noisy: Tensor, clean: Tensor, mask: Tensor, temperature: Tensor, k: int) -> tuple[Tensor, Tensor]:
    indices, valid = selection.union_of_top_k(noisy, clean, k)
    sides = []
    for side in (noisy, clean):
        first = selection.top_k_indices(side, k)
        last = first[:, -1:]
        parts = []
        for part in (side.float(), side.float().scatter(-1, first, -torch.inf)):
            maximum = part.amax(-1)
            parts += [maximum, ((part - maximum[:, None]) / temperature[:, None]).exp().sum(-1)]
        sides.append(torch.stack([*parts, side.gather(-1, last).squeeze(-1).float(), last.squeeze(-1).float()]))
    return torch.where(valid & mask[:, None], indices, -1).int(), torch.stack(sides)


def _divergence_topk_forward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor,
    temperature: Tensor,
    k: int,
    support: str,
    kinds: Sequence[str],
    beta: float,
    skew: float,
) -> tuple[Tensor, Tensor, Tensor]:
    union, masses = _top_k_union(noisy, clean, mask, temperature, k)
    indices, valid = selection.unpack_union(union)
    settings = divergence_atoms.Settings(tuple(kinds), support, beta, skew)
    chunk = divergence_atoms.Chunk(noisy, clean, (1 / temperature[:, None],) * 2, settings, indices, valid)
    found = divergence_rows.forward_rows(chunk)
    values, _ = divergence_rows.finish_values(found, settings)
    inside, _, atoms = divergence_atoms.read_sides(chunk, None)
    scalars = [masses[0, 0], inside[0].sum[:, 0], masses[1, 0], inside[1].sum[:, 0]]
    for side, (_, _, largest, *_) in zip((noisy, clean), masses, strict=True):
        outside = side.float().scatter(-1, indices, -torch.inf)
        weights = ((outside - largest[:, None]) / temperature[:, None]).exp().sum(-1)
        scalars += [largest, weights] if support == "tail" else [torch.zeros_like(weights)] * 2
    for kind in kinds:
        both = _partials(kind, atoms, beta, skew, support == "truncate")
        for probability, partial in zip((atoms.p, atoms.q), both, strict=True):
            total = partial.sum(-1)
            at_tail = partial[:, -1] - probability[:, -1] * total
            scalars.append({"truncate": -total, "renormalize": torch.zeros_like(total), "tail": at_tail}[support])
    return torch.where(mask, values, 0), union, torch.where(mask, torch.stack(scalars), 0)


def _divergence_topk_backward(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor,
    temperature: Tensor,
    upstream: Tensor,
    union: Tensor,
    row_scalars: Tensor,
    support: str,
    kinds: Sequence[str],
    beta: float,
    skew: float,
    *needs: bool,
) -> tuple[Tensor | None, ...]:
    indices, valid = selection.unpack_union(union)
    settings = divergence_atoms.Settings(tuple(kinds), support, beta, skew)
    chunk = divergence_atoms.Chunk(noisy, clean, (1 / temperature[:, None],) * 2, settings, indices, valid)
    found, gradients = divergence_rows.backward_rows(chunk, upstream, needs), []
    for i, (side, gradient) in enumerate(zip((noisy, clean), found, strict=True)):
        if gradient is None:
            gradients.append(None)
            continue
        inside = torch.zeros_like(gradient, dtype=torch.bool).scatter(-1, indices, True)
        # Outside the support the kernel multiplies the row scalars of forward, which are arbitrary in these cases.
        first = 2 * i + (4 if support == "tail" else 0)
        largest, total = row_scalars[first][:, None], row_scalars[first + 1][:, None]
        rate = (upstream * row_scalars[8 + i :: 2]).sum(0)[:, None] / temperature[:, None]
        outside = ((side.float() - largest) / temperature[:, None]).exp() / total * rate
        outside = torch.zeros_like(outside) if support == "renormalize" else outside
        gradient = torch.where(inside, gradient, outside)
        gradients.append(torch.where(mask[:, None], gradient, 0).to(side.dtype))
    return tuple(gradients)


def _keys_and_bounds(
    queries: Tensor,
    squares: Tensor,
    norms: Tensor,
    table: Tensor,
    scale: Tensor | None,
    center: Tensor,
    sign: int,
    bound: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    points = table.float() * (1 if scale is None else scale[:, None]) - center
    keys = sign * (points.square().sum(1) - 2 * queries @ points.T)
    reach = norms + points.norm(dim=1).amax()
    return keys, (reach * (bound[0] * reach + bound[1]) + bound[2])[:, None]


def _nearest_candidates(*arguments: Any) -> tuple[Tensor, Tensor]:
    *sides, count = arguments
    keys, bounds = _keys_and_bounds(*sides)
    return tuple((keys - bounds).topk(count, largest=False))  # type: ignore[return-value]


def _rank_candidates(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *sides, bound, count, limits = arguments
    keys, bounds = _keys_and_bounds(*sides, 1, bound)
    before = keys + bounds < limits[0][:, None]
    undecided = ~before & (keys - bounds <= limits[1][:, None])
    first = torch.where(undecided, keys, torch.inf).topk(count, largest=False)
    return before.sum(1), undecided.sum(1), torch.where(first.values.isfinite(), first.indices, -1)


def _noise_forward(
    input: Tensor, mean: Tensor, std: Tensor, seed: Tensor, offset: int, *masks_and_bounds: Any
) -> Tensor:
    eps = _standard_normal(seed, input.shape, offset, torch.float32)
    return definition_values(input, mean, std, eps, *masks_and_bounds)


def _noise_backward(
    upstream: Tensor, input: Tensor, mean: Tensor, std: Tensor, seed: Tensor, offset: int, *rest: Any
) -> tuple[Tensor | None, ...]:
    eps = _standard_normal(seed, input.shape, offset, torch.float32)
    *masks_and_bounds, needs_input, needs_mean, needs_std = rest
    gradients = box_gradients(upstream, input, mean, std, eps, *masks_and_bounds)
    needs = zip((input, mean, std), gradients, (needs_input, needs_mean, needs_std), strict=True)
    return tuple(one.sum_to_size(like.shape).to(like.dtype) if needed else None for like, one, needed in needs)


def _standard_normal(seed: Tensor, shape: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    return philox.normals(offset, count // 4 + 1, philox.round_keys(seed))[:count].view(shape).to(dtype)


# The name of each function that cases launch, with the function that computes the same in PyTorch.
BASELINES: dict[str, Callable[..., Any]] = {
    "hidden_forward": _hidden_forward,
    "hidden_backward": _hidden_backward,
    "lse_pair": lambda *arguments: torch.stack(_lse_pair(*arguments)),
    "divergence_forward": _divergence_forward,
    "divergence_backward": _divergence_backward,
    "top_k_union": _top_k_union,
    "divergence_topk_forward": _divergence_topk_forward,
    "divergence_topk_backward": _divergence_topk_backward,
    "nearest_candidates": _nearest_candidates,
    "rank_candidates": _rank_candidates,
    "noise_forward": _noise_forward,
    "noise_backward": _noise_backward,
    "standard_normal": _standard_normal,
}


def assert_equal_results(
    function: Callable[..., Any], baseline: Callable[..., Any], arguments: Sequence[Any], jumps: float = 0.0
) -> None:
    """Check that two functions compute the same, up to the rounding of sums and of bfloat16.

    A share ``jumps`` of the elements may differ by more: one of their intermediate values was rounded or clamped the
    other way.
    """
    for one, other in zip(function(*arguments), baseline(*arguments), strict=True):
        if one is None and other is None:
            continue
        if jumps > 0 and one.shape == other.shape:
            close = torch.isclose(one, other, rtol=1e-2, atol=1e-4)
            assert (~close).float().mean() <= jumps
            other = torch.where(close, other, one)
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
