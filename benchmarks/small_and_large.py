"""Ratios of time beside the lines a user of PyTorch would write, from 8 x 1000 to 512 x 32000, on one CPU thread.

    python -m benchmarks.small_and_large [--seconds 1.0] [--out benchmarks/results]

The implementations of a row take turns, so that other work on the machine slows all of them alike. The table goes to
``sizes-cpu.md`` and the figures to ``sizes.json``; README shows the table.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sgfast.benchmarking import plain
from sgfast.benchmarking.environment import environment, statement
from sgfast.benchmarking.measuring import interleaved_seconds
from sgfast.ops import divergences

SIZES = ((8, 1000), (64, 1000), (64, 4000), (64, 32000), (256, 4000), (256, 32000), (512, 32000))
METRICS = ("jeffreys", "jensen_shannon", "total_variation", "squared_hellinger")
TASKS = {
    "forward KL, value and gradient": (("forward_kl",), True),
    "Jensen-Shannon, value and gradient": (("jensen_shannon",), True),
    "four divergences, values": (METRICS, False),
}


def eager_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    return torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


def eager(student: Tensor, teacher: Tensor, kinds: tuple[str, ...]) -> Tensor:
    if kinds == ("forward_kl",):
        return eager_forward_kl(student, teacher)
    return torch.stack(list(plain.divergences(student, teacher, kinds).values()))


def ours(student: Tensor, teacher: Tensor, kinds: tuple[str, ...]) -> Tensor:
    return torch.stack(list(divergences(student, teacher, kinds).values()))


def step(function: Callable[..., Tensor], student: Tensor, teacher: Tensor, gradient: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.set_grad_enabled(gradient):
            value = function(student, teacher)
        return torch.autograd.grad(value.sum(), student)[0] if gradient else value

    return run


def measure(seconds: float) -> list[dict[str, float | str]]:
    found: list[dict[str, float | str]] = []
    for name, (kinds, gradient) in TASKS.items():
        compiled = torch.compile(eager, dynamic=False)
        for rows, vocabulary in SIZES:
            torch.manual_seed(0)
            teacher = 3 * torch.randn(rows, vocabulary)
            student = (teacher + torch.randn(rows, vocabulary)).requires_grad_(gradient)

            def run(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
                return step(lambda x, y: function(x, y, kinds), student, teacher, gradient)  # noqa: B023

            torch._dynamo.reset()
            times = interleaved_seconds(
                {"eager": run(eager), "compiled": run(compiled), "ours": run(ours)}, torch.device("cpu"), seconds
            )
            medians = {key: median(value) for key, value in times.items()}
            found.append({"task": name, "rows": rows, "vocabulary": vocabulary, **medians})
            print(found[-1], flush=True)
    return found


def table(found: list[dict[str, float | str]]) -> str:
    lines = [
        "| rows x vocabulary, float32 | " + " | ".join(TASKS) + " |",
        "|---|" + "---:|" * len(TASKS),
    ]
    for rows, vocabulary in SIZES:
        cells = []
        for name in TASKS:
            one = next(x for x in found if (x["task"], x["rows"], x["vocabulary"]) == (name, rows, vocabulary))
            cells.append(f"{one['eager'] / one['ours']:.2f} / {one['compiled'] / one['ours']:.2f}")
        lines.append(f"| {rows} x {vocabulary} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each implementation and size")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.seconds)
    described = environment("cpu")
    (options.out / "sizes.json").write_text(json.dumps({"environment": described, "records": found}, indent=1) + "\n")
    page = [
        "# Ratios by size",
        "Time of eager PyTorch over ours / time of torch.compile of the same lines over ours. Default implementation, "
        "one thread, float32.",
        table(found),
        f"`python -m benchmarks.small_and_large`. {statement(described)}",
    ]
    (options.out / "sizes-cpu.md").write_text("\n\n".join(page) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
