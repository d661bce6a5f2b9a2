"""Losses: divergences between logits, and the objectives that train transforms."""

from sgfast.loss import cloak, components, distillation, divergences, jigsaw, presets
from sgfast.loss.cloak import composite_cloak_loss_factory
from sgfast.loss.distillation import (
    cross_entropy_distillation_factory,
    distillation_loss_factory,
    mutual_information_cross_entropy_distillation_factory,
    mutual_information_distillation_loss_factory,
)
from sgfast.loss.divergence_loss import DivergenceLoss
from sgfast.loss.jigsaw import jigsaw_loss_factory

__all__ = [
    "DivergenceLoss",
    "cloak",
    "components",
    "composite_cloak_loss_factory",
    "cross_entropy_distillation_factory",
    "distillation",
    "distillation_loss_factory",
    "divergences",
    "jigsaw",
    "jigsaw_loss_factory",
    "mutual_information_cross_entropy_distillation_factory",
    "mutual_information_distillation_loss_factory",
    "presets",
]
