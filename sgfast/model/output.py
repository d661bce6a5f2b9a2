"""What noisy models return."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgfast.model.capture import Capture


@dataclass
class NoisyModelOutput:
    """A noisy model's forward: the base model's output and what its noise layer did.

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
    """The base model on clean and on noisy embeddings, B rows each.

    Attributes:
        clean_logits: (B, T, V) without graph, or None if only shallow layers were run.
        noisy_logits: likewise, with graph.
    """

    clean_logits: Tensor | None
    noisy_logits: Tensor | None

    @property
    def logits(self) -> Tensor | None:
        """(2B, T, V): the clean half, then the noisy half. Concatenated when asked for: read the halves instead."""
        if self.clean_logits is None or self.noisy_logits is None:
            return None
        return torch.cat([self.clean_logits, self.noisy_logits])


def super_batch_output(capture: Capture) -> NoisyModelOutput:
    """What a noisy language model returns of a forward."""
    transform = capture.enabled_transform
    return NoisyModelOutput(
        base_model_output=SuperBatchOutput(capture.clean.logits, capture.noisy.logits),
        input=transform.input if transform else None,
        transformed=transform.output if transform else None,
        mean=transform.mean if transform else None,
        std=transform.std if transform else None,
        mask=transform.mask if transform else None,
        noise_mask=capture.noise_mask,
    )
