"""Fixtures over tiny causal language models, equal random draws in every run, no time limits for examples."""

import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch

from tests.tiny_models import tiny_noisy_model, tiny_pair, uneven_tokens

# The time of an example depends on the machine, so there is no deadline.
hypothesis.settings.register_profile("sgfast", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("sgfast")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed PyTorch, so that the draws of a test do not depend on other tests and a failure can be repeated.

    Noise layers remember the generator's states of their draws. The seed brings these states back in every test.
    """
    torch.manual_seed(0)
    if (seeds := sys.modules.get("sgfast.noise_layer.seeds")) is not None:
        seeds._draws = seeds._Draws()


@pytest.fixture
def make_noisy_model() -> Callable[..., Any]:
    """Build a tiny noisy model whose transform is neither trivial nor the same for every token."""
    return tiny_noisy_model


@pytest.fixture
def make_pair() -> Callable[..., tuple[Any, Any]]:
    """Build a teacher and a student over one base, or over equal ones, and one noise layer."""
    return tiny_pair


@pytest.fixture
def tokens() -> dict[str, torch.Tensor]:
    """Three right-padded sequences of 9, 6 and 4 tokens; every third token is not transformed."""
    return uneven_tokens()
