"""One table for `pytest benchmarks/bench_*.py`, in place of pytest-benchmark's, and one JSON file for each of them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sgfast.benchmarking.environment import environment
from sgfast.benchmarking.measuring import Task, copy_gb_per_s, measure
from sgfast.benchmarking.results import write_result

Table = list[dict[str, Any]]
_tables = pytest.StashKey[dict[str, Table]]()
_run = pytest.StashKey[tuple[dict[str, Any], float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="sizes that take seconds: to see that a benchmark runs")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="not of bench_divergences")
    parser.addoption("--out", type=Path, help="folder for FAMILY-DEVICE.json, as benchmarks.report reads them")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tables] = {}


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """Rows of this file, to print at the end: dicts."""
    name = request.path.stem.removeprefix("bench_").replace("_", "-")
    return request.config.stash[_tables].setdefault(name, [])


@pytest.fixture
def small(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--small"))


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--device"))


@pytest.fixture
def run_task(benchmark: Any, pytestconfig: pytest.Config, table: Table, small: bool) -> Callable[[Task, str], None]:
    """Time an implementation of a task by pytest-benchmark, measure the rest, and note it all."""

    def run(task: Task, implementation: str) -> None:
        if implementation not in task.implementations:
            pytest.skip(f"{implementation} is not installed, or has no {task.name}")
        if small and "compile" in implementation:
            pytest.skip("compiling takes longer than --small may")

        def once() -> None:
            task.run(implementation)
            if task.device.type == "cuda":
                torch.cuda.synchronize()

        started = time.perf_counter()
        once()
        once()
        # Two seconds of rounds or three of them.
        rounds = 3 if small else max(3, min(30, int(4 / (time.perf_counter() - started))))
        benchmark.pedantic(once, rounds=rounds)
        record = measure(task, implementation, benchmark.stats.stats.median)
        benchmark.extra_info.update(record)
        table.append(record)
        _write(pytestconfig)  # what is measured stays, whatever ends the run

    return run


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats() -> list[Any]:
    return []  # its own table


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, rows in config.stash[_tables].items():
        if rows:
            terminalreporter.write_sep("=", name)
            for line in _lines(rows):
                terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    _write(session.config)


def _write(config: pytest.Config) -> None:
    out, device = config.getoption("--out"), config.getoption("--device")
    if out is None or not any(config.stash[_tables].values()):
        return
    if _run not in config.stash:
        config.stash[_run] = environment(device), copy_gb_per_s(device)
    described, copied = config.stash[_run]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in config.stash[_tables].items():
        if rows:
            write_result(out / f"{name}-{device}.json", described, rows, copy_gb_per_s=copied)


def _lines(rows: Table) -> list[str]:
    """Columns for all keys that a row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "family"))
    lines = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
