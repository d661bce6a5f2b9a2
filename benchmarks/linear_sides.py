"""The goals of linear sides on a CPU: time beside the products alone, memory, gradient errors, in one table.

    python -m benchmarks.linear_sides [--out benchmarks/results/linear-cpu.md] [--rounds 3]

The table shows CPU seconds. Implementations take turns, because the machine's speed changes with time.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_linear import PRODUCTS, Shape, linear_task, losses, tensors
from sgfast.benchmarking.environment import environment, statement
from sgfast.benchmarking.measuring import peak_bytes
from sgfast.utils.files import check_output_file, replacing

STEPS: list[tuple[str, str, Shape]] = [
    ("forward_kl", "frozen", (2048, 576, 49152, torch.float32)),
    ("forward_kl", "frozen", (512, 576, 49152, torch.float32)),
    ("forward_kl", "trained", (512, 576, 49152, torch.float32)),
    ("jensen_shannon", "trained", (512, 576, 49152, torch.float32)),
]
ERRORS: list[tuple[str, float, bool, torch.dtype]] = [
    ("jensen_shannon", 1.0, False, torch.float32),
    ("jensen_shannon", 0.05, True, torch.float32),
    ("jensen_shannon", 0.05, True, torch.bfloat16),
    ("forward_kl", 0.0005, True, torch.bfloat16),
]
ERROR_SHAPE = (64, 576, 16384)


def steps(rounds: int) -> list[str]:
    """Lines of a table: CPU seconds of the fastest round, over the products alone, and peak memory beyond gradients."""
    lines = [
        "| step | sizes | implementation | CPU seconds | times the products | MiB beyond inputs and gradients |",
        "|---" * 6 + "|",
    ]
    for kind, head, shape in STEPS:
        task = linear_task(kind, head, shape, "cpu")
        times: dict[str, list[float]] = {name: [] for name in task.implementations}
        peaks = {}
        runs = {name: functools.partial(task.run, name) for name in times}
        for name, run in runs.items():
            torch._dynamo.reset()
            peaks[name] = peak_bytes(run, task.device)[0]
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(_cpu_seconds(run))
        gradients = sum(one.nbytes for one in task.inputs[: task.differentiated])
        sizes = f"{shape[:3]} {str(shape[3]).removeprefix('torch.')}"
        for name, found in times.items():
            ratio = min(found) / min(times[PRODUCTS])
            memory = (peaks[name] - gradients) / 2**20
            lines.append(f"| {kind}, {head} head | {sizes} | {name} | {min(found):.2f} | {ratio:.2f} | {memory:.0f} |")
            print(lines[-1], flush=True)
    return lines


def _cpu_seconds(run: Callable[[], object]) -> float:
    """The process's CPU seconds: other work on the machine adds little to them."""
    started = time.process_time()
    result = run()  # noqa: F841  # freeing the result is not the computation
    return time.process_time() - started


def errors() -> list[str]:
    """Lines of a table: the relative errors, in the norm, of loss and gradients against float64 on the same inputs."""
    lines = ["| loss | noise | heads | dtype | implementation | loss | hidden states | head |", "|---" * 8 + "|"]
    for kind, noise, one_head, dtype in ERRORS:
        inputs = tensors((*ERROR_SHAPE, dtype), "cpu", noise=noise, one_head=one_head)
        exact = _gradients(losses(kind)["sgfast"], [one.double() for one in inputs], one_head)
        for name, loss in losses(kind).items():
            if name in (PRODUCTS, "sgfast compile"):
                continue
            found = _gradients(loss, list(inputs), one_head)
            shown = (
                f"{float((one.double() - right).norm() / right.norm()):.1e}"
                for one, right in zip(found, exact, strict=True)
            )
            head = "one" if one_head else "two"
            lines.append(
                f"| {kind} | {noise} | {head} | {str(dtype).removeprefix('torch.')} | {name} | {' | '.join(shown)} |"
            )
            print(lines[-1], flush=True)
    return lines


def _gradients(loss, inputs: list[Tensor], one_head: bool) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """The loss, and the gradients of the student's hidden states and head; a teacher's equal head is fixed."""
    hidden, weight, teacher, other = inputs
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    value = loss(*leaves, teacher, leaves[1].detach() if one_head else other)
    return value.detach(), *torch.autograd.grad(value, leaves)


def main() -> None:
    """Measure, print, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.out:
        check_output_file(arguments.out)
    text = "\n".join(
        [
            "# A distillation step from hidden states and heads",
            "",
            f"`python -m benchmarks.linear_sides`: forward and backward, the fastest of {arguments.rounds} rounds on "
            f"{torch.get_num_threads()} thread(s). Sizes are tokens, width, vocabulary. The bound of sgfast is the "
            "default, 64 MiB. " + statement(environment("cpu")),
            "",
            *steps(arguments.rounds),
            "",
            "Relative errors against float64, 64 tokens, width 576, vocabulary 16384. The hidden states of the sides "
            "differ by the noise; with one head the teacher's is the student's, detached.",
            "",
            *errors(),
            "",
        ]
    )
    if arguments.out:
        with replacing(arguments.out) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
