"""Losses: divergences between logits, and the objectives that train transforms."""

from sgfast.loss import components, distillation, presets
from sgfast.loss.distillation import distillation_loss_factory

__all__ = ["components", "distillation", "distillation_loss_factory", "presets"]
