"""Metrics of a transform's utility and privacy."""

from sgfast.metrics import privacy
from sgfast.metrics.accumulators import PrivacyMetrics, UtilityMetrics
from sgfast.metrics.divergence_metrics import DivergenceMetrics
from sgfast.metrics.information import (
    InformationBounds,
    fano_error_bound,
    information_bounds,
    pac_privacy_success_bound,
)
from sgfast.metrics.inversion import LearnedInversionAttack
from sgfast.metrics.noise_metrics import get_noise_metrics_factory
from sgfast.metrics.per_sequence import sequence_utility, sequence_utility_from_hidden
from sgfast.metrics.privacy import (
    known_transform_attack,
    max_rank_failure_rate,
    mean_reconstruction_rank,
    nearest_neighbor_failure_rate,
    repeated_query_attack,
    token_transformation_rate,
)
from sgfast.metrics.reconstruction import percentage_changed_ids
from sgfast.metrics.utility import get_top_k_support_mask, get_utility_metrics_factory
from sgfast.metrics.voronoi import compute_percentile_voronoi_l2_distance
from sgfast.model.head import language_model_head

__all__ = [
    "DivergenceMetrics",
    "InformationBounds",
    "LearnedInversionAttack",
    "PrivacyMetrics",
    "UtilityMetrics",
    "compute_percentile_voronoi_l2_distance",
    "fano_error_bound",
    "get_noise_metrics_factory",
    "get_top_k_support_mask",
    "get_utility_metrics_factory",
    "information_bounds",
    "known_transform_attack",
    "language_model_head",
    "max_rank_failure_rate",
    "mean_reconstruction_rank",
    "nearest_neighbor_failure_rate",
    "pac_privacy_success_bound",
    "percentage_changed_ids",
    "privacy",
    "repeated_query_attack",
    "sequence_utility",
    "sequence_utility_from_hidden",
    "token_transformation_rate",
]
