"""Noise on embeddings beside plain PyTorch, eager and compiled.

python -m pytest benchmarks/bench_noise.py [--small] [--device cuda] [--out benchmarks/results]
"""

from collections.abc import Callable

import pytest
import torch

from sgfast.benchmarking.families import COMPILED, noise_tasks
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.measuring import Task

SHAPES = [(2048, 4096, torch.float32), (2048, 4096, torch.bfloat16)]
SMALL_SHAPES = [(32, 512, torch.float32), (32, 512, torch.bfloat16)]
IMPLEMENTATIONS = [EAGER, COMPILED, "sgfast", "sgfast compile"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda index: str(SHAPES[index][2]))
@pytest.mark.parametrize("task", range(2), ids=["forward", "gradients"])
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_noise(
    run_task: Callable[[Task, str], None],
    small: bool,
    device: str,
    shared: bool,
    task: int,
    shape: int,
    implementation: str,
) -> None:
    tokens, width, dtype = (SMALL_SHAPES if small else SHAPES)[shape]
    tasks = noise_tasks(
        tokens=tokens, width=width, shared=shared, dtype=dtype, device=device, impls=["auto", "compile"]
    )
    run_task(tasks[task], implementation)
