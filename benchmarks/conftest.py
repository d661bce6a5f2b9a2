"""One table for `pytest benchmarks/bench_*.py`, in place of pytest-benchmark's."""

from collections.abc import Iterator
from typing import Any

import pytest

Table = list[dict[str, Any]]
_table = pytest.StashKey[Table]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="sizes that take seconds: to see that a benchmark runs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_table] = []


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Iterator[Table]:
    """Rows to print at the end: dicts of one set of keys."""
    return pytestconfig.stash[_table]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats() -> list[Any]:
    return []  # its own table


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_table]
    if not rows:
        return
    lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    terminalreporter.write_sep("=", "benchmarks")
    for line in lines:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
