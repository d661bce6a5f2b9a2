"""The strict interpreter in a process that interprets kernels; such a process for all others."""

import importlib.util

from kernel_proofs.interpreted import interpreting, pytest_make_collect_report

__all__ = ["pytest_make_collect_report"]

# Several folders have a module of this name, which doctest collection would confuse.
collect_ignore = ["conftest.py"]
if importlib.util.find_spec("triton") is None:
    # These modules define kernels.
    collect_ignore += ["test_case_results.py", "test_strict_interpreter.py", "test_traffic_growth.py"]
elif interpreting():
    from kernel_proofs import strict

    strict.install()
