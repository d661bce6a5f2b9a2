"""Divergences between two sets of logits: `divergences`, and `masked_divergence`, whose support is a mask."""

from sgfast.ops.divergence.operation import divergences, masked_divergence

__all__ = ["divergences", "masked_divergence"]
