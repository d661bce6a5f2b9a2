"""Fast, exact, memory-bounded losses and metrics for privacy transforms and distilled language models."""

from sgfast import ops
from sgfast._version import __version__
from sgfast.ops.dispatch import explain, use_impl

__all__ = ["__version__", "explain", "ops", "use_impl"]
