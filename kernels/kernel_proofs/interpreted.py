"""Tests of interpreted kernels as tests of an ordinary session.

Triton decides at its first import whether the process interprets kernels or compiles them. An ordinary session
compiles. Its tests marked ``triton`` are therefore collected and run by a second process, the one of
``kernel_proofs.interpreter``. The session reports each of these tests under the test's own name, with the traceback
and the output that the second process saw. Options such as ``-k``, ``-m`` and ``-n`` apply to them as to other tests.

A ``conftest.py`` asks for this, for the modules in its folder:

    from kernel_proofs.interpreted import pytest_make_collect_report

Nothing is done where the session itself can run kernels, or where triton is missing.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_interpreter = pytest.StashKey["Interpreter"]()


def interpreting() -> bool:
    """Return True if this process interprets kernels."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _runs_kernels() -> bool:
    return interpreting() or os.environ.get("SGFAST_TEST_DEVICE", "cpu") != "cpu"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    """Replace a module's tests marked ``triton`` by those that the interpreting process finds in the module."""
    report = yield
    # Collectors of doctests are subclasses of Module.
    if type(collector) is not pytest.Module or not report.passed:
        return report
    if _runs_kernels() or importlib.util.find_spec("triton") is None:
        return report
    interpreter = collector.config.stash.get(_interpreter, None)
    if interpreter is None:
        interpreter = collector.config.stash[_interpreter] = Interpreter(collector.config)
        collector.config.add_cleanup(interpreter.close)
    found = interpreter.ask({"collect": collector.nodeid})
    if found.get("errors"):
        report.outcome, report.longrepr = "failed", "In the interpreting process:\n" + "\n".join(found["errors"])
        return report
    ordinary = [one for one in report.result if one.get_closest_marker("triton") is None]
    interpreted = [
        InterpretedTest.from_parent(collector, name=nodeid.removeprefix(f"{collector.nodeid}::"), line=line)
        for nodeid, line in found["tests"]
    ]
    report.result = ordinary + interpreted
    return report


class InterpretedTest(pytest.Item):
    """A test that the interpreting process runs."""

    def __init__(self, *, line: int, **rest: Any) -> None:
        super().__init__(**rest)
        self.line = line
        self.add_marker("triton")

    def iter_markers_with_node(self, name: str | None = None) -> Iterator[tuple[pytest.Item, pytest.Mark]]:
        """Leave the module's marks to the interpreting process: this process would judge a ``skipif`` wrongly."""
        return ((self, mark) for mark in self.own_markers if name in (None, mark.name))

    def runtest(self) -> None:
        """Take over the outcome and the output of the test's setup, call and teardown."""
        answer = self.config.stash[_interpreter].ask({"run": self.nodeid})
        if "error" in answer:
            raise InterpretedError(answer["error"])
        reports = [
            self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            for data in answer["reports"]
        ]
        # Each report repeats the sections of those before it.
        for title, content in reports[-1].sections:
            _, key, when = title.split()
            self.add_report_section(when, key, content)
        failures = [report for report in reports if report.failed]
        if len(failures) == 1:
            raise InterpretedError(failures[0].longrepr)
        if failures:
            raise InterpretedError("\n".join(report.longreprtext for report in failures))
        for report in reports:
            if report.skipped and hasattr(report, "wasxfail"):
                pytest.xfail(report.wasxfail)
            if report.skipped:
                # The report has the place of the test. The place of this call says nothing.
                raise pytest.skip.Exception(report.longrepr[2].removeprefix("Skipped: "), _use_item_location=True)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show the traceback of the interpreting process."""
        if isinstance(excinfo.value, InterpretedError):
            return excinfo.value.shown
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Name the test's place in its file."""
        return self.path, self.line, self.name


class InterpretedError(Exception):
    """A test failed in the interpreting process; ``shown`` is the traceback that pytest made there."""

    def __init__(self, shown: Any) -> None:
        super().__init__(str(shown))
        self.shown = shown


class Interpreter:
    """A pytest session in a process that interprets kernels. The process starts with the first question."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and wait for the answer. If the process ends first, ``error`` says how."""
        if self._process is None:
            self._start()
        assert self._process is not None
        try:
            self._channel.write(json.dumps(question) + "\n")
            self._channel.flush()
            answer = self._channel.readline()
        except OSError:
            answer = ""
        if answer:
            return dict(json.loads(answer))
        status = self._process.wait()
        self._log.seek(0)
        printed = self._log.read().decode(errors="replace")
        self.close()
        text = f"the interpreting process ended with status {status}:\n{printed[-4000:]}"
        return {"error": text, "errors": [text]}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes the file
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        paths = [str(Path(__file__).parents[1]), *filter(None, [variables.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "pytest", "-p", "kernel_proofs.interpreter"]
        command += ["--interpreter-socket", str(theirs.fileno()), "-m", "triton", "--strict-markers"]
        command += ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["--tb", self._config.option.tbstyle, "--rootdir", str(self._config.rootpath)]
        with theirs:
            self._process = subprocess.Popen(
                command,
                cwd=self._config.rootpath,
                env=variables | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        with ours:
            self._channel = ours.makefile("rw")

    def close(self) -> None:
        """End the process. The next question starts another."""
        if self._process is None:
            return
        self._channel.close()
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._process = None
