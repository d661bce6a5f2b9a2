"""Hugging Face integration. Importing this package does not import transformers; functions import it when needed."""

from typing import TYPE_CHECKING, Any

from sgfast.huggingface.collator import NoiseMaskCollator
from sgfast.huggingface.compute_loss import distillation_compute_loss
from sgfast.huggingface.tokenization_utils import NoiseEncoding, NoiseTokenizer, PromptType, TokenizerWrapper

if TYPE_CHECKING:
    from sgfast.huggingface.trainer import SgtTrainer

__all__ = [
    "NoiseEncoding",
    "NoiseMaskCollator",
    "NoiseTokenizer",
    "PromptType",
    "SgtTrainer",
    "TokenizerWrapper",
    "distillation_compute_loss",
]


def __getattr__(name: str) -> Any:
    if name != "SgtTrainer":  # the class's base is a class of transformers
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from sgfast.huggingface.trainer import SgtTrainer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"SgtTrainer needs {error.name}: pip install 'sgfast[trainer]'", name=error.name
        ) from error
    return SgtTrainer


def __dir__() -> list[str]:
    return sorted({*globals(), "SgtTrainer"})
