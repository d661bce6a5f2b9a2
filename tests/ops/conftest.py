"""Tests of kernels run in a process that interprets kernels."""

from kernel_proofs.interpreted import pytest_make_collect_report

__all__ = ["pytest_make_collect_report"]

# Several folders have a module of this name, which doctest collection would confuse.
collect_ignore = ["conftest.py"]
