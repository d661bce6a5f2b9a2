"""The loss factories with arguments under which every component has weight, and what their rewrites give."""

import torch

from sgfast.loss.distillation import (
    cross_entropy_distillation_factory,
    distillation_loss_factory,
    mutual_information_cross_entropy_distillation_factory,
    mutual_information_distillation_loss_factory,
)
from sgfast.loss.jigsaw import jigsaw_loss_factory

CATALYST = {
    "inverse_l2_power_law_catalyst_loss_weight": 0.2,
    "inverse_l2_power_law_characteristic_length": 1.5,
    "inverse_l2_power_law_exponent_of_decay": 2.0,
}
# Factory, and all its arguments but the model.
CASES = {
    "distillation": (
        distillation_loss_factory,
        {
            "distillation_layer_index": 2,
            "alpha": 0.4,
            "std_log_ratio_loss_weight": 0.1,
            "input_embedding_similarity_loss_weight": 0.5,
            "distillation_layer_cosine_distance_loss_weight": 2.0,
            "distillation_layer_l2_distance_loss_weight": 0.3,
            **CATALYST,
        },
    ),
    "mutual information": (
        mutual_information_distillation_loss_factory,
        {
            "distillation_layer_index": 2,
            "alpha": 0.4,
            "distillation_layer_l2_distance_loss_weight": 2.0,
            "mutual_information_loss_weight": 0.3,
            "input_embedding_similarity_loss_weight": 0.5,
            **CATALYST,
        },
    ),
    "cross entropy": (
        cross_entropy_distillation_factory,
        {
            "distillation_cross_entropy_loss_weight": 1.5,
            "absolute_cosine_similarity_penalty_weight": 0.4,
            "median_norm_penalty_weight": 0.1,
        },
    ),
    "mutual information, cross entropy": (
        mutual_information_cross_entropy_distillation_factory,
        {
            "mutual_information_loss_weight": 0.3,
            "distillation_cross_entropy_loss_weight": 1.5,
            "absolute_cosine_similarity_penalty_weight": 0.4,
            "median_norm_penalty_weight": 0.1,
        },
    ),
    "jigsaw": (
        jigsaw_loss_factory,
        {
            "distillation_layer_index": 2,
            "alpha": 0.4,
            "std_log_ratio_loss_weight": 0.1,
            "input_embedding_similarity_loss_weight": 0.5,
            "distillation_layer_cosine_distance_loss_weight": 2.0,
            "distillation_layer_l2_distance_loss_weight": 0.3,
            "distillation_protection_l2_loss_weight": 0.7,
            "clean_embedding_performance_on_student_model_loss_weight": 0.6,
            **CATALYST,
        },
    ),
}
UTILITY = (
    "distillation_layer_cosine_distance",
    "distillation_layer_l2_distance",
    "distillation_protection_l2",
    "clean_embedding_performance",
)
MASK = "apply_distillation_protection_loss_mask"
COMBINE = "combine_noise_masks_for_mutual_information_sub_batches"


def component_of(argument):
    """The component that an argument weighs, or None."""
    for ending in ("_loss_weight", "_weight"):
        if argument.endswith(ending):
            name = argument.removesuffix(ending).removesuffix("_on_student_model")
            return name.replace("similarity_penalty", "similarity")
    return None


def rewritten(rewrite, arguments):
    """Components and total of a rewrite."""
    settings = {
        "inverse_l2_power_law_catalyst": {"length": 1.5, "exponent": 2.0},
        "mutual_information": {"combine": arguments.get(COMBINE, True)},
        "distillation_protection_l2": {"masked": arguments.get(MASK, True)},
    }
    alpha = arguments.get("alpha")
    components, total = {}, 0.0
    for argument, weight in arguments.items():
        component = component_of(argument)
        if component is None:
            continue
        components[component] = rewrite.component(component, **settings.get(component, {}))
        share = 1.0 if alpha is None else 1 - alpha if component in UTILITY else alpha
        total = total + share * weight * components[component]
    return components, total


def four_rows(tokens):
    """The three rows of ``tokens``, and one that shares one transformed token with the first."""
    row = {
        "input_ids": tokens["input_ids"][:1].roll(2, dims=1),
        "attention_mask": (torch.arange(9) < 8).long()[None],
        "noise_mask": torch.tensor([[False] * 4 + [True] + [False] * 4]),
        "loss_mask": torch.ones(1, 9, dtype=torch.bool),
    }
    found = {name: torch.cat([value, row[name]]) for name, value in tokens.items()}
    found["loss_mask"] = found["loss_mask"] & (torch.arange(9) > 1)
    return found
