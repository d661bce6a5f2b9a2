"""How `divergences` uses the Triton kernels: when they can run, which of them do, what they keep for backward.

Kept per row are four float32 scalars (eight with a top-k support) and two per kind. Hard labels' cross-entropy comes
from the whole-vocabulary kernels; beside a top-k support those run for it alone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, topk
from sgfast.ops.divergence_rows import LABEL_KIND


class Problem(NamedTuple):
    """What the kernels are given besides labels; the options that both directions share."""

    noisy: Tensor
    clean: Tensor
    mask: Tensor | None
    temperature: Tensor
    kinds: list[str]
    top_k: int
    top_k_of: str
    support: str
    beta: float
    skew: float

    def without_support(self, *kinds: str) -> "Problem":
        """These kinds over the whole vocabulary."""
        return self._replace(kinds=list(kinds), top_k=0)

    def without_labels(self) -> "Problem":
        """The kinds but that of hard labels."""
        return self._replace(kinds=[kind for kind in self.kinds if kind != LABEL_KIND])


def refusal(
    noisy_logits: Tensor,
    clean_logits: Tensor,
    kinds: object = None,
    *,
    top_k: int | None = None,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    **_: Any,
) -> str | None:
    """Why the kernels cannot run on these arguments of `divergences`, or None."""
    reason = dispatch.triton_device_refusal(noisy_logits, clean_logits, mask)
    if reason is None and label_smoothing > 0:
        reason = f"label_smoothing={label_smoothing} (the kernels have hard labels only)"
    if reason is None and top_k:
        reason = topk.triton_size_refusal(top_k, noisy_logits.shape[-1])
    return reason or dispatch.triton_rows_refusal(noisy_logits=noisy_logits, clean_logits=clean_logits)


def row_scalar_count(kinds: list[str], top_k: int) -> int:
    """How many scalars a row keeps for backward."""
    if top_k and LABEL_KIND in kinds:
        return row_scalar_count(kinds[:-1], top_k) + row_scalar_count([LABEL_KIND], 0)
    return (8 if top_k else 4) + 2 * len(kinds)


def forward(problem: Problem, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values (kinds, ...), the support's indices (..., min(2k, V)), and row scalars."""
    kernels = dispatch.kernels()
    noisy, clean, mask, temperature, kinds, top_k, top_k_of, support, beta, skew = problem
    if not top_k:
        no_indices = noisy.new_empty((*noisy.shape[:-1], 0), dtype=torch.int32)
        values, scalars = kernels.divergence_forward(noisy, clean, mask, temperature, kinds, beta, skew, labels)
        return values, no_indices, scalars
    if labels is None:
        found: tuple[Tensor, Tensor, Tensor] = kernels.divergence_topk_forward(
            noisy, clean, mask, temperature, top_k, support, kinds, beta, skew, top_k_of
        )
        return found
    values, indices, scalars = forward(problem.without_labels(), None)
    label_values, _, label_scalars = forward(problem.without_support(LABEL_KIND), labels)
    return torch.cat([values, label_values]), indices, torch.cat([scalars, label_scalars])


def backward(
    problem: Problem,
    labels: Tensor | None,
    upstream: Tensor,
    kept_indices: Tensor,
    row_scalars: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the sides wanted.

    ``row_scalars`` is None where PyTorch was to run when the graph was traced: they are computed again.
    """
    if row_scalars is None:
        row_scalars = forward(problem, labels)[2]
    kernels = dispatch.kernels()
    noisy, clean, mask, temperature, kinds, top_k, _, support, beta, skew = problem
    read = (noisy, clean, mask, temperature, upstream)
    gradients: tuple[Tensor | None, Tensor | None]
    if not top_k:
        gradients = kernels.divergence_backward(*read, row_scalars, kinds, beta, skew, *wanted, labels)
        return gradients
    if labels is None:
        gradients = kernels.divergence_topk_backward(
            *read, kept_indices, row_scalars, support, kinds, beta, skew, *wanted
        )
        return gradients
    own, label_kind = problem.without_labels(), problem.without_support(LABEL_KIND)
    kept = row_scalar_count(own.kinds, top_k)
    gradients = backward(own, None, upstream[:-1], kept_indices, row_scalars[:kept], wanted)
    if gradients[0] is not None:
        of_labels, _ = backward(label_kind, labels, upstream[-1:], kept_indices, row_scalars[kept:], (True, False))
        assert of_labels is not None
        gradients[0].add_(of_labels)
    return gradients
