"""How many tokens of a batch, and of an optimizer step, count in each term of a loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Batch = Mapping[str, Any]


class Window(NamedTuple):
    """The micro-batches of an optimizer step, over all processes: what they add up to, and how many they are."""

    token_counts: Tensor  # (3,): l & a, n & a, a
    micro_batches: int

    @property
    def normalizers(self) -> dict[str, Tensor | float]:
        """The counts by the names that losses take."""
        return dict(zip(("loss_tokens", "noise_tokens", "attended_tokens"), self.token_counts, strict=True))


def attended_tokens(batch: Batch) -> Tensor:
    """Which tokens of a batch are real, (B, T) bool."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return cast(Tensor, mask != 0)
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    return torch.ones_like(tokens, dtype=torch.bool)


def token_counts(batch: Batch, device: torch.device) -> Tensor:
    """Numbers of counted (l & a), transformed (n & a) and attended tokens, on the device."""
    attended = attended_tokens(batch)
    masks = (batch.get(name) for name in ("loss_mask", "noise_mask", "attention_mask"))
    counts = [(attended if mask is None else (mask != 0) & attended).sum() for mask in masks]
    return torch.stack(counts).to(device)
