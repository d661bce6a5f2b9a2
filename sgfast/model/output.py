"""Outputs of noisy models."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgfast.model.capture import Capture, Outputs


@dataclass
class NoisyModelOutput:
    """Output of a noisy model's forward: the base model's output, and inputs and results of the noise layer.

    ``input``, ``transformed``, ``mean``, ``std`` and ``mask`` are None while noise is disabled.
    """

    base_model_output: Any
    input: Tensor | None
    transformed: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    mask: Tensor | None
    noise_mask: Tensor | None


@dataclass
class SuperBatchOutput:
    """Logits of the base model on clean and on noisy embeddings, B rows each.

    Attributes:
        clean_logits: (B, T, V), or None if the clean half did not make logits. No graph by default.
        noisy_logits: (B, T, V) with graph, or None if the noisy half did not make logits.
    """

    clean_logits: Tensor | None
    noisy_logits: Tensor | None

    @property
    def logits(self) -> Tensor | None:
        """Clean logits, then noisy logits, (2B, T, V). Every read concatenates both, so read the halves if possible."""
        if self.clean_logits is None or self.noisy_logits is None:
            return None
        return torch.cat([self.clean_logits, self.noisy_logits])


def _made(outputs: Outputs) -> Tensor | None:
    """Return the logits if they were made."""
    return outputs.logits if isinstance(outputs.logits, Tensor) else None


def super_batch_output(capture: Capture) -> NoisyModelOutput:
    """Return the output of a noisy language model for a captured forward."""
    transform = capture.enabled_transform
    return NoisyModelOutput(
        base_model_output=SuperBatchOutput(_made(capture.clean), _made(capture.noisy)),
        input=transform.input if transform else None,
        transformed=transform.output if transform else None,
        mean=transform.mean if transform else None,
        std=transform.std if transform else None,
        mask=transform.mask if transform else None,
        noise_mask=capture.noise_mask,
    )
