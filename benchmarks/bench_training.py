"""Whole training steps of a small Llama beside plain PyTorch: a transform, and a student of a teacher.

    python -m pytest benchmarks/bench_training.py [--small] [--device cuda] [--out benchmarks/results]

``python -m benchmarks.training_step`` measures every loss factory beside plain PyTorch, each in a process of its own.
"""

from collections.abc import Callable

import pytest

from sgfast.benchmarking.families import COMPILED
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.measuring import Task
from sgfast.benchmarking.training_tasks import training_tasks


@pytest.mark.parametrize("implementation", [EAGER, COMPILED, "sgfast", "sgfast compile"])
@pytest.mark.parametrize("task", range(2), ids=["transform", "student"])
def test_training(
    run_task: Callable[[Task, str], None], small: bool, device: str, implementation: str, task: int
) -> None:
    tokens, vocab = (8, 256) if small else (128, 32000)
    tasks = training_tasks(tokens=tokens, vocab=vocab, device=device, impls=["auto", "compile"])
    run_task(tasks[task], implementation)
