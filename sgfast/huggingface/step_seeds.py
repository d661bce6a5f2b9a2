"""Seeds of random draws that a resumed training repeats without any stored state.

Every step seeds the generators from the training's seed, the step and the process. A checkpoint therefore needs neither
a generator's state nor the seed. With either of them, others could draw the training's noise again. The user gives the
seed again to resume.
"""

import copy
import hashlib
import random
from typing import Any

import numpy
import torch

# Replacement for every seed in a Trainer's arguments. Generators do not accept this value.
NO_SEED = -1


def seed_for(seed: int, *place: str | int) -> int:
    """Return a 64-bit seed for one place of a training, such as a step. Neighbouring places have unrelated seeds.

    Example:
        >>> seed_for(0, "step", 1) == seed_for(0, "step", 2)
        False
    """
    text = " ".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on all devices."""
    random.seed(seed)
    numpy.random.seed([seed % 2**32, seed >> 32])  # the generator that data pipelines use
    torch.manual_seed(seed)


def without_seeds(arguments: Any) -> Any:
    """Return a copy of ``transformers.TrainingArguments`` without seeds: ``seed`` is −1 and ``data_seed`` is None."""
    copied = copy.copy(arguments)
    copied.seed, copied.data_seed = NO_SEED, None
    return copied


def without_secrets(arguments: Any) -> Any:
    """Return a copy that may be stored: without seeds, and without the access token for the Hub."""
    copied = without_seeds(arguments)
    copied.hub_token = None
    return copied
