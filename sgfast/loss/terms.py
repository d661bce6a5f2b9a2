"""The components that a forward of a noisy model gives, as far as a loss wants them: one reading for several."""

import torch
from torch import Tensor

from sgfast.loss import components
from sgfast.model.capture import Capture, Outputs
from sgfast.ops.divergence import divergences
from sgfast.ops.hidden import hidden_distances

Count = Tensor | float | None


def layer_losses(
    noisy: Outputs, clean: Outputs, layer: int | None, counted: Tensor, wanted: frozenset[str], count: Count
) -> dict[str, Tensor]:
    """How far noisy outputs of a decoder layer, or logits for None, are from clean ones, over l & a."""
    losses: dict[str, Tensor] = {}
    if wanted & {"distillation_layer_cosine_distance", "distillation_layer_l2_distance"}:
        distances = hidden_distances(noisy.at(layer), clean.at(layer), counted)
        if "distillation_layer_cosine_distance" in wanted:
            losses["distillation_layer_cosine_distance"] = components.distillation_layer_cosine_distance(
                distances.cosine_distance, counted, count
            )
        if "distillation_layer_l2_distance" in wanted:
            losses["distillation_layer_l2_distance"] = components.distillation_layer_l2_distance(
                distances.normalized_l2, counted, count
            )
    return losses


def cross_entropy_loss(capture: Capture, counted: Tensor, wanted: frozenset[str], count: Count) -> dict[str, Tensor]:
    """The cross entropy of noisy beside clean logits over l & a."""
    if "distillation_cross_entropy" not in wanted:
        return {}
    clean, noisy = capture.halves(None)
    values = divergences(noisy, clean, "cross_entropy", mask=counted)["cross_entropy"]
    return {"distillation_cross_entropy": components.distillation_cross_entropy(values, counted, count)}


def angle_and_distance_losses(
    capture: Capture,
    wanted: frozenset[str],
    count: Count,
    characteristic_length: float = 1.0,
    exponent: float = 1.0,
) -> dict[str, Tensor]:
    """How close transformed embeddings are to clean ones, over n & a."""
    losses: dict[str, Tensor] = {}
    selected = capture.noise_mask
    if wanted & {"input_embedding_similarity", "absolute_cosine_similarity", "inverse_l2_power_law_catalyst"}:
        distances = hidden_distances(capture.transform.output, capture.transform.input, selected)
        if "input_embedding_similarity" in wanted:
            losses["input_embedding_similarity"] = components.input_embedding_similarity(
                distances.cosine_similarity, selected, count
            )
        if "absolute_cosine_similarity" in wanted:
            losses["absolute_cosine_similarity"] = components.absolute_cosine_similarity(
                distances.cosine_similarity, selected, count
            )
        if "inverse_l2_power_law_catalyst" in wanted:
            losses["inverse_l2_power_law_catalyst"] = components.inverse_l2_power_law_catalyst(
                distances.l2, characteristic_length, exponent, selected, count
            )
    return losses


def std_loss(capture: Capture, wanted: frozenset[str], max_scale: float, count: Count) -> dict[str, Tensor]:
    """The log ratio of standard deviations over n & a."""
    if "std_log_ratio" not in wanted:
        return {}
    transform = capture.transform
    value = components.std_log_ratio(transform.std, max_scale, capture.noise_mask, transform.mask, count)
    return {"std_log_ratio": value}


def median_norm_loss(capture: Capture, wanted: frozenset[str], median_norm: float, count: Count) -> dict[str, Tensor]:
    """How far the norms of x·keep + mu are from the median norm, over n & a."""
    if "median_norm_penalty" not in wanted:
        return {}
    transform = capture.transform
    clean, mean = components.wide(transform.input), components.wide(transform.mean)
    kept = clean if transform.mask is None else torch.where(transform.mask, 0, clean)
    value = components.median_norm_penalty(kept + mean, median_norm, capture.noise_mask, count)
    return {"median_norm_penalty": value}


def mutual_information_loss(
    capture: Capture, wanted: frozenset[str], combine_noise_masks: bool, count: Count, *, even: bool = False
) -> dict[str, Tensor]:
    """The mutual information of this batch; by a global ``count`` of tokens, times the batch's share of them.

    Raises:
        ValueError: the batch has no two halves, or with ``even`` none of equal size.
    """
    if "mutual_information" not in wanted:
        return {}
    batch = capture.attention_mask.shape[0]
    if batch < 2 or (even and batch % 2):
        allowed = "an even batch" if even else "a batch of at least 2 rows"
        raise ValueError(f"mutual_information compares the batch's two halves and needs {allowed}; got {batch} rows")
    transform, selected = capture.transform, capture.noise_mask
    clean, mean = components.wide(transform.input), components.wide(transform.mean)
    value = components.mutual_information(
        clean + mean,
        transform.std.expand(clean.shape),
        selected,
        capture.attention_mask,
        None if transform.mask is None else transform.mask.expand(clean.shape),
        combine_noise_masks,
    )
    if count is not None:
        # Pairs belong to their batch: over the batches of one step this adds up to the mean weighted by tokens.
        value = components.masked_mean(value.expand(selected.shape), selected, count)
    return {"mutual_information": value}
