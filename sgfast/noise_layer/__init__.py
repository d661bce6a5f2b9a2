"""Layers that transform inputs with learned noise."""

from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.noise_layer.cloak_noise import (
    CloakNoiseLayer,
    CloakNoiseLayer1,
    CloakNoiseLayer2,
    CloakNoiseLayerOneShot,
)
from sgfast.noise_layer.masker import PercentMasker
from sgfast.noise_layer.parameterizations import (
    CloakStandardDeviationParameterization,
    DirectStandardDeviationParameterization,
)
from sgfast.noise_layer.patch_cloak import PatchCloakNoiseLayer
from sgfast.noise_layer.transformer_cloak import TransformerCloak, recommend_scale
from sgfast.noise_layer.weight_decay import check_weight_decay, parameter_groups

__all__ = [
    "BaseNoiseLayer",
    "CloakNoiseLayer",
    "CloakNoiseLayer1",
    "CloakNoiseLayer2",
    "CloakNoiseLayerOneShot",
    "CloakStandardDeviationParameterization",
    "DirectStandardDeviationParameterization",
    "PatchCloakNoiseLayer",
    "PercentMasker",
    "TransformerCloak",
    "check_weight_decay",
    "parameter_groups",
    "recommend_scale",
]
