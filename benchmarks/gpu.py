"""The GPU programme: test every kernel on the GPU, time it against its floor and against torch.compile.

    python -m benchmarks.gpu

Writes ``results/<date>-<device>.json``. Without a GPU it says so and exits 0. Times are medians with cold caches; a
launch's floor is the bytes that must move (``sgfast_kernels.cases``), set against what a plain copy reaches here.
"""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import BASELINES

_ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / "results"


def run_tests() -> str:
    """Run the numerical tests of the kernels on the GPU; return pytest's last line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "triton", "tests/ops"],
        cwd=_ROOT,
        env=environment | {"SGFAST_TEST_DEVICE": "cuda"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        print(process.stdout)
    return process.stdout.strip().splitlines()[-1]


def assert_equal_results(
    function: Callable[..., Any], baseline: Callable[..., Any], arguments: Sequence[Any], jumps: float = 0.0
) -> None:
    """Check that two functions compute the same, up to the rounding of sums and of bfloat16.

    A share ``jumps`` of the elements may differ by more: an intermediate rounded or clamped the other way.
    """
    for one, other in zip(function(*arguments), baseline(*arguments), strict=True):
        if one is None and other is None:
            continue
        if jumps > 0 and one.shape == other.shape:
            close = torch.isclose(one, other, rtol=1e-2, atol=1e-4)
            assert (~close).float().mean() <= jumps
            other = torch.where(close, other, one)
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def time_cases(device: str, median_ms: Callable[[Callable[[], Any]], float]) -> list[dict[str, Any]]:
    """Check each case against its baseline and time both."""
    from sgfast_kernels.cases import CASES

    timings = []
    for case in CASES:
        arguments = case.arguments(case.rows, device)
        torch._dynamo.reset()
        baseline = torch.compile(BASELINES[case.function.__name__])
        assert_equal_results(case.function, baseline, arguments, case.jumps)
        kernel_ms = median_ms(lambda case=case, arguments=arguments: case.function(*arguments))
        compiled_ms = median_ms(lambda baseline=baseline, arguments=arguments: baseline(*arguments))
        floor_bytes = case.rows * case.width * case.floor
        timings.append(
            {
                "case": case.name,
                "rows": case.rows,
                "ms": kernel_ms,
                "torch_compile_ms": compiled_ms,
                "floor_gb_per_s": floor_bytes / kernel_ms / 1e6,
            }
        )
    return timings


def copy_gb_per_s(device: str, median_ms: Callable[[Callable[[], Any]], float]) -> float:
    """Bytes read and written per second by a copy of a gigabyte: the ceiling that counts."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: destination.copy_(source)) / 1e6


def main() -> int:
    """Run the programme; return the exit status."""
    if not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    import triton
    from triton.testing import do_bench

    def median_ms(function: Callable[[], Any]) -> float:
        return float(do_bench(function, return_mode="median"))

    name = torch.cuda.get_device_name()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True).stdout.strip()
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "device": name,
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
        "tests": run_tests(),
        "copy_gb_per_s": copy_gb_per_s("cuda", median_ms),
        "timings": time_cases("cuda", median_ms),
    }
    _RESULTS.mkdir(exist_ok=True)
    file = _RESULTS / f"{now:%Y-%m-%d}-{name.replace(' ', '-')}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {result['tests']}; a copy reaches {result['copy_gb_per_s']:.0f} GB/s")
    for timing in result["timings"]:
        print(
            f"{timing['case']:36s} {timing['ms']:7.3f} ms, {timing['floor_gb_per_s']:6.0f} GB/s of floor, "
            f"torch.compile {timing['torch_compile_ms'] / timing['ms']:5.2f} times as long"
        )
    print(f"written to {file.relative_to(_ROOT)}")
    failed = " failed" in str(result["tests"]) or " error" in str(result["tests"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
