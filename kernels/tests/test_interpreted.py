"""Tests that another process interprets are tests of the ordinary session: names, tracebacks, output, selection."""

import os
import re
import subprocess
import sys

import pytest
from kernel_proofs import interpreted

pytest.importorskip("triton")

CONFTEST = "from kernel_proofs.interpreted import pytest_make_collect_report"
CONFIGURATION = '[tool.pytest.ini_options]\nmarkers = ["triton"]\n'
TESTS = """
import os

import pytest

interpreting = os.environ.get("TRITON_INTERPRET") == "1"
implementations = [pytest.param("triton", marks=pytest.mark.triton)] if interpreting else ["torch"]


@pytest.fixture
def fragile():
    yield
    assert not interpreting, "broken teardown"


@pytest.mark.parametrize("impl", implementations)
def test_both(impl):
    assert impl == ("triton" if interpreting else "torch")


@pytest.mark.triton
def test_failing():
    print("printed in the other process")
    left = 3
    assert left == 4


@pytest.mark.triton
@pytest.mark.skipif(not interpreting, reason="needs kernels")
def test_needs_kernels(): ...


@pytest.mark.triton
def test_skipping():
    pytest.skip("for a reason")


@pytest.mark.triton
def test_crashing():
    os._exit(7)


@pytest.mark.triton
def test_after_the_crash(): ...


@pytest.mark.triton
def test_teardown(fragile): ...
"""


def session(folder, *arguments, **variables):
    """Run pytest in the folder; the outcomes by name, and all that was printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INT"))}
    paths = [str(interpreted.__file__).removesuffix("/kernel_proofs/interpreted.py"), inherited.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-v", "-ra", "--color=no", "-p", "no:cacheprovider", *arguments]
    printed = subprocess.run(
        command,
        cwd=folder,
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ).stdout
    found = re.findall(r"test_some\.py::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", printed)
    found += [(name, outcome) for outcome, name in re.findall(r"(PASSED|FAILED|SKIPPED) test_some\.py::(\S+)", printed)]
    return dict(found), printed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pyproject.toml").write_text(CONFIGURATION)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(TESTS)
    return tmp_path


def line_of(text):
    return TESTS.splitlines().index(text) + 1


def test_each_test_is_reported_under_its_own_name(folder):
    outcomes, printed = session(folder)
    assert outcomes == {
        "test_both[torch]": "PASSED",
        "test_both[triton]": "PASSED",
        "test_failing": "FAILED",
        "test_needs_kernels": "PASSED",
        "test_skipping": "SKIPPED",
        "test_crashing": "FAILED",
        "test_after_the_crash": "PASSED",
        "test_teardown": "FAILED",
    }
    assert ">       assert left == 4\nE       assert 3 == 4" in printed
    assert f"test_some.py:{line_of('    assert left == 4')}: AssertionError" in printed
    assert "FAILED test_some.py::test_failing - assert 3 == 4" in printed
    assert "printed in the other process" in printed
    assert f"test_some.py:{line_of('def test_skipping():') - 1}: for a reason" in printed
    assert "the interpreting process ended with status 7" in printed
    assert "broken teardown" in printed
    assert "3 failed, 4 passed, 1 skipped" in printed


@pytest.mark.parametrize(
    "arguments", [["test_some.py::test_both[triton]"], ["-k", "both and triton"], ["-m", "triton", "-k", "both"]]
)
def test_selected_by_name_keyword_or_mark(folder, arguments):
    assert session(folder, *arguments)[0] == {"test_both[triton]": "PASSED"}


def test_marks_of_a_module_are_judged_by_the_other_process(folder):
    marks = "\npytestmark = [pytest.mark.triton, pytest.mark.skipif(not interpreting, reason='needs kernels')]\n"
    (folder / "test_some.py").write_text(TESTS + marks)
    outcomes, _ = session(folder, "-k", "both or needs_kernels")
    assert outcomes == {"test_both[triton]": "PASSED", "test_needs_kernels": "PASSED"}


def test_in_several_processes(folder):
    (folder / "test_other.py").write_text(TESTS)
    _, printed = session(folder, "-n", "2", "--dist", "loadfile")
    assert "6 failed, 8 passed, 2 skipped" in printed


def test_an_interpreting_session_runs_the_tests_itself(folder):
    outcomes, _ = session(folder, "-k", "both or needs_kernels", TRITON_INTERPRET="1")
    assert outcomes == {"test_both[triton]": "PASSED", "test_needs_kernels": "PASSED"}


def test_a_module_that_the_other_process_cannot_import(folder):
    (folder / "test_some.py").write_text("import os\nassert 'TRITON_INTERPRET' not in os.environ\n")
    _, printed = session(folder)
    assert "ERROR collecting test_some.py" in printed
    assert "In the interpreting process:" in printed
    assert "'TRITON_INTERPRET' not in os.environ" in printed
