"""The GPU programme: all measurements and tests that need a GPU, in one run and one JSON file.

    python -m benchmarks.gpu [--only kernels,divergences] [--minutes 8] [--out benchmarks/results]

Each part is a process of its own with a time limit: a part that fails or hangs does not end the others.

============ ==========================================================================================================
copy         the bandwidth of a plain copy: the ceiling that every other figure is compared with
tests        the numerical tests of the kernels, on the GPU
large        tensors of more than 2^31 elements: the last rows give the same results as the last rows alone
sanitizer    memcheck and racecheck of compute-sanitizer, if installed, over every kernel at small shapes
kernels      every kernel: its floor as a percentage of the copy, and torch.compile beside it while time is left
divergences  the public operation at [8192, 151936] in bfloat16 beside eager PyTorch, torch.compile, Liger-Kernel
growth       time and memory against vocabulary, tokens and top-k
============ ==========================================================================================================

The results that a part has found before its time is up are kept. The programme writes
``benchmarks/results/gpu-<device>-<date>.json``. The exit status is 1 if a part failed. Without a GPU the programme says
so and exits 0. The parts are functions of ``kernel_proofs.gpu_parts``.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgfast.benchmarking.environment import environment
from sgfast.utils.files import replacing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


class Part(NamedTuple):
    """A process that writes each result at once to the file named by its last argument."""

    name: str
    command: Sequence[str]
    seconds: float


def _part(name: str, seconds: float) -> Part:
    return Part(name, [sys.executable, "-m", "kernel_proofs.gpu_parts", name], seconds)


# Without the tests the limits add up to less than six minutes. The tests come last and take the time that is left.
PARTS = [
    _part("copy", 30),
    _part("kernels", 110),
    _part("divergences", 70),
    _part("large", 40),
    _part("sanitizer", 55),
    _part("growth", 30),
    _part("tests", 240),
]


def run_parts(parts: Sequence[Part], minutes: float) -> dict[str, dict[str, Any]]:
    """Run the parts one after the other. A part's entry has its ``seconds``, and ``error`` if the part failed."""
    deadline = time.monotonic() + 60 * minutes
    found = {}
    for part in parts:
        limit = min(part.seconds, deadline - time.monotonic())
        print(f"{part.name}: at most {max(limit, 0):.0f} s", flush=True)
        found[part.name] = run_part(part, limit) if limit > 1 else {"error": "no time was left", "seconds": 0.0}
        state = found[part.name].get("error", "done").splitlines()[-1]
        print(f"{part.name}: {state}, {found[part.name]['seconds']:.0f} s", flush=True)
    return found


def run_part(part: Part, limit: float) -> dict[str, Any]:
    """Run one part. The results that the part wrote before a failure are kept."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "found.json", Path(folder) / "log"
        error = None
        with log.open("w") as stream:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
            # A time limit must also end the part's children, hence a session of its own.
            process = subprocess.Popen(
                [*part.command, str(file)],
                cwd=ROOT,
                env=environment | {"SGFAST_PART_SECONDS": f"{limit:.0f}"},
                stderr=stream,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
                error = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                error = f"not done after {limit:.0f} s"
            finally:
                _end(process)
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if error is not None:
            last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
            found["error"] = "\n".join(one for one in (last, found.get("error"), error) if one)
            print(found["error"], flush=True)
    return found | {"seconds": round(time.monotonic() - started, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_result(folder: Path, described: Mapping[str, Any], parts: Mapping[str, dict[str, Any]]) -> Path:
    """Write one file for the run. Like other result files, it has the records of all parts in one list."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [record for part in parts.values() for record in part.pop("records", [])]
    name = str(described["device"]).replace(" ", "-")
    file = folder / f"gpu-{name}-{described['date'][:16].replace(':', '')}.json"
    with replacing(file) as temporary:
        temporary.write_text(
            json.dumps({"environment": described, "parts": parts, "records": records}, indent=1) + "\n"
        )
    return file


def main(arguments: list[str] | None = None) -> int:
    """Run the programme; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--minutes", type=float, default=7.8, help="for everything; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    names = [part.name for part in PARTS]
    wanted = options.only.split(",") if options.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--only must be among {', '.join(names)}; got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    described = environment("cuda") | {"capability": list(torch.cuda.get_device_capability())}
    described["started"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    parts = run_parts([part for part in PARTS if part.name in wanted], options.minutes)
    file = write_result(options.out, described, parts)
    failed = [name for name, part in parts.items() if "error" in part]
    print(f"written to {file}" + (f"; failed: {', '.join(failed)}" if failed else "; every part is done"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
