"""Noise and nearest embeddings beside what PyTorch offers, on a CPU: time and peak memory, in one run.

    python -m benchmarks.bench_noise_nearest [--threads 1] [--dtype float32] [--repeats 5]

``noise`` is ``apply_noise`` on [8, 1024, 4096] beside ``input + torch.randn(...) * std + mean``, mean and std of one
row; backward gives all three gradients. ``nearest`` looks up 512 queries in 49152 table rows of 576, l2 and cosine,
beside ``torch.cdist`` (of unit vectors) and ``topk`` in chunks of the queries whose matrix takes 64 MiB. Times are
medians; ``peak`` is the most that PyTorch had allocated at once beyond the inputs, results included.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import apply_noise, nearest_embeddings

SHAPE = (8, 1024, 4096)
QUERIES, ROWS, WIDTH = 512, 49152, 576


class Row(NamedTuple):
    """One way to compute something."""

    seconds: float
    peak: int


def peak_bytes(function: Callable[[], Any]) -> int:
    """What PyTorch's allocator held at most beyond what it held before, from the profiler's record of every block."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()  # noqa: F841  # it counts while the record is made
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]  # type: ignore[union-attr]
    live = itertools.accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns()))
    return max(live)


def measure(function: Callable[[], Any], repeats: int) -> Row:
    """Run a function once for its memory and some times for its time."""
    peak = peak_bytes(function)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return Row(median(times), peak)


def noise_cases(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Forward, forward with backward to all operands, and to all but std: ours and eager PyTorch."""
    input, upstream = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
    mean, std = torch.randn(SHAPE[-1], dtype=dtype), torch.rand(SHAPE[-1], dtype=dtype)
    leaves = [one.clone().requires_grad_() for one in (input, mean, std)]

    def ours(input: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return apply_noise(input, mean, std, seed=7)

    def eager(input: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return input + torch.randn(SHAPE, dtype=dtype) * std + mean

    def backward(function: Callable[..., Tensor], *operands: Tensor) -> Callable[[], Any]:
        wanted = [one for one in operands if one.requires_grad]
        return lambda: torch.autograd.grad(function(*operands), wanted, upstream)

    return {
        "noise forward": (lambda: ours(input, mean, std), lambda: eager(input, mean, std)),
        "noise forward + backward": (backward(ours, *leaves), backward(eager, *leaves)),
        "noise forward + backward, std fixed": (backward(ours, *leaves[:2], std), backward(eager, *leaves[:2], std)),
    }


def nearest_cases(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """One and eight neighbours, l2 and cosine: ours and torch.cdist."""
    table = torch.randn(ROWS, WIDTH, dtype=dtype)
    queries = table[torch.randint(ROWS, (QUERIES,))] + 0.5 * torch.randn(QUERIES, WIDTH, dtype=dtype)

    def by_cdist(k: int, metric: str) -> tuple[Tensor, Tensor]:
        sides = [one.float() for one in (queries, table)]
        if metric == "cosine":
            sides = [torch.nn.functional.normalize(one, dim=1) for one in sides]
        parts = [torch.cdist(part, sides[1]).topk(k, largest=False) for part in sides[0].split(2**26 // (4 * ROWS))]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    cases = {}
    for metric in ("l2", "cosine"):
        for k in (1, 8):
            cases[f"nearest {metric} k={k}"] = (
                lambda k=k, metric=metric: nearest_embeddings(queries, table, k, metric=metric),
                lambda k=k, metric=metric: by_cdist(k, metric),
            )
    return cases


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose names begin with this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"CPU, {options.threads} threads, torch {torch.__version__}, {options.dtype}\n")
    print("| case | sgfast ms | PyTorch ms | ratio | sgfast peak MiB | PyTorch peak MiB |\n|---|---|---|---|---|---|")
    dtype = getattr(torch, options.dtype)
    for cases in (noise_cases, nearest_cases):
        if not cases.__name__.startswith(options.only[:5]):
            continue
        for name, (ours, theirs) in cases(dtype).items():
            if not name.startswith(options.only):
                continue
            own, other = measure(ours, options.repeats), measure(theirs, options.repeats)
            cells = [
                name,
                f"{1e3 * own.seconds:.0f}",
                f"{1e3 * other.seconds:.0f}",
                f"{own.seconds / other.seconds:.2f}",
            ]
            cells += [f"{one.peak / 2**20:.0f}" for one in (own, other)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
