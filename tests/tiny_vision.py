"""A tiny image classifier with dropout and batch norm, and a noisy model over it."""

import torch
from torch import nn

from sgfast.model import NoisyModel
from sgfast.noise_layer import CloakNoiseLayerOneShot

SHAPE = (3, 8, 8)
SETTINGS = {"input_shape": (1, *SHAPE), "scale": (0.05, 1.0), "rhos_init": 0.0, "seed": 5}


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, kernel_size=3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def make_model(**arguments):
    return NoisyModel(CloakNoiseLayerOneShot, make_base(), **(SETTINGS | arguments))
