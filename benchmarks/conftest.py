"""The table of `pytest benchmarks/bench_*.py`, in place of pytest-benchmark's, and a JSON file for each module."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from sgfast.benchmarking.environment import environment
from sgfast.benchmarking.measuring import Task, copy_gb_per_s, measure, run_timed
from sgfast.benchmarking.results import write_result

Table = list[dict[str, Any]]
_tables = pytest.StashKey[dict[str, Table]]()
_run = pytest.StashKey[tuple[dict[str, Any], float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="sizes that take seconds, to see that a benchmark runs")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"])
    parser.addoption("--out", type=Path, help="folder for FAMILY-DEVICE.json, as benchmarks.report reads them")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tables] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out compilations with --small: they take too long."""
    if not config.getoption("--small"):
        return
    compiling = [item for item in items if "compile" in item.name]
    config.hook.pytest_deselected(items=compiling)
    items[:] = [item for item in items if item not in compiling]


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """Return the rows of this module, dicts that are printed at the end."""
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
    """Time an implementation of a task by pytest-benchmark, in turns with its peer. Note times, memory and errors."""

    def run(task: Task, implementation: str) -> None:
        torch._dynamo.reset()  # the first compilation takes sizes as constants
        peer = next(iter(task.implementations))
        peer_seconds, found = [], []

        def run_peer() -> None:
            found.clear()  # so that no round includes the freeing of memory
            if implementation != peer:
                peer_seconds.append(run_timed(lambda: task.run(peer), task.device)[0])

        def once() -> None:
            found.append(task.run(implementation))
            if task.device.type == "cuda":
                torch.cuda.synchronize()

        once()
        run_peer()
        seconds = run_timed(once, task.device)[0] + sum(peer_seconds)
        peer_seconds.clear()
        # Rounds for four seconds, and at least five rounds.
        rounds = 3 if small else max(5, min(30, int(4 / seconds)))
        benchmark.pedantic(once, setup=run_peer, rounds=rounds)
        found.clear()
        times = benchmark.stats.stats.data
        record = measure(task, implementation, median(times))
        if peer_seconds:
            record["times_peer"] = median(ours / theirs for ours, theirs in zip(times, peer_seconds, strict=True))
        benchmark.extra_info.update(record)
        table.append(record)
        _write(pytestconfig)  # written now, so that a later failure keeps these results

    return run


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats() -> list[Any]:
    return []  # no table of pytest-benchmark


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
    """Format the rows as a table with a column for each key of any row."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "family"))
    lines = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
