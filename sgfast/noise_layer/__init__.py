"""Layers that transform inputs with learned noise."""

from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.noise_layer.masker import PercentMasker
from sgfast.noise_layer.parameterizations import (
    CloakStandardDeviationParameterization,
    DirectStandardDeviationParameterization,
)
from sgfast.noise_layer.transformer_cloak import TransformerCloak, recommend_scale

__all__ = [
    "BaseNoiseLayer",
    "CloakStandardDeviationParameterization",
    "DirectStandardDeviationParameterization",
    "PercentMasker",
    "TransformerCloak",
    "recommend_scale",
]
