r"""Distances between two sets of hidden states, per position, from one read of each.

For rows a (noisy) and b (clean) of width D:

    l2                 ‖a − b‖
    normalized_l2      ‖a − b‖ / max(‖b‖, eps)
    cosine_distance    1 − cos(a, b) = (‖a−b‖² − (‖a‖−‖b‖)²) / (2‖a‖‖b‖),  ‖a‖−‖b‖ = Σ(a−b)(a+b) / (‖a‖+‖b‖)
    cosine_similarity  1 − cosine_distance

The cosine is formed from differences, because 1 − a·b/(‖a‖‖b‖) loses all its digits if a ≈ b, and distillation mostly
works near a ≈ b. Rows with ‖a−b‖ > min(‖a‖, ‖b‖) take 1 − a·b/(‖a‖‖b‖) instead. The differences of such rows would lose
digits, and more digits if the norms lie farther apart. A row is zero if its squared norm underflows (norm below 1.1e-19
in float32); then the similarity and its gradient are 0. At a = b the gradient of l2 is 0. With δ = ‖a‖−‖b‖, the
gradients combine a − b and the row itself:

    ∂cosine_distance/∂a = (a−b) / (‖a‖‖b‖) − a · (δ/(‖a‖‖b‖) + cosine_distance/‖a‖) / ‖a‖
    ∂l2/∂a = (a−b) / l2,   ∂normalized_l2/∂b = (b−a) / (l2·‖b‖) − b · l2 / ‖b‖³   (second term 0 if ‖b‖ ≤ eps)

Inputs (..., D) in float32, bfloat16, float16 or float64; arithmetic and outputs in float32 (float64 if an input is).
Kept for backward besides the inputs: four scalars a row. The Triton kernels are in ``sgfast_kernels.hidden``.
"""

from typing import NamedTuple

from torch import Tensor

from sgfast.ops import dispatch, validation
from sgfast.ops.hidden.operator import Problem, forward, triton_refusal


class HiddenDistances(NamedTuple):
    """Per-position distances, each of shape ``noisy.shape[:-1]``."""

    cosine_distance: Tensor
    l2: Tensor
    normalized_l2: Tensor
    cosine_similarity: Tensor


@dispatch.describe_triton(triton_refusal)
def hidden_distances(
    noisy: Tensor,
    clean: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-8,
    impl: dispatch.Implementation | None = None,
) -> HiddenDistances:
    """Cosine and Euclidean distances between hidden states, per position.

    Args:
        noisy: (..., D), float32, bfloat16, float16 or float64; row-strided views are read in place.
        clean: of the same shape.
        mask: (...), 1 = selected. Masked rows are not read; they give 0 in every field and zero gradient.
        eps: lower bound of ‖clean‖ in ``normalized_l2``.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        ``HiddenDistances(cosine_distance, l2, normalized_l2, cosine_similarity)``, each (...) in float32 (float64 if
        an input is), differentiable with respect to both sides; gradients are in the inputs' dtypes.

    Raises:
        TypeError: an input is not a floating tensor.
        ValueError: shapes or devices differ, or ``eps`` is not positive.

    Example:
        >>> import torch
        >>> from sgfast.ops import hidden_distances
        >>> distances = hidden_distances(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]]))
        >>> distances.cosine_distance, distances.normalized_l2
        (tensor([1.]), tensor([1.4142]))
    """
    validation.check_pair("noisy", noisy, "clean", clean)
    mask = validation.row_mask(mask, "mask", "noisy", noisy)
    if not eps > 0:
        raise ValueError(f"eps must be positive; got {eps}")
    dispatch.check_impl(impl)
    dispatch.refuse_forward_mode("hidden_distances", noisy, clean)
    values, _ = forward(Problem(noisy, clean, mask, eps, impl))
    return HiddenDistances(*values.unbind(0))
