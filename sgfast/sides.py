"""Sides of a divergence that are not logits.

The logits of a language model, (tokens, vocabulary), are what runs out of memory. `sgfast.divergences`,
`sgfast.DivergenceLoss`, the functions of `sgfast.loss.divergences` and `sgfast.UtilityMetrics` take one of these values
in the place of logits.
"""

from sgfast.ops.sides import LinearLogits

__all__ = ["LinearLogits"]
