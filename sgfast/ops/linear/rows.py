"""The divergences of a chunk whose logits are computed, and the gradient of these logits."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from sgfast.ops import dispatch
from sgfast.ops.divergence import kernels
from sgfast.ops.divergence.chunks import chunk_settings, forward_of, read_chunks
from sgfast.ops.divergence.problem import Problem
from sgfast.ops.divergence.rows import finish_values, values_and_gradients, write_gradients
from sgfast.ops.linear.products import softcap_slope

# Rows are read in pieces of this many numbers where a temporary of a whole chunk would be large.
_NUMBERS_AT_ONCE = 64 * 1024


def solve_rows(
    problem: Problem,
    choice: dispatch.Choice,
    upstream: Tensor | None,
    targets: Sequence[Tensor | None],
    softcaps: Sequence[float],
    difference: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Compute values (kinds, rows) and the gradients of Σ upstream · value to both sides' logits before a soft cap.

    Args:
        problem: the chunk's logits and what is asked.
        choice: the implementation.
        upstream: (kinds, rows); None for no gradients.
        targets: for each side the place for its gradient. The place may be the side's logits. None for no gradient,
            and for a kernel that makes the place itself.
        softcaps: of both sides; 0 for none.
        difference: the noisy less the clean logits, if they are known better than the logits are; then
            ``problem.noisy`` is the difference too.
    """
    if choice.implementation == "triton":
        return _solve_by_kernels(problem, upstream, targets, softcaps)
    settings = chunk_settings(problem)
    wanted = targets[0] is not None, targets[1] is not None
    sums = problem.noisy.new_zeros((len(problem.noisy), 3 * len(settings.kinds) + 4), dtype=problem.temperature.dtype)
    forward = forward_of(choice.implementation)
    backward = dispatch.implementation_of(write_gradients, choice.implementation, one_loop=True)
    both = upstream is not None and any(wanted)
    for place, chunk in read_chunks(problem, choice, settings, difference=difference, both=both):
        if upstream is None or not any(wanted):
            sums[place] = forward(chunk, (False, False))
        elif choice.implementation == "compile":
            sums[place] = forward(chunk, wanted)
            scalars = finish_values(sums[place], settings)[1] if settings.support == "full" else None
            parts = [
                None if target is None else _part(target, place, whole, logits)
                for target, whole, logits in zip(
                    targets, (problem.noisy, problem.clean), (chunk.noisy, chunk.clean), strict=True
                )
            ]
            backward(chunk, upstream[:, place], parts, scalars)
            for part, logits, softcap in zip(parts, (chunk.noisy, chunk.clean), softcaps, strict=True):
                if part is not None:
                    _through_softcap(part, logits, softcap)
        else:
            sums[place], gradients = values_and_gradients(chunk, upstream[:, place], wanted)
            sides = zip(targets, gradients, (chunk.noisy, chunk.clean), softcaps, strict=True)
            for target, gradient, logits, softcap in sides:
                if target is not None and gradient is not None:
                    _through_softcap(gradient, logits, softcap)
                    target[place] = gradient
    return finish_values(sums, settings)[0], targets


def _part(target: Tensor, place: Tensor | slice, whole: Tensor, logits: Tensor) -> Tensor:
    """Return the rows of a target. The rows of the logits themselves are one tensor, as torch.compile needs it."""
    return logits if target.data_ptr() == whole.data_ptr() else target[place]


def _solve_by_kernels(
    problem: Problem, upstream: Tensor | None, targets: Sequence[Tensor | None], softcaps: Sequence[float]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    values, kept_indices, row_scalars = kernels.forward(problem)
    if upstream is None:
        return values, (None, None)
    gradients = kernels.backward(problem, upstream, kept_indices, row_scalars, (targets[0], targets[1]))
    for gradient, logits, softcap in zip(gradients, (problem.noisy, problem.clean), softcaps, strict=True):
        if gradient is not None:
            _through_softcap(gradient, logits, softcap)
    return values, gradients


def _through_softcap(gradient: Tensor, logits: Tensor, softcap: float) -> None:
    """Turn the gradient of capped logits into that of the logits before the cap, in place."""
    if softcap:
        for some in _pieces(logits):
            gradient[some].mul_(softcap_slope(logits[some], softcap))


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = max(1, _NUMBERS_AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)
