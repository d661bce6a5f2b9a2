"""Every case of ``sgfast_kernels.cases`` computes what the baseline computes that ``benchmarks.gpu`` times beside it.

Run by test_gates.py in a process of its own: ``TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_cases.py``.
"""

import pytest
from sgfast_kernels.cases import CASES

from benchmarks import gpu_parts
from benchmarks.baselines import BASELINES
from tests.gates import strict

strict.install()

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_baseline(case, order):
    with strict.program_order(order):
        baseline = BASELINES[case.function.__name__]
        gpu_parts.assert_equal_results(case.function, baseline, case.arguments(5, "cpu"), case.jumps)
