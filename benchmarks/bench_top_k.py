"""Divergences over the union of both sides' largest k beside plain PyTorch, eager and compiled.

python -m pytest benchmarks/bench_top_k.py [--small] [--device cuda] [--out benchmarks/results]
"""

from collections.abc import Callable

import pytest
import torch

from sgfast.benchmarking.families import COMPILED, divergence_tasks
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.measuring import Task

SHAPES = [(128, 32000, 100, torch.float32), (64, 151936, 64, torch.bfloat16)]
SMALL_SHAPES = [(8, 2048, 10, torch.float32), (4, 4096, 8, torch.bfloat16)]
IMPLEMENTATIONS = [EAGER, COMPILED, "sgfast", "sgfast compile"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda index: "x".join(map(str, SHAPES[index][:3])))
@pytest.mark.parametrize("task", range(2), ids=["metrics", "gradient"])
def test_top_k(
    run_task: Callable[[Task, str], None], small: bool, device: str, implementation: str, task: int, shape: int
) -> None:
    tokens, vocab, top_k, dtype = (SMALL_SHAPES if small else SHAPES)[shape]
    tasks = divergence_tasks(
        tokens=tokens, vocab=vocab, top_k=top_k, dtype=dtype, device=device, impls=["auto", "compile"]
    )
    run_task(tasks[task], implementation)
