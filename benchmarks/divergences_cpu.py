"""The CPU's speed goals for the divergences, measured in one run and written as a table.

    python -m benchmarks.divergences_cpu [--output benchmarks/results/divergences-cpu.md] [--threads 1 2]

Milliseconds, the fastest of ten rounds after a warm-up that compiles. Run it on a machine with nothing else to do:
with two threads every operation waits for the slower one.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.bench_divergences import FOUR, SHAPES, Values
from sgfast.benchmarking.environment import environment, statement
from sgfast.ops import divergences

Function = Callable[[Tensor, Tensor, tuple[str, ...]], Values]
IMPLEMENTATIONS: dict[str, Function] = {
    "default": divergences,
    "compile": lambda noisy, clean, kinds: divergences(noisy, clean, kinds, impl="compile"),
    "eager": peers.divergences,
    "compiled eager": torch.compile(peers.divergences, dynamic=False),
}


def _four_metrics(function: Function, noisy: Tensor, clean: Tensor) -> None:
    with torch.no_grad():
        function(noisy, clean, FOUR)


def _jensen_shannon_with_gradient(function: Function, noisy: Tensor, clean: Tensor) -> None:
    leaf = noisy.detach().requires_grad_()
    torch.autograd.grad(function(leaf, clean, ("jensen_shannon",))["jensen_shannon"].sum(), leaf)


JOBS = {"four metrics": _four_metrics, "jensen_shannon with gradient": _jensen_shannon_with_gradient}


def _milliseconds(
    job: Callable[[Function, Tensor, Tensor], None], noisy: Tensor, clean: Tensor, rounds: int
) -> dict[str, float]:
    """The fastest of all rounds; within a round one implementation after the other, as the machine's speed changes."""
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(rounds + 1):  # the first compiles
        for name, function in IMPLEMENTATIONS.items():
            start = time.perf_counter()
            job(function, noisy, clean)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(found[1:]) for name, found in times.items()}


def measure(threads: list[int], rounds: int) -> list[str]:
    """Lines of a Markdown table: a row for each shape, job and number of threads."""
    lines = [f"| logits | job | threads | {' | '.join(IMPLEMENTATIONS)} |", "|---" * (3 + len(IMPLEMENTATIONS)) + "|"]
    for rows, width, dtype in SHAPES:
        generator = torch.Generator().manual_seed(0)
        clean = torch.randn(rows, width, generator=generator) * 3
        noisy = (clean + torch.randn(rows, width, generator=generator)).to(dtype)
        clean = clean.to(dtype)
        for name, job in JOBS.items():
            for count in threads:
                torch.set_num_threads(count)
                cells = [f"{found:.1f}" for found in _milliseconds(job, noisy, clean, rounds).values()]
                shape = f"[{rows}, {width}] {str(dtype).removeprefix('torch.')}"
                lines.append(f"| {shape} | {name} | {count} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    text = "\n".join(
        [
            "# The divergences on a CPU beside PyTorch, eager and compiled",
            "",
            f"`python -m benchmarks.divergences_cpu`: milliseconds, the fastest of {arguments.rounds} rounds. "
            + statement(environment("cpu")),
            "",
            *measure(arguments.threads, arguments.rounds),
            "",
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
