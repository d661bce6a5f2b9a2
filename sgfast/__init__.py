"""Fast, exact, memory-bounded losses and metrics for privacy transforms and distilled language models.

The everyday names are here: ``from sgfast import DivergenceLoss, SgtTrainer``. The packages have more:

===================== ========================================================================
`sgfast.ops`          the operations: divergences, distances, noise, top-k, nearest embeddings
`sgfast.loss`         losses to train with, and one function for each divergence
`sgfast.metrics`      utility and privacy of a transform
`sgfast.noise_layer`  layers that transform inputs with learned noise
`sgfast.model`        models whose inputs pass through a noise layer
`sgfast.huggingface`  Trainers, tokenizer wrappers, collators
`sgfast.client`       the transform that a client loads
===================== ========================================================================
"""

import importlib
from typing import TYPE_CHECKING, Any

from sgfast import loss, metrics, model, noise_layer, ops
from sgfast._version import __version__
from sgfast.loss import (
    DivergenceLoss,
    composite_cloak_loss_factory,
    cross_entropy_distillation_factory,
    distillation_loss_factory,
    jigsaw_loss_factory,
    mutual_information_cross_entropy_distillation_factory,
    mutual_information_distillation_loss_factory,
)
from sgfast.metrics import (
    LearnedInversionAttack,
    PrivacyMetrics,
    UtilityMetrics,
    compute_percentile_voronoi_l2_distance,
    fano_error_bound,
    get_noise_metrics_factory,
    get_top_k_support_mask,
    get_utility_metrics_factory,
    information_bounds,
    max_rank_failure_rate,
    mean_reconstruction_rank,
    nearest_neighbor_failure_rate,
    pac_privacy_success_bound,
    percentage_changed_ids,
    repeated_query_attack,
    token_transformation_rate,
)
from sgfast.model import (
    NoiseMaskedNoisyTransformerModel,
    NoisyModel,
    PeftNoiseMaskedNoisyTransformerModel,
)
from sgfast.noise_layer import (
    CloakNoiseLayer,
    CloakNoiseLayer1,
    CloakNoiseLayer2,
    CloakNoiseLayerOneShot,
    PatchCloakNoiseLayer,
    TransformerCloak,
    recommend_scale,
)
from sgfast.ops import (
    apply_noise,
    divergences,
    embedding_ranks,
    hidden_distances,
    nearest_embeddings,
    pairwise_gaussian_kl,
    standard_normal,
    top_k_support,
)
from sgfast.ops.dispatch import explain, use_impl
from sgfast.ops.validation import did_you_mean
from sgfast.sides import HeadExpectation, LinearLogits

if TYPE_CHECKING:
    from sgfast.client import (
        StainedGlassTransformForText,
    )
    from sgfast.huggingface import (
        NoiseMaskCollator,
        NoiseTokenizer,
        PromptType,
        SgtTrainer,
        TokenizerWrapper,
        distillation_compute_loss,
    )

__all__ = [
    "CloakNoiseLayer",
    "CloakNoiseLayer1",
    "CloakNoiseLayer2",
    "CloakNoiseLayerOneShot",
    "DivergenceLoss",
    "HeadExpectation",
    "LearnedInversionAttack",
    "LinearLogits",
    "NoiseMaskCollator",
    "NoiseMaskedNoisyTransformerModel",
    "NoiseTokenizer",
    "NoisyModel",
    "PatchCloakNoiseLayer",
    "PeftNoiseMaskedNoisyTransformerModel",
    "PrivacyMetrics",
    "PromptType",
    "SgtTrainer",
    "StainedGlassTransformForText",
    "TokenizerWrapper",
    "TransformerCloak",
    "UtilityMetrics",
    "__version__",
    "apply_noise",
    "composite_cloak_loss_factory",
    "compute_percentile_voronoi_l2_distance",
    "cross_entropy_distillation_factory",
    "distillation_compute_loss",
    "distillation_loss_factory",
    "divergences",
    "embedding_ranks",
    "explain",
    "fano_error_bound",
    "get_noise_metrics_factory",
    "get_top_k_support_mask",
    "get_utility_metrics_factory",
    "hidden_distances",
    "information_bounds",
    "jigsaw_loss_factory",
    "loss",
    "max_rank_failure_rate",
    "mean_reconstruction_rank",
    "metrics",
    "model",
    "mutual_information_cross_entropy_distillation_factory",
    "mutual_information_distillation_loss_factory",
    "nearest_embeddings",
    "nearest_neighbor_failure_rate",
    "noise_layer",
    "ops",
    "pac_privacy_success_bound",
    "pairwise_gaussian_kl",
    "percentage_changed_ids",
    "recommend_scale",
    "repeated_query_attack",
    "standard_normal",
    "token_transformation_rate",
    "top_k_support",
    "use_impl",
]

# Names that need more than torch. The module is imported when the name is asked for.
_MODULES = {
    "StainedGlassTransformForText": "sgfast.client",
    "NoiseMaskCollator": "sgfast.huggingface",
    "NoiseTokenizer": "sgfast.huggingface",
    "PromptType": "sgfast.huggingface",
    "SgtTrainer": "sgfast.huggingface",
    "TokenizerWrapper": "sgfast.huggingface",
    "distillation_compute_loss": "sgfast.huggingface",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __all__)}"
        # With an object of its own, the error gets no second suggestion from Python's traceback.
        raise AttributeError(message, name=name, obj=object())
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
