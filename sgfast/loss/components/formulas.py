"""The formulas of the components, one function each.

Notation: x is a clean and x~ a transformed embedding, sigma a standard deviation. n is the mask of transformed tokens,
a the mask of attended tokens, l the loss mask. Components that measure the transform's strength average over n & a,
components that measure utility average over l & a. Every component is a float32 scalar (float64 for float64 inputs),
whatever the model's dtype.
"""

import torch
from torch import Tensor

from sgfast.ops import validation
from sgfast.ops.gaussian import pairwise_gaussian_kl


def wide(values: Tensor) -> Tensor:
    """Return float64 values as they are, and all others as float32."""
    return values if values.dtype == torch.float64 else values.float()


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """sum(values where mask) / max(count, 1).

    Args:
        values: (B, T). Values at masked positions, NaN too, reach neither the result nor a gradient.
        mask: (B, T) bool.
        count: the denominator; None for the number of selected positions. An empty mask gives exactly 0.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    validation.check_tensors(values=values, mask=mask, count=count)
    total = torch.where(mask, wide(values), 0).sum()
    if count is None:
        return total / mask.sum().clamp(min=1)
    return total / (count.clamp(min=1).to(total.dtype) if isinstance(count, Tensor) else max(count, 1))


def std_log_ratio(
    std: Tensor,
    max_scale: float,
    selected: Tensor,
    suppressed: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """Mean of log(max_scale / sigma) over selected tokens and their unsuppressed features: 0 when every sigma is max.

    The formula is our choice. Its gradient 1/sigma lifts the weakest features most.

    Args:
        std: (B, T, D), positive where selected.
        max_scale: upper end of the layer's scale.
        selected: (B, T) bool, n & a.
        suppressed: (B, T, D) bool, features that leave the mean; every token has the same number of them.
        count: number of selected tokens that replaces the batch's own.
    """
    validation.check_tensors(std=std, selected=selected, suppressed=suppressed, count=count)
    std = wide(std)
    kept = selected[..., None] if suppressed is None else selected[..., None] & ~suppressed
    ratios = -(torch.where(kept, std, max_scale) / max_scale).log()
    features = std.shape[-1] if suppressed is None else (~suppressed).sum(-1).clamp(min=1)
    return masked_mean(ratios.sum(-1) / features, selected, count)


def input_embedding_similarity(
    cosine_similarity: Tensor, selected: Tensor, count: Tensor | float | None = None
) -> Tensor:
    """Mean of cos(x, x~) over selected tokens.

    Args:
        cosine_similarity: (B, T), from `sgfast.ops.hidden_distances`.
        selected: (B, T) bool, n & a.
        count: number of selected tokens that replaces the batch's own.
    """
    validation.check_tensors(cosine_similarity=cosine_similarity, selected=selected, count=count)
    return masked_mean(cosine_similarity, selected, count)


def absolute_cosine_similarity(
    cosine_similarity: Tensor, selected: Tensor, count: Tensor | float | None = None
) -> Tensor:
    """Mean of |cos(x, x~)| over selected tokens: opposite embeddings reveal as much as equal ones.

    Args:
        cosine_similarity: (B, T), from `sgfast.ops.hidden_distances`.
        selected: (B, T) bool, n & a.
        count: number of selected tokens that replaces the batch's own.
    """
    validation.check_tensors(cosine_similarity=cosine_similarity, selected=selected, count=count)
    return masked_mean(cosine_similarity.abs(), selected, count)


def median_norm_penalty(
    shifted: Tensor, median_norm: float, selected: Tensor, count: Tensor | float | None = None
) -> Tensor:
    """Mean of |‖x·keep + mu‖ − m| over selected tokens. m is a typical norm of the clean embeddings.

    Args:
        shifted: (B, T, D), x·keep + mu: the transformed embeddings without their noise.
        median_norm: m, as `sgfast.model.median_norm.median_target_norm` gives it.
        selected: (B, T) bool, n & a.
        count: number of selected tokens that replaces the batch's own.
    """
    validation.check_tensors(shifted=shifted, median_norm=median_norm, selected=selected, count=count)
    norms = torch.linalg.vector_norm(torch.where(selected[..., None], wide(shifted), 0), dim=-1)
    return masked_mean((norms - median_norm).abs(), selected, count)


def mutual_information(
    mean: Tensor,
    std: Tensor,
    selected: Tensor,
    attended: Tensor,
    suppressed: Tensor | None = None,
    combine_noise_masks: bool = True,
) -> Tensor:
    """Mean of KL(N_i ‖ N_j) per common feature over rows i of the first and j of the second half of the batch.

    N is the transform's distribution, N(mean, std²). The mean KL of all pairs bounds, in nats, the information that a
    transformed text holds about the original text (see `sgfast.metrics.information_bounds`). The division by the
    number of features and the comparison of halves are our choice. Pairs without a common feature leave the mean.
    Without any pair the mean is 0 with zero gradients.

    Args:
        mean: (B, T, D), x + mu; B ≥ 2. In an odd batch the second half is the larger one.
        std: (B, T, D), positive where used.
        selected: (B, T) bool, n & a.
        attended: (B, T) bool, a.
        suppressed: (B, T, D) bool, features that no pair of their row uses.
        combine_noise_masks: True: a pair uses the positions of n_i & n_j & a_i & a_j; False: of n_i & a_i & a_j.
    """
    validation.check_tensors(mean=mean, std=std, selected=selected, attended=attended, suppressed=suppressed)
    half = mean.shape[0] // 2
    of_first, of_second = selected[:half], (selected if combine_noise_masks else attended)[half:]
    if suppressed is not None:
        of_first = of_first[..., None] & ~suppressed[:half]
        of_second = of_second[..., None] & ~suppressed[half:]
    kl, features = pairwise_gaussian_kl(mean[:half], std[:half], mean[half:], std[half:], of_first, of_second)
    in_common = features > 0
    return masked_mean(kl / features.clamp(min=1), in_common)


def inverse_l2_power_law_catalyst(
    l2: Tensor,
    characteristic_length: float,
    exponent: float,
    selected: Tensor,
    count: Tensor | float | None = None,
) -> Tensor:
    """Mean of ((‖x~−x‖² + (r/100)²) / r²)^(−p/2) over selected tokens: about 1 at distance r, falling as its power p.

    The small constant (our choice) bounds the value by 100^p at distance 0 and keeps the gradient alive there.

    Args:
        l2: (B, T), ‖x~−x‖.
        characteristic_length: r > 0.
        exponent: p > 0.
        selected: (B, T) bool, n & a.
        count: number of selected tokens that replaces the batch's own.
    """
    validation.check_tensors(l2=l2, selected=selected, count=count)
    squared = (l2 / characteristic_length).square() + 1e-4
    return masked_mean(squared ** (-exponent / 2), selected, count)


def distillation_layer_cosine_distance(
    cosine_distance: Tensor, counted: Tensor, count: Tensor | float | None = None
) -> Tensor:
    """Mean of 1 − cos(noisy, clean) of the distilled layer over counted positions.

    Args:
        cosine_distance: (B, T), from `sgfast.ops.hidden_distances`.
        counted: (B, T) bool, l & a.
        count: number of counted positions that replaces the batch's own.
    """
    validation.check_tensors(cosine_distance=cosine_distance, counted=counted, count=count)
    return masked_mean(cosine_distance, counted, count)


def distillation_layer_l2_distance(
    normalized_l2: Tensor, counted: Tensor, count: Tensor | float | None = None
) -> Tensor:
    """Mean of ‖noisy − clean‖ / ‖clean‖ of the distilled layer over counted positions (the normaliser is our choice).

    Args:
        normalized_l2: (B, T), from `sgfast.ops.hidden_distances`.
        counted: (B, T) bool, l & a.
        count: number of counted positions that replaces the batch's own.
    """
    validation.check_tensors(normalized_l2=normalized_l2, counted=counted, count=count)
    return masked_mean(normalized_l2, counted, count)


def distillation_cross_entropy(cross_entropy: Tensor, counted: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean of −Σ q log p over counted positions, in nats. q is the clean, p the noisy next-token distribution.

    Args:
        cross_entropy: (B, T), from `sgfast.ops.divergences`.
        counted: (B, T) bool, l & a.
        count: number of counted positions that replaces the batch's own.
    """
    validation.check_tensors(cross_entropy=cross_entropy, counted=counted, count=count)
    return masked_mean(cross_entropy, counted, count)


def distillation_protection_l2(normalized_l2: Tensor, counted: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean of 2 (1 − sigmoid(‖u − v‖ / ‖v‖)) over counted positions: 1 where equal, towards 0 far apart.

    u is the teacher's noisy and v its clean output. The value is small when the base model cannot read transformed
    tokens. The bound (our choice) keeps this component, which wants distance, from outweighing components that want
    closeness.

    Args:
        normalized_l2: (B, T), from `sgfast.ops.hidden_distances`.
        counted: (B, T) bool, l & a, or a.
        count: number of counted positions that replaces the batch's own.
    """
    validation.check_tensors(normalized_l2=normalized_l2, counted=counted, count=count)
    return masked_mean(2 * torch.sigmoid(-normalized_l2), counted, count)


def clean_embedding_performance(normalized_l2: Tensor, counted: Tensor, count: Tensor | float | None = None) -> Tensor:
    """`distillation_protection_l2` with the student's clean output as u and the teacher's clean output as v.

    The value is small when the student cannot read clean tokens.

    Args:
        normalized_l2: (B, T), from `sgfast.ops.hidden_distances`.
        counted: (B, T) bool, l & a.
        count: number of counted positions that replaces the batch's own.
    """
    return distillation_protection_l2(normalized_l2, counted, count)
