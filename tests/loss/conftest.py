"""Fixtures of the loss factories."""

import pytest
import torch


@pytest.fixture
def batch(tokens):
    """Four rows: the three of ``tokens``, and one that shares one transformed token with the first."""
    row = {
        "input_ids": tokens["input_ids"][:1].roll(2, dims=1),
        "attention_mask": (torch.arange(9) < 8).long()[None],
        "noise_mask": torch.tensor([[False] * 4 + [True] + [False] * 4]),
        "loss_mask": torch.ones(1, 9, dtype=torch.bool),
    }
    found = {name: torch.cat([value, row[name]]) for name, value in tokens.items()}
    found["loss_mask"] = found["loss_mask"] & (torch.arange(9) > 1)
    return found
