"""Losses: divergences between logits, and the objectives that train transforms."""

from sgfast.loss import cloak, components, distillation
from sgfast.loss.cloak import composite_cloak_loss_factory
from sgfast.loss.distillation import distillation_loss_factory

__all__ = ["cloak", "components", "composite_cloak_loss_factory", "distillation", "distillation_loss_factory"]
