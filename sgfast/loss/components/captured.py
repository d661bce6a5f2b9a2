"""The components of a captured forward of a noisy model.

Every function computes only the components that the loss wants, by name. Components that need the same distances share
one computation of these distances.
"""

import torch
from torch import Tensor

from sgfast.loss.components import formulas
from sgfast.loss.components.logit_distances import logit_distances
from sgfast.model.capture import Capture, Outputs
from sgfast.ops.divergence import divergences
from sgfast.ops.hidden import HiddenDistances, hidden_distances

Count = Tensor | float | None


def output_distances(noisy: Outputs, clean: Outputs, layer: int | None, counted: Tensor) -> HiddenDistances:
    """Return distances between outputs at counted positions: a decoder layer's outputs, or the logits for None."""
    if layer is None:
        return logit_distances(noisy.side(), clean.side(), counted)
    return hidden_distances(noisy.at(layer), clean.at(layer), counted)


def layer_components(
    noisy: Outputs, clean: Outputs, layer: int | None, counted: Tensor, wanted: frozenset[str], count: Count
) -> dict[str, Tensor]:
    """Distances over l & a between noisy and clean outputs: a decoder layer's, or the logits for None."""
    losses: dict[str, Tensor] = {}
    if wanted & {"distillation_layer_cosine_distance", "distillation_layer_l2_distance"}:
        distances = output_distances(noisy, clean, layer, counted)
        if "distillation_layer_cosine_distance" in wanted:
            losses["distillation_layer_cosine_distance"] = formulas.distillation_layer_cosine_distance(
                distances.cosine_distance, counted, count
            )
        if "distillation_layer_l2_distance" in wanted:
            losses["distillation_layer_l2_distance"] = formulas.distillation_layer_l2_distance(
                distances.normalized_l2, counted, count
            )
    return losses


def cross_entropy_component(
    capture: Capture, counted: Tensor, wanted: frozenset[str], count: Count
) -> dict[str, Tensor]:
    """The cross entropy of the noisy logits under the clean distribution, over l & a."""
    if "distillation_cross_entropy" not in wanted:
        return {}
    values = divergences(capture.noisy.side(), capture.clean.side(), "cross_entropy", mask=counted)["cross_entropy"]
    return {"distillation_cross_entropy": formulas.distillation_cross_entropy(values, counted, count)}


def embedding_components(
    capture: Capture,
    wanted: frozenset[str],
    count: Count,
    characteristic_length: float = 1.0,
    exponent: float = 1.0,
) -> dict[str, Tensor]:
    """Similarities of transformed and clean embeddings, over n & a."""
    losses: dict[str, Tensor] = {}
    selected = capture.noise_mask
    if wanted & {"input_embedding_similarity", "absolute_cosine_similarity", "inverse_l2_power_law_catalyst"}:
        distances = hidden_distances(capture.transform.output, capture.transform.input, selected)
        if "input_embedding_similarity" in wanted:
            losses["input_embedding_similarity"] = formulas.input_embedding_similarity(
                distances.cosine_similarity, selected, count
            )
        if "absolute_cosine_similarity" in wanted:
            losses["absolute_cosine_similarity"] = formulas.absolute_cosine_similarity(
                distances.cosine_similarity, selected, count
            )
        if "inverse_l2_power_law_catalyst" in wanted:
            losses["inverse_l2_power_law_catalyst"] = formulas.inverse_l2_power_law_catalyst(
                distances.l2, characteristic_length, exponent, selected, count
            )
    return losses


def std_component(capture: Capture, wanted: frozenset[str], max_scale: float, count: Count) -> dict[str, Tensor]:
    """The log ratio of standard deviations, over n & a."""
    if "std_log_ratio" not in wanted:
        return {}
    transform = capture.transform
    value = formulas.std_log_ratio(transform.std, max_scale, capture.noise_mask, transform.mask, count)
    return {"std_log_ratio": value}


def median_norm_component(
    capture: Capture, wanted: frozenset[str], median_norm: float, count: Count
) -> dict[str, Tensor]:
    """The distance between the norms of x·keep + mu and the median norm, over n & a."""
    if "median_norm_penalty" not in wanted:
        return {}
    transform = capture.transform
    clean, mean = formulas.wide(transform.input), formulas.wide(transform.mean)
    kept = clean if transform.mask is None else torch.where(transform.mask, 0, clean)
    value = formulas.median_norm_penalty(kept + mean, median_norm, capture.noise_mask, count)
    return {"median_norm_penalty": value}


def mutual_information_component(
    capture: Capture, wanted: frozenset[str], combine_noise_masks: bool, count: Count, *, even: bool = False
) -> dict[str, Tensor]:
    """The mutual information of this batch. With a global ``count`` of tokens, it is multiplied by the batch's share.

    Raises:
        ValueError: the batch has fewer than 2 rows, or with ``even`` an odd number of rows.
    """
    if "mutual_information" not in wanted:
        return {}
    batch = capture.attention_mask.shape[0]
    if batch < 2 or (even and batch % 2):
        allowed = "an even batch" if even else "a batch of at least 2 rows"
        raise ValueError(f"mutual_information compares the batch's two halves and needs {allowed}; got {batch} rows")
    transform, selected = capture.transform, capture.noise_mask
    clean, mean = formulas.wide(transform.input), formulas.wide(transform.mean)
    value = formulas.mutual_information(
        clean + mean,
        transform.std.expand(clean.shape),
        selected,
        capture.attention_mask,
        None if transform.mask is None else transform.mask.expand(clean.shape),
        combine_noise_masks,
    )
    if count is not None:
        # Pairs belong to their batch: the values of the batches of one step add up to their mean weighted by tokens.
        value = formulas.masked_mean(value.expand(selected.shape), selected, count)
    return {"mutual_information": value}
