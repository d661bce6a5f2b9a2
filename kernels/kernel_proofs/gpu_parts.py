"""The parts of the GPU programme: ``python -m kernel_proofs.gpu_parts NAME FILE``, started by ``benchmarks.gpu``.

A part is a function of a ``Notes``. The part gives its results to the notes, which write them to disk at once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_proofs.baselines import BASELINES, assert_equal_results
from sgfast import ops
from sgfast.benchmarking import families, sweeps
from sgfast.benchmarking.growth import growth
from sgfast.benchmarking.measuring import copy_gb_per_s, measure
from sgfast.benchmarking.results import without_nan

_ROOT = Path(__file__).parents[2]
_SEED = 7
#: Rows and columns of the logits that peers are compared on.
LARGE_SHAPE = (8192, 151936)


class Notes:
    """The results of a part so far, kept in a file."""

    def __init__(self, file: Path, seconds: float) -> None:
        self._file, self._deadline = file, time.monotonic() + seconds
        self.found: dict[str, Any] = {}

    def remaining(self) -> float:
        """Seconds until the part is ended."""
        return self._deadline - time.monotonic()

    def set(self, name: str, value: Any) -> None:
        """Note a result."""
        self.found[name] = value
        self._write()

    def add(self, name: str, value: Any) -> None:
        """Append to a list of results."""
        self.found.setdefault(name, []).append(value)
        self._write()

    def _write(self) -> None:
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps(without_nan(self.found)))
        temporary.replace(self._file)


def copy(notes: Notes, device: str = "cuda") -> None:
    """Measure the bandwidth of a plain copy."""
    notes.set("gb_per_s", copy_gb_per_s(device))


def tests(notes: Notes) -> None:
    """Run the numerical tests of the kernels, in a few processes on one GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton", "-n", "8", "--color=no", "tests/ops"]
    status, printed = _run(command, notes.remaining() - 3, SGFAST_TEST_DEVICE="cuda")
    lines = printed.strip().splitlines()
    notes.set("summary", lines[-1] if lines else "")
    notes.set("failures", [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50])
    if status:
        raise RuntimeError("\n".join(lines[-12:]))


def large(notes: Notes, device: str = "cuda", elements: int = 2**31) -> None:
    """Run operations on just over ``elements`` elements. The last rows equal the results of these rows alone."""
    failures = []
    for name, function, inputs in large_cases(device, elements):
        whole = function(*inputs)
        alone = function(*(one[-3:].clone() for one in inputs))
        bad = [
            index
            for index, (one, other) in enumerate(zip(whole, alone, strict=True))
            # Gradients may differ by one rounding to bfloat16.
            if (one[-3:].float() - other.float()).norm() > 1e-2 * other.float().norm()
        ]
        notes.add("cases", {"case": name, "shape": list(inputs[0].shape), "equal": not bad})
        print(f"  {name} {tuple(inputs[0].shape)}: {'equal' if not bad else f'outputs {bad} differ'}", flush=True)
        failures += [name] * bool(bad)
    if failures:
        raise RuntimeError(f"rows past 2^31 elements are wrong: {', '.join(failures)}")


def large_cases(device: str, elements: int) -> Iterator[tuple[str, Callable[..., Sequence[Tensor]], list[Tensor]]]:
    """Yield a name, a function of row tensors, and its inputs."""
    vocab = 151936
    logits = [torch.randn(elements // vocab + 2, vocab, device=device, dtype=torch.bfloat16) for _ in range(2)]

    def with_gradient(noisy: Tensor, clean: Tensor, **settings: Any) -> Sequence[Tensor]:
        leaf = noisy.detach().requires_grad_()
        values = ops.divergences(leaf, clean, ["jensen_shannon"], **settings)["jensen_shannon"]
        # The gradients of all rows are written. The gradients of the last rows are compared.
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    yield "divergences with gradient", with_gradient, logits
    yield "divergences, top-k", lambda x, y: with_gradient(x, y, top_k=64, support="tail"), logits
    logits.clear()
    width = 4096
    hidden = [torch.randn(elements // width + 2, width, device=device, dtype=torch.bfloat16) for _ in range(2)]
    yield "hidden_distances", lambda x, y: tuple(ops.hidden_distances(x, y)), hidden
    total = len(hidden[0])

    def noised(input: Tensor, std: Tensor) -> Sequence[Tensor]:
        skipped = (total - len(input)) * width // 4
        return (ops.apply_noise(input, std, std, seed=_SEED, offset=skipped),)

    yield "apply_noise", noised, hidden


def sanitizer(notes: Notes) -> None:
    """Run compute-sanitizer over one launch of every case at few rows."""
    program = find_sanitizer()
    if program is None:
        notes.set("skipped", "compute-sanitizer is not installed")
        return
    problems = []
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
        command += [sys.executable, "-m", "kernel_proofs.gpu_parts", "launches", os.devnull]
        seconds = (notes.remaining() - 3) * (0.5 if tool == "memcheck" else 1.0)
        status, printed = _run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY.*", printed)
        launched = re.findall(r"launched (.*)", printed)
        notes.add("tools", {"tool": tool, "status": status, "summary": summary, "launched": len(launched)})
        print(f"  {tool}: {len(launched)} launches, {' '.join(summary) or f'exit status {status}'}", flush=True)
        if status:
            problems.append(f"{tool}: exit status {status}\n" + "\n".join(printed.splitlines()[-10:]))
    if problems:
        raise RuntimeError("\n".join(problems))


def find_sanitizer() -> str | None:
    """Return the program, from the path or from CUDA's folder, or None."""
    candidates = ["compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer"]
    return next(filter(None, map(shutil.which, candidates)), None)


def launches(notes: Notes, device: str = "cuda", rows: int = 3) -> None:
    """Launch every case once, for the sanitizer."""
    from kernel_proofs.cases import CASES

    for case in CASES:
        case.function(*case.arguments(rows, device))
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"launched {case.name}", flush=True)
        notes.add("launched", case.name)


def kernels(
    notes: Notes,
    device: str = "cuda",
    median_ms: Callable[[Callable[[], Any]], float] | None = None,
    rows: int | None = None,
) -> None:
    """Time every case, check every case against its baseline, and time compiled baselines while time is left."""
    from kernel_proofs.cases import CASES

    median_ms = median_ms or _do_bench
    copied = copy_gb_per_s(device)
    notes.set("copy_gb_per_s", copied)
    entries, failures = {}, []
    for case in CASES:
        arguments = case.arguments(rows or case.rows, device)
        milliseconds = median_ms(lambda case=case, arguments=arguments: case.function(*arguments))
        floor = (rows or case.rows) * case.width * case.floor / milliseconds / 1e6
        entry = {"case": case.name, "rows": rows or case.rows, "milliseconds": milliseconds, "floor_gb_per_s": floor}
        entries[case.name] = entry | {"percent_of_copy": 100 * floor / copied, "torch_compile_ms": None, "agrees": None}
        notes.set("cases", list(entries.values()))
        print(f"  {case.name:40s} {milliseconds:8.3f} ms {100 * floor / copied:5.1f} % of a copy", flush=True)
    for case in CASES:
        try:
            assert_equal_results(
                case.function, BASELINES[case.function.__name__], case.arguments(64, device), case.jumps
            )
            entries[case.name]["agrees"] = True
        except AssertionError as error:
            entries[case.name]["agrees"] = False
            failures.append(f"{case.name}: {str(error).strip().splitlines()[0] if str(error) else 'too many jumps'}")
    notes.set("cases", list(entries.values()))
    # A compilation takes seconds and the time may end, so one case of every function comes first.
    first = list({case.function.__name__: case for case in reversed(CASES)}.values())
    for case in [*first, *(case for case in CASES if case not in first)]:
        if notes.remaining() < 20:
            notes.set("torch_compile_left_out", sum(one["torch_compile_ms"] is None for one in entries.values()))
            break
        arguments = case.arguments(rows or case.rows, device)
        torch._dynamo.reset()
        baseline = torch.compile(BASELINES[case.function.__name__])
        try:
            entries[case.name]["torch_compile_ms"] = median_ms(lambda b=baseline, a=arguments: b(*a))
        except Exception as error:  # a baseline that cannot be compiled or needs too much memory is no failure here
            entries[case.name]["torch_compile_error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        notes.set("cases", list(entries.values()))
    if failures:
        raise RuntimeError("\n".join(failures))


def divergences(notes: Notes, device: str = "cuda", shape: tuple[int, int] = LARGE_SHAPE) -> None:
    """Measure the public operation on large bfloat16 logits beside its peers."""
    tokens, vocab = shape
    for top_k in (None, 64):
        tasks = families.divergence_tasks(
            tokens=tokens, vocab=vocab, top_k=top_k, dtype=torch.bfloat16, device=device, impls=["auto"]
        )
        for task in tasks:
            # sgfast comes first, so that its figures are kept if memory or time runs out.
            for implementation in reversed(list(task.implementations)):
                try:
                    record = {"sweep": None, **measure(task, implementation)}
                except torch.OutOfMemoryError:
                    notes.add("out_of_memory", f"{task.name}, top_k {top_k}, {implementation}")
                    continue
                notes.add("records", record)
                print(
                    f"  {task.name} k={top_k} {implementation:15s} {record['milliseconds']:8.2f} ms "
                    f"{record['floor_gb_per_s']:6.0f} GB/s of floor {record['peak_bytes'] / 2**30:6.2f} GiB",
                    flush=True,
                )


def growing(notes: Notes, device: str = "cuda", axes: dict[str, list[int]] | None = None) -> None:
    """Measure cost against vocabulary, tokens and top-k."""
    axes = axes or {
        "vocab": [2**i for i in range(10, 19)],
        "tokens": [1, 8, 64, 512, 2048, 8192],
        "top_k": [1, 10, 100, 1000],
    }
    base = {"tokens": sweeps.base_of(axes["tokens"], 2048), "vocab": sweeps.base_of(axes["vocab"], 32768)}
    settings = {"dtype": torch.bfloat16, "device": device, "impls": ["auto"]}
    for record in sweeps.run(families.divergence_tasks, sweeps.points(axes, base), budget=0.05, **settings):
        notes.add("records", record)
        notes.set("growth", growth(notes.found["records"]))


def _do_bench(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, return_mode="median"))


def _run(command: Sequence[str], seconds: float, **variables: str) -> tuple[int, str]:
    """Run a process. Return its exit status, 124 if its time ran out, and its output."""
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(seconds, 1),
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        return 124, printed.decode(errors="replace") if isinstance(printed, bytes) else printed
    return done.returncode, done.stdout


PARTS: dict[str, Callable[[Notes], None]] = {
    "copy": copy,
    "tests": tests,
    "large": large,
    "sanitizer": sanitizer,
    "launches": launches,
    "kernels": kernels,
    "divergences": divergences,
    "growth": growing,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]](Notes(Path(sys.argv[2]), float(os.environ.get("SGFAST_PART_SECONDS", "60"))))
