"""Fast, exact, memory-bounded losses and metrics for privacy transforms and distilled language models."""

from sgfast import loss, metrics, model, noise_layer, ops
from sgfast._version import __version__
from sgfast.ops.dispatch import explain, use_impl

__all__ = ["__version__", "explain", "loss", "metrics", "model", "noise_layer", "ops", "use_impl"]
