"""Hugging Face integration; importing it does not import transformers, which loads where a function needs it."""

from sgfast.huggingface.tokenization_utils import PromptType, TokenizerWrapper

__all__ = ["PromptType", "TokenizerWrapper"]
