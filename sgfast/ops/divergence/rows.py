"""Row sums of the atoms' terms, and gradients of the logits from the atoms' partial derivatives.

The code runs on one chunk of rows at a time, eagerly or through torch.compile. Tensors that are made here may be reused
in place; the incoming rows are never written to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.ops import rows
from sgfast.ops.divergence.atoms import Chunk, Rest, Rows, Settings, Side, one_side, read_sides
from sgfast.ops.divergence.terms import (
    Atoms,
    finish,
    may_be_infinite,
    nan_to_zero,
    partial_derivative,
    row_sum,
    total_of_rows,
)


class Read(NamedTuple):
    """What forward and backward of a chunk read alike."""

    rows: Rows | None  # None without a divergence
    at_temperature_1: Side | None  # of the noisy side; None without labels


def read(chunk: Chunk) -> Read:
    """Read a chunk for `forward_rows` and `backward_rows`."""
    found = read_sides(chunk, None) if chunk.settings.divergences else None
    noisy_side = None if found is None else found.sides[0]
    return Read(found, None if chunk.labels is None else _at_temperature_1(chunk, noisy_side))


def values_and_gradients(
    chunk: Chunk, upstream: Tensor, sides_wanted: tuple[bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the results of `forward_rows` and of `backward_rows` from one read of the chunk."""
    known = read(chunk)
    return forward_rows(chunk, known=known), backward_rows(chunk, upstream, sides_wanted, known=known)


def forward_rows(
    chunk: Chunk,
    sides_wanted: tuple[bool, bool] = (False, False),
    kept: Sequence[Tensor] | None = None,
    known: Read | None = None,
) -> Tensor:
    """Compute (rows, 3·kinds + 4) for `finish_values`: a sum for each kind, then row scalars.

    The scalars are both sides' maximum and sum and, over the whole vocabulary, two sums of partial derivatives for each
    kind. A scalar that is not computed is 0. ``kept`` holds the `softmax_scalars` if they are known.
    """
    settings, labels = chunk.settings, chunk.labels
    sums, row_scalars, noisy_side = [], [], None
    if settings.divergences:
        (noisy_side, clean_side), _, atoms = (known and known.rows) or read_sides(chunk, kept)
        none = torch.zeros_like(noisy_side.sum)
        row_scalars = [noisy_side.maximum, noisy_side.sum, clean_side.maximum, clean_side.sum]
        for kind in settings.divergences:
            sums.append(row_sum(kind, atoms, settings.beta, settings.skew, settings.support == "truncate"))
            for side, wanted in enumerate(sides_wanted):
                # Uncompiled code finds these sums in backward, where the partial derivatives are computed anyway.
                kept_sum = wanted and settings.support == "full" and torch.compiler.is_compiling()
                row_scalars.append(_partial_sum(kind, side, atoms, settings) if kept_sum else none)
    if labels is not None:
        at_temperature_1 = (known and known.at_temperature_1) or _at_temperature_1(chunk, noisy_side)
        none = torch.zeros_like(at_temperature_1.sum)
        sums.append(_label_cross_entropy(at_temperature_1, labels, settings.label_smoothing))
        row_scalars = row_scalars or [at_temperature_1.maximum, at_temperature_1.sum, none, none]
        row_scalars += [at_temperature_1.sum, none]
    return torch.cat(sums + row_scalars, -1)


def finish_values(found: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Turn the results of `forward_rows`, (rows, …), into values (kinds, rows) and row scalars (4 + 2·kinds, rows)."""
    parts = found.tensor_split([len(settings.kinds)], -1)
    sums, row_scalars = (part.T.clone(memory_format=torch.contiguous_format) for part in parts)
    # A row with a NaN, or with two infinities of one sign, has a NaN sum. The terms may have lost this NaN.
    nan = torch.where((row_scalars[1] >= 0) & (row_scalars[3] >= 0), 0.0, torch.nan).to(sums.dtype)
    for kind, kind_sums in zip(settings.divergences, sums, strict=False):
        finish(kind, kind_sums, settings.beta, settings.skew, settings.support == "truncate").add_(nan)
    return sums, row_scalars


def backward_rows(
    chunk: Chunk,
    upstream: Tensor,
    sides_wanted: tuple[bool, bool],
    row_scalars: Tensor | None = None,
    known: Read | None = None,
) -> list[Tensor | None]:
    """Compute gradients (rows, V) to the wanted sides, in the arithmetic's dtype; ``upstream`` is (kinds, rows).

    ``row_scalars`` come from `forward_rows` of the same implementation. If they are None, they are computed again.
    """
    noisy, clean, scales, settings, indices, _, labels, _ = chunk
    dtype = rows.compute_dtype(noisy, clean)
    kept = None if row_scalars is None else row_scalars[:, :, None].unbind(0)
    noisy_side = None
    gradients: list[Tensor | None] = [
        torch.zeros_like(logits, dtype=dtype) if wanted and not settings.divergences else None
        for logits, wanted in zip((noisy, clean), sides_wanted, strict=True)
    ]
    if settings.divergences:
        sides, rests, atoms = (known and known.rows) or read_sides(chunk, kept)
        noisy_side = sides[0]
        nan = _nan_rows(*sides)
        for i in (0, 1):
            if sides_wanted[i]:
                weights = (upstream[:, :, None] * scales[i] + nan).unbind(0)
                means = kept[4 + i :: 2] if kept and torch.compiler.is_compiling() else None
                probability = (atoms.p, atoms.q)[i]
                partials = _weighted_partials(i, atoms, settings, weights, probability, means)
                outside = None if rests is None else rests[i]
                gradients[i] = _logit_gradient(
                    sides[i], outside, probability, *partials, settings, indices, noisy.shape[-1], means is None
                )
    if labels is not None and gradients[0] is not None:
        at_temperature_1 = known and known.at_temperature_1
        if at_temperature_1 is None:
            at_temperature_1 = _at_temperature_1(chunk, noisy_side, None if kept is None else kept[-2])
        _add_label_gradient(gradients[0], at_temperature_1, labels, upstream[-1], settings.label_smoothing)
    return gradients


def _nan_rows(noisy: Side, clean: Side) -> Tensor:
    """Return NaN for rows with a NaN sum, else 0, (rows, 1).

    A selection is needed because Inductor replaces a product with 0 by 0.
    """
    return torch.where((noisy.sum >= 0) & (clean.sum >= 0), 0.0, torch.nan).to(noisy.sum.dtype)


def _partial(kind: str, side: int, atoms: Atoms, settings: Settings) -> tuple[Tensor | None, Tensor | None]:
    return partial_derivative(kind, side, atoms, settings.beta, settings.skew, settings.support == "truncate")


def _partial_sum(kind: str, side: int, atoms: Atoms, settings: Settings) -> Tensor:
    """Sum one kind's partial derivatives towards one side, (rows, 1)."""
    factor, rest = _partial(kind, side, atoms, settings)
    total = None if factor is None else _mean_factor(factor, (atoms.p, atoms.q)[side])
    if rest is None:
        assert total is not None
        return total
    return total_of_rows(rest) if total is None else total + total_of_rows(rest)


def _mean_factor(factor: Tensor, probability: Tensor) -> Tensor:
    """Compute Σ probability · factor, (rows, 1)."""
    return total_of_rows(nan_to_zero(probability * factor))


def _weighted_partials(
    side: int,
    atoms: Atoms,
    settings: Settings,
    weights: Sequence[Tensor],
    probability: Tensor,
    means: Sequence[Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Sum weight · partial over the kinds, towards one side. Return the factor less its mean, the rest, and the mean.

    The returned factors are finite. A kind whose mean is infinite is left out of the row. Its divergence is infinite
    there (q > 0 where p = 0, or the reverse), and a gradient does not exist.
    """
    factors, rests, shift = None, None, torch.zeros_like(weights[0])
    for i, kind in enumerate(settings.divergences):
        factor, rest = _partial(kind, side, atoms, settings)
        if factor is not None:
            mean = _mean_factor(factor, probability) if means is None else means[i]
            # An atom of probability 0 may have an infinite factor, which would turn the product into NaN.
            factor = factor.clamp(-1e36, 1e36)
            if may_be_infinite(kind, side, settings.skew):
                mean, factor, rest = _without_infinite_rows(mean, factor, rest)
            factor = factor.sub_(mean)
            factors = factor.mul_(weights[i]) if factors is None else factors.addcmul_(factor, weights[i])
            shift = shift + weights[i] * mean
        if rest is not None:
            rests = rest * weights[i] if rests is None else rests.addcmul_(rest, weights[i])
    return factors, rests, shift


def _without_infinite_rows(mean: Tensor, factor: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Set rows whose mean is infinite to 0.

    Such rows are rare and selections are slow on a CPU, so the CPU looks first.
    """
    infinite = mean.abs() == torch.inf
    if mean.device.type == "cpu" and not torch.compiler.is_compiling() and not infinite.any():
        return mean, factor, rest
    rest = None if rest is None else rest.masked_fill(infinite, 0)
    return mean.masked_fill(infinite, 0), factor.masked_fill(infinite, 0), rest


def write_gradients(
    chunk: Chunk, upstream: Tensor, targets: Sequence[Tensor | None], row_scalars: Tensor | None = None
) -> None:
    """Write `backward_rows` to one target for each side (None if not wanted), so that compiled code makes no copy."""
    sides_wanted = (targets[0] is not None, targets[1] is not None)
    gradients = backward_rows(chunk, upstream, sides_wanted, row_scalars)
    for target, gradient in zip(targets, gradients, strict=True):
        if target is not None and gradient is not None:
            target.copy_(gradient)


def _logit_gradient(
    side: Side,
    outside: Rest | None,
    probability: Tensor,
    factor: Tensor | None,
    rest: Tensor | None,
    shift: Tensor,
    settings: Settings,
    indices: Tensor,
    size: int,
    summed: bool,
) -> Tensor:
    """Compute the gradient of the logits from the gradient of the atoms' log-probabilities, (factor + shift)·p + rest.

    With ``summed`` the rounding errors that are left in the row sums are removed. Compiled code takes the means from
    forward and keeps these errors. It would need a second loop to remove them, and memory between the two loops.
    """
    if not summed:
        if factor is None or rest is None:
            part = rest if factor is None else factor.mul_(probability)
            assert part is not None
            return part
        return rest.addcmul_(factor, probability)
    if settings.support != "truncate":
        found, _ = _centred(probability, factor, rest)
        if settings.support == "full":
            return found
        if settings.support == "renormalize":
            return found.new_zeros(found.shape[0], size).scatter_add_(-1, indices, found)
        assert outside is not None
        # The rest's gradient is shared among its logits in proportion to their probabilities.
        rate = torch.where(outside.sum == 0, 0, found[:, -1:] / outside.sum)
        return outside.weights.mul_(rate).scatter_add_(-1, indices, found[:, :-1])
    # The logits left out form one more atom, whose partial derivative is 0.
    left_out = side.probabilities.scatter(-1, indices, 0)
    probability = torch.cat([probability, total_of_rows(left_out)], -1)
    factor = None if factor is None else torch.cat([factor, -shift], -1)
    rest = None if rest is None else torch.cat([rest, torch.zeros_like(shift)], -1)
    found, total = _centred(probability, factor, rest)
    return left_out.mul_(-(shift + total)).scatter_add_(-1, indices, found[:, :-1])


def _centred(probability: Tensor, factor: Tensor | None, rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute p·(factor − Σ p·factor) + rest − p·Σ rest, a new tensor, and the total of both sums, (rows, 1)."""
    if factor is None:
        assert rest is not None
        total = total_of_rows(rest)
        return rest.addcmul_(probability, -total), total
    total = total_of_rows(probability * factor)
    if rest is None:
        return factor.sub_(total).mul_(probability), total
    total = total + total_of_rows(rest)
    return rest.addcmul_(factor.sub_(total), probability), total


def _at_temperature_1(chunk: Chunk, side: Side | None, kept_sum: Tensor | None = None) -> Side:
    """Return the noisy side over the whole vocabulary at temperature 1. ``side`` is used again where possible."""
    dtype = rows.compute_dtype(chunk.noisy, chunk.clean)
    if side is None or chunk.settings.support in ("renormalize", "tail"):
        return one_side(chunk.noisy, 1.0, dtype)
    if chunk.settings.unit_temperature:
        return side
    return one_side(side.logits, 1.0, dtype, None if kept_sum is None else (side.maximum, kept_sum))


def _label_cross_entropy(noisy: Side, labels: Tensor, smoothing: float) -> Tensor:
    """Compute −log softmax(noisy)[label], (rows, 1): 0 for a negative label, NaN for a label outside the vocabulary.

    The share ``smoothing`` of the value is the mean over the vocabulary.
    """
    at_label = noisy.logits.gather(-1, labels.clamp(0, noisy.logits.shape[-1] - 1))
    distance = noisy.maximum - at_label
    if smoothing > 0:
        mean_distance = (noisy.maximum - noisy.logits).mean(-1, keepdim=True)
        distance = mean_distance if smoothing == 1 else (1 - smoothing) * distance + smoothing * mean_distance
    values = noisy.sum.log() + distance
    return torch.where(labels < 0, 0, values) + _nan_outside(labels, noisy)


def _add_label_gradient(gradient: Tensor, noisy: Side, labels: Tensor, upstream: Tensor, smoothing: float) -> None:
    """Add upstream · (softmax(noisy) − (1 − smoothing)·onehot(label) − smoothing / V)."""
    weight = torch.where(labels < 0, 0, upstream[:, None] + _nan_outside(labels, noisy))
    gradient.addcmul_(noisy.probabilities, weight)
    if smoothing > 0:
        gradient.sub_(weight * (smoothing / gradient.shape[-1]))
    gradient.scatter_add_(-1, labels.clamp(0, gradient.shape[-1] - 1), weight * (smoothing - 1))


def _nan_outside(labels: Tensor, noisy: Side) -> Tensor:
    """Return NaN for labels outside the vocabulary, else 0, (rows, 1)."""
    return torch.zeros_like(noisy.maximum).masked_fill(labels >= noisy.logits.shape[-1], torch.nan)
