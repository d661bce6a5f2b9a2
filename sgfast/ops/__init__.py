"""The hot operations: a PyTorch implementation each, a Triton kernel beside it where one is written."""

from sgfast.ops.hidden import HiddenDistances, hidden_distances

__all__ = ["HiddenDistances", "hidden_distances"]
