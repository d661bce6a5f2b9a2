"""Losses: divergences between logits, and the objectives that train transforms."""

from sgfast.loss import components, distillation, divergences, presets
from sgfast.loss.distillation import distillation_loss_factory
from sgfast.loss.divergence_loss import DivergenceLoss

__all__ = ["DivergenceLoss", "components", "distillation", "distillation_loss_factory", "divergences", "presets"]
