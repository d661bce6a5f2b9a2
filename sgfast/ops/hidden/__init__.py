"""Distances between two sets of hidden states: `hidden_distances`."""

from sgfast.ops.hidden.operation import HiddenDistances, hidden_distances

__all__ = ["HiddenDistances", "hidden_distances"]
