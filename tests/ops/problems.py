"""A `Problem` for tests that call the operators of divergences themselves."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.ops.divergence_problem import Problem


def problem(noisy: Tensor, clean: Tensor, kinds: Sequence[str], **options: Any) -> Problem:
    """The problem of these logits and kinds, at temperature 1 over the whole vocabulary unless told otherwise."""
    defaults = {
        "labels": None,
        "support_mask": None,
        "mask": None,
        "temperature": torch.ones(noisy.shape[:-1], device=noisy.device),
        "clean_temperature": None,
        "top_k": 0,
        "top_k_of": "both",
        "support": "tail",
        "beta": 0.5,
        "skew": 0.1,
        "label_smoothing": 0.0,
        "max_chunk_bytes": 10**6,
        "impl": None,
        "noisy_wanted": True,
        "clean_wanted": True,
    }
    return Problem(noisy, clean, kinds=",".join(kinds), **defaults | options)
