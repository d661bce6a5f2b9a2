"""Distances between hidden states beside plain PyTorch, eager and compiled.

python -m pytest benchmarks/bench_hidden.py [--small] [--device cuda] [--out benchmarks/results]
"""

from collections.abc import Callable

import pytest
import torch

from sgfast.benchmarking.families import COMPILED, hidden_tasks
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.measuring import Task

SHAPES = [(2048, 4096, torch.float32), (2048, 4096, torch.bfloat16)]
SMALL_SHAPES = [(32, 512, torch.float32), (32, 512, torch.bfloat16)]
IMPLEMENTATIONS = [EAGER, COMPILED, "sgfast", "sgfast compile"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda index: str(SHAPES[index][2]))
@pytest.mark.parametrize("task", range(2), ids=["forward", "gradient"])
def test_hidden(
    run_task: Callable[[Task, str], None], small: bool, device: str, implementation: str, task: int, shape: int
) -> None:
    tokens, width, dtype = (SMALL_SHAPES if small else SHAPES)[shape]
    tasks = hidden_tasks(tokens=tokens, width=width, dtype=dtype, device=device, impls=["auto", "compile"])
    run_task(tasks[task], implementation)
