"""One test body for every implementation that this process can run.

``@each_implementation`` gives a test its ``impl``: ``"torch"`` and ``"compile"`` in the ordinary run; ``"triton"``,
marked ``triton``, in a process that interprets kernels (``TRITON_INTERPRET=1``, started by test_gates.py) or that tests
on a GPU (``SGFAST_TEST_DEVICE=cuda``, started by ``python -m benchmarks.gpu``). Tensors belong on ``DEVICE``.
"""

import os

import pytest

from sgfast.ops import dispatch

DEVICE = os.environ.get("SGFAST_TEST_DEVICE", "cpu")
RUNS_TRITON = dispatch.interpreting() or DEVICE != "cpu"

if dispatch.interpreting():
    from kernel_proofs import strict

    strict.install()

each_fast_implementation = pytest.mark.parametrize(
    "impl", [pytest.param("triton", marks=pytest.mark.triton)] if RUNS_TRITON else ["torch"]
)
each_implementation = pytest.mark.parametrize(
    "impl", [pytest.param("triton", marks=pytest.mark.triton)] if RUNS_TRITON else ["torch", "compile"]
)
