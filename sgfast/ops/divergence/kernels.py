"""The calls of the Triton kernels for `divergences`, and the arguments that the kernels can run.

The cross-entropy of hard labels comes from the kernels over the whole vocabulary. Beside a top-k support these kernels
run for the labels alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.ops import dispatch
from sgfast.ops.divergence.kinds import LABEL_KIND
from sgfast.ops.divergence.problem import Problem, row_scalar_count
from sgfast.ops.sides import ONLY_TORCH, CleanSide, HeadExpectation, LogitsOrSide, stand_in
from sgfast.ops.topk.operator import triton_size_refusal


def _only_labels(problem: Problem) -> Problem:
    """Return the problem of the hard labels alone, over the whole vocabulary."""
    return problem._replace(kinds=LABEL_KIND, top_k=0)


def _without_labels(problem: Problem) -> Problem:
    return problem._replace(kinds=problem.kinds.removesuffix(f",{LABEL_KIND}"), labels=None)


def refusal(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    kinds: str | Sequence[str] = (),
    *,
    top_k: int | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor | tuple[Any, Any] = 1.0,
    label_smoothing: float = 0.0,
    **_: Any,
) -> str | None:
    """Say why the kernels cannot run these arguments of `divergences`, or return None."""
    if isinstance(temperature, tuple):
        return "a temperature for each side (the kernels take one for both)"
    if isinstance(clean_logits, HeadExpectation):
        return ONLY_TORCH
    noisy_logits, clean_logits = stand_in(noisy_logits), stand_in(clean_logits)
    reason = dispatch.triton_device_refusal(noisy_logits, clean_logits, mask)
    if reason is None and label_smoothing > 0:
        reason = f"label_smoothing={label_smoothing} (the kernels have hard labels only)"
    if reason is None and top_k:
        reason = triton_size_refusal(top_k, noisy_logits.shape[-1])
    if reason is None:
        reason = _kinds_refusal((kinds,) if isinstance(kinds, str) else kinds)
    return reason or dispatch.triton_rows_refusal(noisy_logits=noisy_logits, clean_logits=clean_logits)


def _kinds_refusal(kinds: Sequence[str]) -> str | None:
    """Say which kinds have no kernels, or return None. The caller has checked the devices before."""
    import sgfast_kernels

    missing = [kind for kind in kinds if kind not in sgfast_kernels.KIND_NAMES]
    return f"no kernels for {', '.join(missing)}" if missing else None


def refusal_of(problem: Problem) -> str | None:
    """Say why the kernels cannot run this problem, or return None."""
    if problem.support_mask is not None:
        return "a support_mask runs in PyTorch"
    if problem.clean_temperature is not None:
        return refusal(problem.noisy, problem.clean, temperature=(problem.temperature, problem.clean_temperature))
    return refusal(
        problem.noisy,
        problem.clean,
        problem.kind_names,
        top_k=problem.top_k,
        mask=problem.mask,
        label_smoothing=problem.label_smoothing,
    )


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Compute values (kinds, ...), the support's indices (..., min(2k, V)), and row scalars."""
    import sgfast_kernels

    noisy, kinds = problem.noisy, problem.kind_names
    read = (noisy, problem.clean, problem.mask, problem.temperature)
    weights = (problem.beta, problem.skew)
    if not problem.top_k:
        no_indices = noisy.new_empty((*noisy.shape[:-1], 0), dtype=torch.int32)
        values, scalars = sgfast_kernels.divergence_forward(*read, kinds, *weights, problem.labels)
        return values, no_indices, scalars
    if problem.labels is None:
        found: tuple[Tensor, Tensor, Tensor] = sgfast_kernels.divergence_topk_forward(
            *read, problem.top_k, problem.support, kinds, *weights, problem.top_k_of
        )
        return found
    values, indices, scalars = forward(_without_labels(problem))
    label_values, _, label_scalars = forward(_only_labels(problem))
    return torch.cat([values, label_values]), indices, torch.cat([scalars, label_scalars])


def backward(
    problem: Problem,
    upstream: Tensor,
    kept_indices: Tensor,
    row_scalars: Tensor | None,
    targets: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of the wanted sides.

    ``row_scalars`` is None if the graph was traced for the PyTorch implementation. The scalars are then computed again.
    Over the whole vocabulary the gradients are written to ``targets``, where there are any.
    """
    if row_scalars is None:
        row_scalars = forward(problem)[2]
    import sgfast_kernels

    kinds, weights = problem.kind_names, (problem.beta, problem.skew)
    wanted = problem.sides_wanted
    read = (problem.noisy, problem.clean, problem.mask, problem.temperature, upstream)
    gradients: tuple[Tensor | None, Tensor | None]
    if not problem.top_k:
        gradients = sgfast_kernels.divergence_backward(
            *read, row_scalars, kinds, *weights, *wanted, problem.labels, targets
        )
        return gradients
    if problem.labels is None:
        gradients = sgfast_kernels.divergence_topk_backward(
            *read, kept_indices, row_scalars, problem.support, kinds, *weights, *wanted
        )
        return gradients
    own = _without_labels(problem)
    kept = row_scalar_count(own.kind_names, problem.top_k)
    gradients = backward(own, upstream[:-1], kept_indices, row_scalars[:kept])
    if gradients[0] is not None:
        label_problem = _only_labels(problem)._replace(clean_wanted=False)
        of_labels, _ = backward(label_problem, upstream[-1:], kept_indices, row_scalars[kept:])
        assert of_labels is not None
        gradients[0].add_(of_labels)
    return gradients
