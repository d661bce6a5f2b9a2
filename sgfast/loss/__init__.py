"""Losses: divergences between logits, and the objectives that train transforms."""

from sgfast.loss import cloak, components, distillation, divergences, presets
from sgfast.loss.cloak import composite_cloak_loss_factory
from sgfast.loss.distillation import distillation_loss_factory
from sgfast.loss.divergence_loss import DivergenceLoss

__all__ = [
    "DivergenceLoss",
    "cloak",
    "components",
    "composite_cloak_loss_factory",
    "distillation",
    "distillation_loss_factory",
    "divergences",
    "presets",
]
