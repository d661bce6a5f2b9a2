"""The pytest plugin of the process that interprets kernels for an ordinary session: the other end of ``interpreted``.

The session collects and runs only what it is asked for. A question is one JSON object on one line:

``{"collect": module}``   the node ids and lines of the module's tests, or what failed
``{"run": node id}``      the reports of the test
"""

import json
import socket
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the socket."""
    parser.addoption("--interpreter-socket", type=int, required=True, help="file descriptor of a connected socket")


def pytest_configure(config: pytest.Config) -> None:
    """Answer questions in place of the session's own collection and loop."""
    config.pluginmanager.register(_Session(config))


class _Session:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._items: dict[str, pytest.Item] = {}
        self._reports: list[dict[str, Any]] = []
        self._errors: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> bool:
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        with socket.socket(fileno=self._config.getoption("interpreter_socket")) as connection:
            channel = connection.makefile("rw")
        for line in channel:
            question = json.loads(line)
            answer = (
                self._collect(session, question["collect"])
                if "collect" in question
                else self._run(session, question["run"])
            )
            channel.write(json.dumps(answer) + "\n")
            channel.flush()
        return True

    def _collect(self, session: pytest.Session, module: str) -> dict[str, Any]:
        self._errors = []
        found = session.perform_collect([str(self._config.rootpath / module)])
        self._items |= {item.nodeid: item for item in found}
        return {"tests": [(item.nodeid, item.reportinfo()[1] or 0) for item in found], "errors": self._errors}

    def _run(self, session: pytest.Session, nodeid: str) -> dict[str, Any]:
        if nodeid not in self._items:  # a process that replaces one that ended
            self._collect(session, nodeid.partition("::")[0])
        if nodeid not in self._items:
            return {"error": f"the interpreting process does not find {nodeid}"}
        self._reports = []
        self._config.hook.pytest_runtest_protocol(item=self._items[nodeid], nextitem=None)
        return {"reports": self._reports}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._errors.append(report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))
