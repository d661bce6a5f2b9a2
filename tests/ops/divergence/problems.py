"""Logits, supports and a `Problem` that the tests of divergences share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.ops.divergence.problem import Problem
from tests.implementations import DEVICE

SUPPORTS = (None, "truncate", "renormalize", "tail")


def pair(*shape: int, noise: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Clean logits randn·3, noisy ones that differ by `noise`."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    noisy = clean + noise * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return noisy.to(DEVICE, dtype), clean.to(DEVICE, dtype)


def masked_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    noisy, clean = (side.cpu() for side in pair(rows, 4, 6, noise=1.0, dtype=dtype))
    mask = torch.arange(rows * 4).view(rows, 4) % 3 != 0
    noisy[~mask] = float("nan")
    return noisy, clean, mask


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
