"""Divergences between all pairs of two sets of diagonal Gaussians: `pairwise_gaussian_kl`."""

from sgfast.ops.gaussian.operation import pairwise_gaussian_kl

__all__ = ["pairwise_gaussian_kl"]
