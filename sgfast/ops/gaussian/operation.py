r"""Kullback–Leibler divergences between all pairs of two sets of diagonal Gaussians, by matrix products.

For N(m, diag σ²) with features f, over the set S_ij of features that a pair (i, j) has in common:

    KL_ij = ½ Σ_{f ∈ S_ij} [ ln(σ_j²/σ_i²) + σ_i²/σ_j² + (m_i − m_j)²/σ_j² − 1 ]

With x = m_i − c, y = m_j − c, ρ = 1/σ_j² (each 0 where masked) and any c, here the mean of both sets at that feature,

    Σ (σ_i² + (x − y)²) ρ = (σ_i² + x²)·ρ + 1·(y² ρ) − 2 x·(y ρ)

are inner products, so that no (A, B, T, D) tensor is ever made. They are taken in float64. Their rounding is at most
(features + 8) 2⁻⁵² times the first two summands. This is nothing beside a KL of the summands' size, and too much for
two Gaussians that nearly agree 10⁵ σ from c. A pair is uncertain if its sum is NaN, or if this bound does not prove the
sum right to 10⁻⁶ relative or 10⁻⁷ nats a feature. Uncertain pairs are summed again term by term. On a CPU all uncertain
pairs are summed again. On a GPU the A + B least certain pairs are, because a count of uncertain pairs would stop the
queue. Negative results (rounding) become 0.

Gradients are matrix products too (`products`). Their error is about 10⁻¹⁶ (|m − c| / σ)² of 1/σ. Backward
keeps the inputs and nothing else. There is no Triton kernel: the time goes into float64 matrix products, which PyTorch
hands to the vendor's library.

Inputs (A, T, D) and (B, T, D) in float32, bfloat16, float16 or float64; results in float32 (float64 if an input is).
"""

from torch import Tensor

from sgfast.ops import dispatch, validation
from sgfast.ops.gaussian.operator import Problem, forward, triton_refusal

DEFAULT_CHUNK_BYTES = 64 * 2**20


@dispatch.describe_triton(triton_refusal)
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
        mask_a: (A, T) or, to select single features, (A, T, D); 1 = used. Masked values, NaN included, never reach a
            result or a gradient.
        mask_b: (B, T) or (B, T, D).
        combine_masks: True: a pair uses the features that both masks select. False: it uses the features that
            ``mask_a`` selects, whatever ``mask_b`` says.
        max_chunk_bytes: bound on temporaries beyond a few (A, B) matrices in float64; one feature of every Gaussian is
            read at least. Default 64 MiB, or the size of such a matrix.
        impl: see ``sgfast.ops.dispatch``; there is no Triton kernel.

    Returns:
        ``(kl, count)``, (A, B) each: the sums over positions and features, ≥ 0, in float32 (float64 if an input is),
        differentiable with respect to means and stds; and the number of features in each sum, int64. A pair without a
        common feature gives 0 and 0.

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
        # Every chunk passes over the (A, B) results, so a chunk has at least their size.
        max_bytes = max(DEFAULT_CHUNK_BYTES, 8 * mean_a.shape[0] * mean_b.shape[0])
    else:
        max_bytes = validation.chunk_bytes(max_chunk_bytes)
    dispatch.check_impl(impl)
    dispatch.refuse_forward_mode("pairwise_gaussian_kl", mean_a, std_a, mean_b, std_b)
    kl, count = forward(Problem(mean_a, std_a, mean_b, std_b, *masks, max_bytes, impl))
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
