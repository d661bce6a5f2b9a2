"""Hugging Face integration. Importing this package does not import transformers; functions import it when needed."""

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
