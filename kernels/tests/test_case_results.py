"""Every case of ``kernel_proofs.cases`` computes what the baseline computes that ``benchmarks.gpu`` times beside it.

Run by test_gates.py in a process of its own: ``TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_cases.py``.
"""

import pytest
from kernel_proofs import strict
from kernel_proofs.baselines import BASELINES, assert_equal_results
from kernel_proofs.cases import CASES

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_baseline(case, order):
    with strict.program_order(order):
        baseline = BASELINES[case.function.__name__]
        assert_equal_results(case.function, baseline, case.arguments(5, "cpu"), case.jumps)
