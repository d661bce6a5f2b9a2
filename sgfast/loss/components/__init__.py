"""The components that training losses are sums of. `captured` reads the values of `formulas` from a forward."""

from sgfast.loss.components.formulas import (
    absolute_cosine_similarity,
    clean_embedding_performance,
    distillation_cross_entropy,
    distillation_layer_cosine_distance,
    distillation_layer_l2_distance,
    distillation_protection_l2,
    input_embedding_similarity,
    inverse_l2_power_law_catalyst,
    masked_mean,
    median_norm_penalty,
    mutual_information,
    std_log_ratio,
    wide,
)
from sgfast.loss.components.known_transform import known_transform_log_odds

__all__ = [
    "absolute_cosine_similarity",
    "clean_embedding_performance",
    "distillation_cross_entropy",
    "distillation_layer_cosine_distance",
    "distillation_layer_l2_distance",
    "distillation_protection_l2",
    "input_embedding_similarity",
    "inverse_l2_power_law_catalyst",
    "known_transform_log_odds",
    "masked_mean",
    "median_norm_penalty",
    "mutual_information",
    "std_log_ratio",
    "wide",
]
