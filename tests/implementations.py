"""One test body for every implementation that this process can run.

``@each_implementation`` gives a test its ``impl``. In an ordinary process ``impl`` is ``"torch"`` and ``"compile"``. In
a process that interprets kernels (``TRITON_INTERPRET=1``) or that tests on a GPU (``SGFAST_TEST_DEVICE=cuda``) ``impl``
is ``"triton"``, and the test is marked ``triton``. pytest starts the interpreting process beside the ordinary one
(``kernel_proofs.interpreted``); ``python -m benchmarks.gpu`` starts the process for the GPU. Tensors belong on
``DEVICE``.
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
