"""Turn result files into docs/benchmarks.md and its plots.

    python -m benchmarks.report [FILE …] [--out docs/benchmarks.md]

Without files the page shows every JSON under ``benchmarks/results``. Each file is a section with its device, date and
commit. Every number on the page stands in a file, or is the ratio of two numbers in one file.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sgfast.benchmarking.environment import statement
from sgfast.benchmarking.growth import EAGER, growth
from sgfast.benchmarking.plotting import plot_accuracy, plot_growth
from sgfast.utils.files import replacing

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
# Files with a format of their own: docs/training.md shows the curves, README the ratios.
OTHER_FORMATS = {RESULTS / f"{name}.json" for name in ("known_transform_frontier", "sizes", "training-curves")}
_FIRST_LINES = """# Benchmarks

`python -m benchmarks.report` writes this page from the files that are named below. Times are medians. The columns:

* *floor GB/s*: the bytes that must move, over the time. Each input is read once, and each output is written once.
* *peak MiB*: the most memory that is allocated at once beyond the inputs. The results are included.
* *kept B*: bytes per element that autograd holds between forward and backward beyond the inputs.
* *error*: the largest absolute error of a value against float64. Errors are measured on the first rows.
* *relative error*, *gradient error*: the norm of a row's error over the norm of the row. The largest is shown.
* */ peer*: the time over the time of the peer for the same task and size. The peer is eager PyTorch, or TextBrewer for
  the presets. If the implementation and the peer ran in turns, this is the median of the ratios of the turns.

Tables of growth show how a cost rises with one size:

* *time ^*, *memory ^*: the exponent in cost ~ size ^ exponent.
* *time step*, *memory step*: the cost per unit of size, over the cost per unit at the next smaller size. The largest of
  these ratios is shown. A number above 1 means that a unit costs more at the larger size.
* *step of time / eager*: the time over the time of eager PyTorch, over the same ratio at the next smaller size. The
  largest is shown. These times are medians, and eager PyTorch ran in turns with the implementation. The other times in
  tables of growth are the times of the fastest rounds.
"""
_COLUMNS = {
    "milliseconds": ("ms", "{:.3g}"),
    "floor_gb_per_s": ("floor GB/s", "{:.3g}"),
    "peak_bytes": ("peak MiB", "{:.1f}"),
    "kept_bytes_per_element": ("kept B", "{:.3f}"),
    "value_error": ("error", "{:.0e}"),
    "relative_value_error": ("relative error", "{:.0e}"),
    "gradient_error": ("gradient error", "{:.0e}"),
}
_SIZES = ("tokens", "vocab", "top_k", "batch", "width", "queries", "rows", "shape", "dtype")


def read(path: Path) -> dict[str, Any]:
    """Read a result file. Raise ValueError with the path if the file is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    described = content.get("environment") if isinstance(content, dict) else None
    if not isinstance(described, dict) or not {"device", "date", "commit", "kind"} <= set(described):
        raise ValueError(f"{path} does not say on which device, when and at which commit it was measured")
    return dict(content)


def section(path: Path, content: dict[str, Any], page: Path) -> Iterator[str]:
    """Yield the part of the page for one file, and write its plots beside the page."""
    name = path.relative_to(RESULTS).with_suffix("") if path.is_relative_to(RESULTS) else Path(path.stem)
    described = content["environment"]
    yield f"\n## {' '.join(name.parts).replace('-', ' ')}\n"
    yield f"File `{name}.json`. {statement(described)}"
    if content.get("copy_gb_per_s"):
        yield f"A plain copy reached {content['copy_gb_per_s']:.3g} GB/s in this run."
    yield from gpu_parts(content.get("parts") or {})
    records = content.get("records") or []
    plots = page.parent / page.stem
    plots.mkdir(parents=True, exist_ok=True)
    for kind, plot in (("growth", plot_growth), ("accuracy", plot_accuracy)):
        file = plots / f"{'-'.join(name.parts)}-{kind}.png"
        swept = [record for record in records if record.get("sweep")]
        if swept and plot(file, swept, statement(described)):
            yield f"\n![{kind} of {name}]({plots.name}/{file.name})"
    yield from growth_lines(growth(records) or (content.get("parts") or {}).get("growth", {}).get("growth") or [])
    single = [record for record in records if not record.get("sweep")]
    for task in dict.fromkeys(record["task"] for record in single):
        yield from task_lines(task, [one for one in single if one["task"] == task])


def task_lines(task: str, records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a table with a line for each size and implementation."""
    sizes = [name for name in _SIZES if any(record.get(name) is not None for record in records)]
    columns = [name for name in _COLUMNS if any(record.get(name) is not None for record in records)]
    rows = []
    for record in sorted(records, key=lambda one: [str(one.get(name)) for name in sizes]):
        cells = [str(record[name]) if record.get(name) is not None else "" for name in sizes]
        cells += [record["implementation"], *(_cell(record, name) for name in columns)]
        peer = next((one for one in records if _is_peer(one, record, sizes)), record)
        ratio = record.get("times_peer") or record["milliseconds"] / peer["milliseconds"]
        rows.append([*cells, f"{ratio:.2f}"])
    yield from table(task, [*sizes, "by", *(_COLUMNS[name][0] for name in columns), "/ peer"], rows)


def growth_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of exponents and largest steps; the head of the page explains the columns."""
    if not rows:
        return
    headings = ["varied", "task", "by", "time ^", "time step", "step of time / eager", "memory ^", "memory step"]
    names = ("milliseconds_exponent", "milliseconds_cliff", "ratio_cliff", "peak_bytes_exponent", "peak_bytes_cliff")
    cells = (
        [
            f"{row['sweep']} {row['from']} to {row['to']}",
            row["task"],
            row["implementation"],
            *("" if row.get(name) is None else f"{row[name]:.2f}" for name in names),
        ]
        for row in rows
    )
    yield from table("Growth", headings, cells)


def gpu_parts(parts: dict[str, Any]) -> Iterator[str]:
    """Yield the results of the parts of the GPU programme, failures included."""
    for name, part in parts.items():
        if "error" in part:
            yield f"\nThe part `{name}` failed: `{part['error'].strip().splitlines()[-1]}`."
    if "gb_per_s" in parts.get("copy", {}):
        yield f"A plain copy reached {parts['copy']['gb_per_s']:.4g} GB/s."
    if parts.get("tests", {}).get("summary"):
        yield f"\nNumerical tests on the GPU: {parts['tests']['summary'].strip('= ')}."
    for tool in parts.get("sanitizer", {}).get("tools", []):
        yield f"\ncompute-sanitizer {tool['tool']}: {tool['launched']} launches, {' '.join(tool['summary'])}."
    if "skipped" in parts.get("sanitizer", {}):
        yield f"\nSanitizer: {parts['sanitizer']['skipped']}."
    large = parts.get("large", {}).get("cases", [])
    if large:
        rows = ([one["case"], " x ".join(map(str, one["shape"])), "yes" if one["equal"] else "NO"] for one in large)
        yield from table("More than 2^31 elements", ["case", "shape", "last rows right"], rows)
    kernels = parts.get("kernels", {}).get("cases", [])
    if kernels:
        cells = (
            [
                one["case"],
                str(one["rows"]),
                f"{one['milliseconds']:.3f}",
                f"{one['floor_gb_per_s']:.0f}",
                f"{one['percent_of_copy']:.0f}",
                f"{one['torch_compile_ms'] / one['milliseconds']:.2f}" if one.get("torch_compile_ms") else "",
                {True: "yes", False: "NO", None: ""}[one.get("agrees")],
            ]
            for one in kernels
        )
        headings = ["kernel", "rows", "ms", "floor GB/s", "% of a copy", "torch.compile takes, times", "agrees"]
        yield from table("Kernels", headings, cells)


def table(
    title: str, headings: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]
) -> Iterator[str]:
    """Yield a table in Markdown."""
    yield f"\n**{title}**\n"
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _is_peer(one: dict[str, Any], record: dict[str, Any], sizes: Sequence[str]) -> bool:
    """Return True if ``one`` is the peer of the record: eager PyTorch or TextBrewer, at the same sizes."""
    return one["implementation"] in (EAGER, "TextBrewer") and all(one.get(name) == record.get(name) for name in sizes)


def _cell(record: dict[str, Any], name: str) -> str:
    if record.get(name) is None:
        return ""
    return _COLUMNS[name][1].format(record[name] / 2**20 if name == "peak_bytes" else record[name])


def write_page(files: Sequence[Path], page: Path) -> None:
    """Write the page and its plots."""
    lines = [_FIRST_LINES.rstrip()]
    contents = [(path, read(path)) for path in files]
    for path, content in contents:
        lines += section(path.resolve(), content, page)
    others = sorted(RESULTS.glob("*.md"))
    if others:
        lines += ["\n## Other results\n", "Programs of their own wrote these files. Each file says how it was made.\n"]
        for path in others:
            title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            lines.append(f"* [{title}](../benchmarks/results/{path.name})")
    page.parent.mkdir(parents=True, exist_ok=True)
    with replacing(page) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: every JSON under benchmarks/results")
    parser.add_argument("--out", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    files = options.files or sorted(set(RESULTS.rglob("*.json")) - OTHER_FORMATS)
    try:
        write_page(files, options.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out} from {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
