"""KL between all pairs of diagonal Gaussians beside one broadcast formula, eager and compiled.

python -m pytest benchmarks/bench_gaussian.py [--small] [--device cuda] [--out benchmarks/results]
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sgfast.benchmarking import plain
from sgfast.benchmarking.families import COMPILED, contenders
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.measuring import Outputs, Task
from sgfast.ops import pairwise_gaussian_kl

SIZES, SMALL_SIZES = (8, 64, 576), (3, 8, 32)
IMPLEMENTATIONS = [EAGER, COMPILED, "sgfast", "sgfast compile"]


def gaussian_task(batch: int, tokens: int, width: int, gradient: bool, device: str) -> Task:
    """All batch² pairs of Gaussians over [tokens, width] features, means far apart."""
    generator = torch.Generator().manual_seed(0)
    means = (torch.randn(batch, tokens, width, generator=generator) for _ in range(2))
    stds = (0.1 + torch.rand(batch, tokens, width, generator=generator) for _ in range(2))
    inputs = tuple(one.to(device) for pair in zip(means, stds, strict=True) for one in pair)

    def ours_by(impl: str) -> Callable[..., Outputs]:
        return lambda *sides: (pairwise_gaussian_kl(*sides, impl=impl)[0],)

    def by_formula(*sides: Tensor) -> Outputs:
        return (plain.pairwise_gaussian_kl(*sides),)

    each = inputs[0].nbytes
    return Task(
        "gaussian",
        "pairwise KL with gradients" if gradient else "pairwise KL",
        {"batch": batch, "tokens": tokens, "width": width},
        inputs,
        contenders(ours_by, by_formula, ["auto", "compile"], device),
        4 if gradient else 0,
        (12 if gradient else 4) * each,
        4 * inputs[0].numel(),
        by_formula,
        head=lambda *sides: sides,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradients"])
def test_gaussian(
    run_task: Callable[[Task, str], None], small: bool, device: str, implementation: str, gradient: bool
) -> None:
    run_task(gaussian_task(*(SMALL_SIZES if small else SIZES), gradient, device), implementation)
