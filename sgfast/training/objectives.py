"""The losses that ``sgfast train`` offers, by name, with weights to start from."""

from collections.abc import Callable
from typing import Any

from sgfast.loss.distillation import (
    cross_entropy_distillation_factory,
    distillation_loss_factory,
    mutual_information_cross_entropy_distillation_factory,
    mutual_information_distillation_loss_factory,
)
from sgfast.loss.jigsaw import jigsaw_loss_factory

FACTORIES: dict[str, Callable[..., Any]] = {
    "distillation": distillation_loss_factory,
    "mutual_information_distillation": mutual_information_distillation_loss_factory,
    "cross_entropy_distillation": cross_entropy_distillation_factory,
    "mutual_information_cross_entropy_distillation": mutual_information_cross_entropy_distillation_factory,
    "jigsaw": jigsaw_loss_factory,
}
# The run provides these arguments of a factory. The factory's other arguments are settings.
MODEL_ARGUMENTS = ("noisy_model", "noisy_teacher_model", "noisy_student_model", "return")
# Weights found on SmolLM2-135M-Instruct (benchmarks/training_curves.py). Layer 5 is shallow in any real model.
_LAYER_DISTILLATION = {
    "distillation_layer_index": 5,
    "alpha": 0.5,
    "std_log_ratio_loss_weight": 0.2,
    "input_embedding_similarity_loss_weight": 0.5,
    "distillation_layer_cosine_distance_loss_weight": 10.0,
}
DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    "distillation": _LAYER_DISTILLATION,
    "mutual_information_distillation": {
        "distillation_layer_index": 5,
        "alpha": 0.5,
        "distillation_layer_l2_distance_loss_weight": 1.0,
        "mutual_information_loss_weight": 0.1,
    },
    "cross_entropy_distillation": {
        "distillation_cross_entropy_loss_weight": 1.0,
        "absolute_cosine_similarity_penalty_weight": 1.0,
        "median_norm_penalty_weight": 0.1,
    },
    "mutual_information_cross_entropy_distillation": {
        "mutual_information_loss_weight": 0.1,
        "distillation_cross_entropy_loss_weight": 1.0,
        "absolute_cosine_similarity_penalty_weight": 1.0,
        "median_norm_penalty_weight": 0.1,
    },
    "jigsaw": _LAYER_DISTILLATION,
}
