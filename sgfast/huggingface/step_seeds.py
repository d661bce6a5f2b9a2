"""Random draws that a resumed training repeats although nothing about them is stored.

The generators are seeded anew at every step, from the training's seed, the step and the process. A checkpoint so needs
no generator's state, from which the noise of the steps around it could be drawn again, and no seed: whoever resumes
gives the seed once more.
"""

import copy
import hashlib
import random
from typing import Any

import numpy
import torch

# What stands in a Trainer's arguments in place of every seed. No generator takes it for one.
NO_SEED = -1


def seed_for(seed: int, *place: str | int) -> int:
    """A seed of 64 bits for one place of a training: close places have unrelated seeds.

    Example:
        >>> seed_for(0, "step", 1) == seed_for(0, "step", 2)
        False
    """
    text = " ".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on all devices."""
    random.seed(seed)
    numpy.random.seed([seed % 2**32, seed >> 32])  # the generator that data pipelines use
    torch.manual_seed(seed)


def without_seeds(arguments: Any) -> Any:
    """A copy of ``transformers.TrainingArguments`` that knows no seed."""
    copied = copy.copy(arguments)
    copied.seed, copied.data_seed = NO_SEED, None
    return copied


def without_secrets(arguments: Any) -> Any:
    """A copy to be stored: without seeds, and without the token for the Hub."""
    copied = without_seeds(arguments)
    copied.hub_token = None
    return copied
