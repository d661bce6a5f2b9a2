"""Sweeps over one size with the other sizes held: the records of tables and plots."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from sgfast.benchmarking.measuring import Task, interleaved_seconds, measure

#: Distances between the two sides, in units of the logits, for accuracy against noise.
NOISES = (0.001, 0.01, 0.05, 0.3, 1.0)
_ACCURACY_TOKENS = 16


def base_of(sizes: Sequence[int], wanted: int) -> int:
    """Return a size for sweeps over another size: the wanted size if it was asked for, else the largest."""
    return wanted if wanted in sizes else max(sizes)


def points(axes: Mapping[str, Sequence[int]], base: Mapping[str, int]) -> list[tuple[str, dict[str, int]]]:
    """List the axis that varies and all sizes, for every point. ``top_k`` is given only if it varies.

    Example:
        >>> points({"tokens": [1, 8], "top_k": [3]}, {"tokens": 8, "vocab": 100})
        [('tokens', {'tokens': 1, 'vocab': 100}), ('tokens', {'tokens': 8, 'vocab': 100}), \
('top_k', {'tokens': 8, 'vocab': 100, 'top_k': 3})]
    """
    planned: list[tuple[str, dict[str, int]]] = []
    for axis, sizes in axes.items():
        for size in sorted(set(sizes)):
            point = {**base, axis: size}
            # A sweep keeps points that another sweep measures too, for its own line. A single size is no sweep.
            if len(sizes) > 1 or point not in [one for _, one in planned]:
                planned.append((axis, point))
    return planned


def run(
    make_tasks: Callable[..., list[Task]],
    planned: Sequence[tuple[str, dict[str, int]]],
    *,
    budget: float,
    on_progress: Callable[[int, str], None] = lambda done, doing: None,
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """Measure every task at every planned point. A record has its ``sweep``, the axis that varies.

    Raises:
        ValueError: a point needs more memory than there is.
    """
    for done, (axis, sizes) in enumerate(planned):
        where = ", ".join(f"{name} {size}" for name, size in sizes.items())
        on_progress(done, where)
        try:
            for task in make_tasks(**sizes, **settings):
                runs = {name: functools.partial(task.run, name) for name in task.implementations}
                for name, times in interleaved_seconds(runs, task.device, budget).items():
                    fastest = {"fastest_milliseconds": 1e3 * min(times)}
                    yield {"sweep": axis, **measure(task, name, median(times)), **fastest}
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower():
                raise
            raise ValueError(f"not enough memory for {where}") from error
    on_progress(len(planned), "")


def run_accuracy(make_tasks: Callable[..., list[Task]], vocab: int, **settings: Any) -> Iterator[dict[str, Any]]:
    """Measure only errors while the two sides come closer, for float32 logits and for rounded bfloat16 logits."""
    for dtype in (torch.float32, torch.bfloat16):
        for noise in NOISES:
            for task in make_tasks(tokens=_ACCURACY_TOKENS, vocab=vocab, noise=noise, **settings | {"dtype": dtype}):
                for implementation in task.implementations:
                    yield {"sweep": "noise", **measure(task, implementation, timed=False)}
