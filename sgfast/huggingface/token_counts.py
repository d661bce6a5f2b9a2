"""Numbers of tokens of a batch and of an optimizer step that count in each term of a loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Batch = Mapping[str, Any]


class Window(NamedTuple):
    """Token counts and number of the micro-batches of an optimizer step, over all processes."""

    token_counts: Tensor  # (3,): loss_mask & attention_mask, noise_mask & attention_mask, attention_mask
    micro_batches: int

    @property
    def normalizers(self) -> dict[str, Tensor | float]:
        """The token counts, under the names of the losses' arguments."""
        return dict(zip(("loss_tokens", "noise_tokens", "attended_tokens"), self.token_counts, strict=True))


def attended_tokens(batch: Batch) -> Tensor:
    """Return a mask (B, T) bool of the tokens that are not padding."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return cast(Tensor, mask != 0)
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    return torch.ones_like(tokens, dtype=torch.bool)


def token_counts(batch: Batch, device: torch.device) -> Tensor:
    """Return the numbers (3,) of tokens that count in the loss, are transformed, and are attended, on a device."""
    attended = attended_tokens(batch)
    masks = (batch.get(name) for name in ("loss_mask", "noise_mask", "attention_mask"))
    counts = [(attended if mask is None else (mask != 0) & attended).sum() for mask in masks]
    return torch.stack(counts).to(device)
