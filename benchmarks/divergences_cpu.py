"""The speed goals of the divergences on a CPU, measured in one run and written as a table.

    python -m benchmarks.divergences_cpu [--output benchmarks/results/divergences-cpu.md] [--threads 1 2]

The table shows the milliseconds of the fastest of ten rounds, after a round that compiles. A round runs one
implementation after the other, because the machine's speed changes with time. Use a machine that runs nothing else:
with two threads every operation waits for the slower thread.
"""

import argparse
import functools
from pathlib import Path

import torch

from benchmarks.bench_divergences import IMPLEMENTATIONS, SHAPES, job_task
from sgfast.benchmarking.environment import environment, statement
from sgfast.benchmarking.measuring import run_timed
from sgfast.utils.files import check_output_file, replacing

JOBS = ("four metrics", "jensen_shannon with gradient")


def measure(threads: list[int], rounds: int) -> list[str]:
    """Lines of a Markdown table: a row for each shape, job and number of threads."""
    lines = [f"| logits | job | threads | {' | '.join(IMPLEMENTATIONS)} |", "|---" * (3 + len(IMPLEMENTATIONS)) + "|"]
    for shape in SHAPES:
        rows, width, dtype = shape
        for job in JOBS:
            task = job_task(job, shape, "cpu")
            for count in threads:
                torch.set_num_threads(count)
                torch._dynamo.reset()
                runs = {name: functools.partial(task.run, name) for name in IMPLEMENTATIONS}
                times = [
                    {name: run_timed(run, task.device)[0] for name, run in runs.items()} for _ in range(rounds + 1)
                ]
                fastest = [1e3 * min(one[name] for one in times[1:]) for name in IMPLEMENTATIONS]
                logits = f"[{rows}, {width}] {str(dtype).removeprefix('torch.')}"
                lines.append(f"| {logits} | {job} | {count} | {' | '.join(f'{one:.1f}' for one in fastest)} |")
    return lines


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.output:
        check_output_file(arguments.output)
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
        with replacing(arguments.output) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
