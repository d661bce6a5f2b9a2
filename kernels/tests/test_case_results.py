"""Every case of ``kernel_proofs.cases`` computes the same as its baseline, in every order of programs.

The GPU programme times the same baselines beside the kernels.
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
