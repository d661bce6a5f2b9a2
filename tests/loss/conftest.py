"""Fixtures of the loss factories."""

import pytest

from tests.loss.factory_cases import four_rows


@pytest.fixture
def batch(tokens):
    """Four rows of tokens."""
    return four_rows(tokens)
