"""Compile every launch of ``kernel_proofs.cases`` for six GPUs and report its resources. No GPU is used.

    python -m benchmarks.kernel_report            print the table
    python -m benchmarks.kernel_report --check    compare with budgets and snapshot; exit 1 and say what changed
    python -m benchmarks.kernel_report --update   write the snapshot of the installed Triton version

Budgets are hard: no spills, no double-precision arithmetic, and the case's limits of registers (NVIDIA), of 16-byte
loads and of instructions per element (sm90). Every number is also compared with the snapshot,
``kernel_reports/triton-<version>.json``. The compiler's output is deterministic, so a difference is a change that
somebody made. Look at the change before you accept it with ``--update``.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

Report = dict[str, dict[str, dict[str, float]]]
_SNAPSHOTS = Path(__file__).parent / "kernel_reports"


def build_report(targets: list[str]) -> Report:
    """Map case → target → resources. A case that launches several kernels has an entry for each kernel."""
    from kernel_proofs.cases import CASES
    from kernel_proofs.compilation import TARGETS, caught_launches, compile_launch

    report: Report = {}
    for case in CASES:
        with caught_launches() as launches:
            case.function(*case.arguments(case.rows, "meta"))
        for i, launch in enumerate(launches):
            name = case.name if len(launches) == 1 else f"{case.name} [{i}]"
            report[name] = {target: compile_launch(launch, TARGETS[target])._asdict() for target in targets}
    return report


def over_budget(report: Report) -> list[str]:
    """One line for each budget that is exceeded."""
    from kernel_proofs.cases import CASES

    lines = []
    for name, by_target in report.items():
        case = next(case for case in CASES if name in (case.name, *(f"{case.name} [{i}]" for i in range(9))))
        for target, found in by_target.items():
            nvidia = target.startswith("sm")
            limits = [("spills", 0), ("float64", 0), *([("registers", case.registers)] if nvidia else [])]
            lines += [
                f"{name}, {target}: {key} {found[key]}, budget {limit}" for key, limit in limits if found[key] > limit
            ]
            # A wave of 64 threads on AMD shares the elements that a warp of 32 threads loads on NVIDIA.
            wanted = case.vector_loads if nvidia else case.vector_loads // 2
            if found["vector_loads"] < wanted:
                lines.append(f"{name}, {target}: {found['vector_loads']} 16-byte loads, at least {wanted} wanted")
            budget = dict(enumerate(case.instructions)).get(_launch_index(name))
            if target == "sm90" and budget is not None and found["instructions_per_element"] > budget:
                spent = found["instructions_per_element"]
                lines.append(f"{name}, sm90: {spent} instructions per element, budget {budget}")
    return lines


def _launch_index(name: str) -> int:
    """Return the i of "case [i]", and 0 for a case of one launch."""
    return int(name[-2]) if name.endswith("]") else 0


def differences(report: Report, snapshot: Report) -> list[str]:
    """One line for each number that differs from the snapshot."""
    lines = []
    for name in sorted({*report, *snapshot}):
        if name not in report or name not in snapshot:
            lines.append(f"{name}: {'not in the snapshot' if name in report else 'only in the snapshot'}")
            continue
        for target, found in report[name].items():
            expected: dict[str, Any] = snapshot[name].get(target, {})
            lines += [
                f"{name}, {target}: {key} {expected.get(key, '-')} → {value}"
                for key, value in found.items()
                if expected.get(key) != value
            ]
    return lines


def print_table(report: Report) -> None:
    """Print one line per case and target."""
    columns = {
        "registers": "regs",
        "spills": "spill",
        "shared_bytes": "shared",
        "vector_loads": "ld16B",
        "loads": "ld",
        "vector_stores": "st16B",
        "stores": "st",
        "special_per_element": "special/el",
        "instructions_per_element": "instr/el",
        "instructions": "instr",
    }
    width = max(map(len, report))
    print(f"{'launch':{width}s} {'target':>7s}", *(f"{title:>6s}" for title in columns.values()))
    for name, by_target in report.items():
        for target, found in by_target.items():
            numbers = (f"{found[key]:>{max(6, len(title))}}" for key, title in columns.items())
            print(f"{name:{width}s} {target:>7s}", *numbers)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if a budget or the snapshot is not met")
    parser.add_argument("--update", action="store_true", help="write the snapshot")
    parser.add_argument("--targets", default="sm80,sm90,sm100,sm120,gfx942,gfx950", help="default: %(default)s")
    options = parser.parse_args(arguments)
    # Kernels decorated for the interpreter cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    report = build_report(options.targets.split(","))
    snapshot_file = _SNAPSHOTS / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.json"
    if options.update:
        snapshot_file.parent.mkdir(exist_ok=True)
        snapshot_file.write_text(json.dumps(report, indent=1) + "\n")
    if not options.check:
        print_table(report)
    problems = over_budget(report)
    if options.check and snapshot_file.exists():
        snapshot = json.loads(snapshot_file.read_text())
        changed = differences(report, snapshot)
        if changed:
            problems += [*changed, "if these changes are meant: python -m benchmarks.kernel_report --update"]
    elif options.check:
        print(f"no snapshot for Triton {triton.__version__} ({snapshot_file}); budgets only")
    print("\n".join(problems) if problems else f"{len(report)} launches within budget on {options.targets}")
    return 1 if problems and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
