"""Command ``sgfast bench``: time, memory and accuracy on this machine."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from sgfast.benchmarking import families, sweeps, training_tasks
from sgfast.benchmarking.environment import environment, statement
from sgfast.benchmarking.growth import EAGER, growth
from sgfast.benchmarking.measuring import copy_gb_per_s
from sgfast.benchmarking.plotting import plot_accuracy, plot_growth
from sgfast.benchmarking.results import write_result
from sgfast.cli.option_checks import MOST
from sgfast.cli.progress import Follower
from sgfast.ops.dispatch import IMPLEMENTATIONS
from sgfast.ops.validation import did_you_mean
from sgfast.utils.devices import find_device
from sgfast.utils.files import check_output_file, check_output_folder

Axes = Mapping[str, Sequence[int]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Default sizes of each family. All of them take less than two minutes on two cores of a laptop.
_DEFAULT_AXES: dict[str, dict[str, list[int]]] = {
    "divergences": {
        "vocab": [1000, 4000, 16000, 32000, 65536, 131072, 262144],
        "tokens": [1, 8, 32, 256],
        "top_k": [1, 10, 100, 1000],
    },
    "hidden": {"tokens": [1, 16, 256, 4096], "width": [64, 512, 4096, 16384]},
    "noise": {"tokens": [1, 16, 256, 4096], "width": [64, 512, 4096, 16384]},
    "train": {"tokens": [16, 64, 256], "vocab": [1000, 8000, 32000]},
}
_BASES = {
    "divergences": {"tokens": 32, "vocab": 32000},
    "hidden": {"tokens": 256, "width": 4096},
    "noise": {"tokens": 256, "width": 4096},
    "train": {"tokens": 64, "vocab": 8000},
}
_TASKS: dict[str, Callable[..., Any]] = {
    "divergences": families.divergence_tasks,
    "hidden": families.hidden_tasks,
    "noise": families.noise_tasks,
    "train": training_tasks.training_tasks,
}
_OPTIONAL_COLUMNS = (("kept_bytes_per_element", ".2f"), ("value_error", ".0e"), ("gradient_error", ".0e"))
_LEGEND = """ms: median time. /eager: the time divided by the time of eager PyTorch. GB/s: the bytes that must move,
divided by the time; a plain copy reaches {:.1f} GB/s on this machine. MiB: the peak of allocated memory beyond the
inputs. kept: bytes per element that autograd stores for backward. error, grad: the largest error of values (absolute)
and of gradient rows (relative) against float64, over the first rows."""

_GROWTH_LEGEND = """^: exponent x of cost ~ size^x. cliff: the largest rise of the cost per unit from one size to the
next. The cliff under /eager is that of the time divided by the time of eager PyTorch, measured in turns."""


def run_bench(
    family: str,
    *,
    axes: Mapping[str, str | None],
    dtype: str,
    impl: str,
    device: str,
    seconds: float,
    out: Path,
) -> None:
    """Measure, print a table, and write JSON and plots. Wrong input raises ValueError before any measurement."""
    device = checked_device(device)
    if dtype not in DTYPES:
        suggestion = did_you_mean(dtype, DTYPES)
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}{suggestion}")
    impls = parse_impls(impl)
    sizes = {
        name: _DEFAULT_AXES[family][name] if text is None else parse_sizes(name, text) for name, text in axes.items()
    }
    # If the user gives sizes, only the given axes vary. One given size is a single measurement, not a sweep.
    base = {name: sweeps.base_of(sizes[name], wanted) for name, wanted in _BASES[family].items()}
    asked = {name: sizes[name] for name, text in axes.items() if text is not None}
    planned = sweeps.points(asked or sizes, base)
    if max(sizes.get("top_k", [0])) > base.get("vocab", 0) and "top_k" in (asked or sizes):
        raise ValueError(f"--top-k must be at most the vocabulary, {base['vocab']}; got {max(sizes['top_k'])}")
    check_output_folder(out)
    _check_memory(planned, device)
    out.mkdir(parents=True, exist_ok=True)
    plots = {name: out / f"{family}-{name}.png" for name in ("growth", "accuracy")}
    for path in (out / f"{family}.json", *plots.values()):
        check_output_file(path)
    described = environment(device)
    console, progress_console = Console(), Console(stderr=True)
    progress_console.print(statement(described), highlight=False)
    settings = {"dtype": DTYPES[dtype], "device": device, "impls": impls}
    with Follower(progress_console) as follower:
        follower.begin(family, len(planned) + 1, "sizes")
        copied = copy_gb_per_s(device)
        records = list(sweeps.run(_TASKS[family], planned, budget=seconds, on_progress=follower.reach, **settings))
        if family == "divergences":
            follower.reach(len(planned), "accuracy")
            records += sweeps.run_accuracy(_TASKS[family], base["vocab"], **settings)
        follower.reach(len(planned) + 1)
    timed = [record for record in records if "milliseconds" in record]
    for task in dict.fromkeys(record["task"] for record in timed):
        console.print(costs_table(f"{family}: {task}", [record for record in timed if record["task"] == task]))
    console.print(" ".join(_LEGEND.format(copied).split()), highlight=False)
    grown = growth(records)
    for task in dict.fromkeys(row["task"] for row in grown):
        console.print(growth_table(f"{family}: {task}", [row for row in grown if row["task"] == task]))
    if grown:
        console.print(" ".join(_GROWTH_LEGEND.split()), highlight=False)
    written = [out / f"{family}.json"]
    write_result(written[0], described, records, copy_gb_per_s=copied)
    title = statement(described)
    for name, plot in (("growth", plot_growth), ("accuracy", plot_accuracy)):
        if plot(plots[name], records, title):
            written.append(plots[name])
    console.print(statement(described), highlight=False)
    console.print(f"in {out}: {', '.join(path.name for path in written)}", highlight=False)


def _check_memory(planned: Sequence[tuple[str, Mapping[str, int]]], device: str) -> None:
    """Check that the inputs fit into memory. The system would otherwise kill the process without a message."""
    largest = max(math.prod(size for name, size in point.items() if name != "top_k") for _, point in planned)
    if device == "cpu" and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 2 * 4 * largest > memory:
            raise ValueError(f"two inputs of {largest} numbers take more than this machine's {memory / 2**30:.0f} GiB")


def parse_sizes(name: str, text: str) -> list[int]:
    """Parse whole numbers of at least 1 that are separated by commas.

    Example:
        >>> parse_sizes("vocab", "1000,32_000")
        [1000, 32000]
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1 or max(sizes) > MOST:
        raise ValueError(
            f"--{name.replace('_', '-')} must be whole numbers from 1 on, separated by commas; got {text[:100]!r}"
        )
    return sorted(set(sizes))


def parse_impls(text: str) -> list[str]:
    """Parse names of implementations that are separated by commas; repeated names count once."""
    impls = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for impl in impls:
        if impl not in IMPLEMENTATIONS:
            raise ValueError(
                f"--impl must be among {', '.join(IMPLEMENTATIONS)}, separated by commas; got {impl!r}"
                f"{did_you_mean(impl, IMPLEMENTATIONS)}"
            )
    return impls


def checked_device(device: str) -> str:
    """Check that benchmarks can run on a device, and return its name in PyTorch."""
    found = find_device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: benchmarks measure the CPU and GPUs of CUDA alone")
    return str(found)


def costs_table(task: str, records: Sequence[dict[str, Any]]) -> Table:
    """Make the table of a task, with one line for each size and implementation."""
    table = _table(task, ("size", "by"), ("ms", "/eager", "GB/s", "MiB", "kept", "error", "grad"))
    eager_ms = 1.0
    for record in records:
        if record["implementation"] == EAGER:
            eager_ms = record["milliseconds"]
        cells = [
            f"{record['milliseconds']:.3g}",
            f"{record['milliseconds'] / eager_ms:.2f}",
            f"{record['floor_gb_per_s']:.2f}" if record.get("floor_gb_per_s") else "",
            f"{record['peak_bytes'] / 2**20:.1f}",
            *(f"{record[name]:{form}}" if name in record else "" for name, form in _OPTIONAL_COLUMNS),
        ]
        table.add_row(_size_of(record), record["implementation"].removesuffix(" PyTorch"), *cells)
    return table


def growth_table(task: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Make the table of a task's fitted exponents x, where cost ~ size^x."""
    table = _table(f"{task}: growth", ("varied", "by"), ("ms ^", "cliff", "/eager", "MiB ^", "cliff"))
    costs = ("milliseconds_exponent", "milliseconds_cliff", "ratio_cliff", "peak_bytes_exponent", "peak_bytes_cliff")
    for row in rows:
        varied = f"{row['sweep']} {row['from']}-{row['to']}"
        by = row["implementation"].removesuffix(" PyTorch")
        table.add_row(varied, by, *(f"{row[cost]:.2f}" if cost in row else "" for cost in costs))
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Make an empty table. Columns are as narrow as their cells, so the table fits a terminal of 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _size_of(record: dict[str, Any]) -> str:
    sizes = " x ".join(str(record[name]) for name in ("tokens", "vocab", "width") if record.get(name))
    return sizes + (f" k={record['top_k']}" if record.get("top_k") else "")
