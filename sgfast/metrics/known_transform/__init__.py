"""The attacker who knows the noise layer: exact likelihoods, a shortlist, a language-model prior, and beam search."""

from sgfast.metrics.known_transform.attack import KnownTransformResult, known_transform_attack

__all__ = ["KnownTransformResult", "known_transform_attack"]
