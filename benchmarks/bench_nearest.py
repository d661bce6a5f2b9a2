"""Nearest embeddings beside ``torch.cdist`` and ``topk``: all queries at once, compiled, and in chunks of 64 MiB.

python -m pytest benchmarks/bench_nearest.py [--small] [--device cuda] [--out benchmarks/results]
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sgfast.benchmarking import plain
from sgfast.benchmarking.families import COMPILED, ours
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.measuring import Outputs, Task
from sgfast.ops import dispatch, nearest_embeddings

SIZES, SMALL_SIZES = (512, 49152, 576), (16, 500, 32)
CHUNKED, CHUNK_BYTES = "eager PyTorch, in chunks", 2**26


def nearest_task(queries: int, rows: int, width: int, metric: str, k: int, device: str) -> Task:
    """Look up noisy rows of a table in the table."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, width, generator=generator)
    noisy = table[torch.randint(rows, (queries,), generator=generator)]
    noisy = noisy + 0.5 * torch.randn(queries, width, generator=generator)

    def by_us(x: Tensor, y: Tensor) -> Outputs:
        return (nearest_embeddings(x, y, k, metric=metric)[0],)

    def by_formula(x: Tensor, y: Tensor) -> Outputs:
        return (plain.nearest_embeddings(x, y, k, metric)[0],)

    def by_chunks(x: Tensor, y: Tensor) -> Outputs:
        parts = [plain.nearest_embeddings(part, y, k, metric)[0] for part in x.split(CHUNK_BYTES // (4 * rows))]
        return (torch.cat(parts),)

    return Task(
        "nearest",
        f"{metric}, k={k}",
        {"queries": queries, "rows": rows, "width": width},
        (noisy.to(device), table.to(device)),
        {EAGER: by_formula, COMPILED: dispatch.compiled(by_formula), CHUNKED: by_chunks, ours("auto"): by_us},
        0,
        noisy.nbytes + table.nbytes,
        queries * rows,
        by_formula,
        head=lambda x, y: (x[:8], y),
    )


@pytest.mark.parametrize("implementation", [EAGER, COMPILED, CHUNKED, "sgfast"])
@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_nearest(
    run_task: Callable[[Task, str], None], small: bool, device: str, implementation: str, metric: str, k: int
) -> None:
    run_task(nearest_task(*(SMALL_SIZES if small else SIZES), metric, k, device), implementation)
