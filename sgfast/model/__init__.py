"""Noisy models: base models whose inputs or hidden states pass through a noise layer."""

from sgfast.model.noisy_model import NoisyModel
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.model.output import NoisyModelOutput, SuperBatchOutput
from sgfast.model.peft_noisy_transformer_masking_model import PeftNoiseMaskedNoisyTransformerModel

__all__ = [
    "NoiseMaskedNoisyTransformerModel",
    "NoisyModel",
    "NoisyModelOutput",
    "PeftNoiseMaskedNoisyTransformerModel",
    "SuperBatchOutput",
]
