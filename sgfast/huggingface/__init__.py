"""Hugging Face integration; importing it does not import transformers, which loads where a function needs it."""

from sgfast.huggingface.collator import NoiseMaskCollator
from sgfast.huggingface.compute_loss import distillation_compute_loss
from sgfast.huggingface.tokenization_utils import NoiseEncoding, NoiseTokenizer, PromptType, TokenizerWrapper

__all__ = [
    "NoiseEncoding",
    "NoiseMaskCollator",
    "NoiseTokenizer",
    "PromptType",
    "TokenizerWrapper",
    "distillation_compute_loss",
]
