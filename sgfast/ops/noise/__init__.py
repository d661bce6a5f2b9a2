"""Seeded Gaussian noise: `apply_noise` to embeddings, and the draws themselves, `standard_normal`."""

from sgfast.ops.noise.normal_draws import standard_normal
from sgfast.ops.noise.operation import apply_noise

__all__ = ["apply_noise", "standard_normal"]
