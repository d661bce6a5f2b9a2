"""The presets beside TextBrewer's own losses: forward and backward to both sides.

    python -m pytest benchmarks/bench_presets.py [--small] [--device cuda] [--out benchmarks/results]

TextBrewer computes in the inputs' dtype, sgfast in float32. The fused operation behind ``hidden_mse`` and ``cos``
computes four distances at once, which costs time on a CPU. ``fsp`` and ``nst`` do not keep their Gram matrices and
compute them again in backward.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import textbrewer_loss
from sgfast.benchmarking.measuring import Outputs, Task
from sgfast.loss.presets import KD_LOSS_MAP, MATCH_LOSS_MAP

COMPILED = "TextBrewer, torch.compile"
# Batch, heads, length, width, classes.
SIZES, SMALL_SIZES = (2, 8, 512, 768, 32000), (2, 2, 16, 32, 200)
MATCHING = [name for name in MATCH_LOSS_MAP if name not in ("gram", "mmd")]
CASES = [
    *((f"kd {name}", False) for name in ("ce", "mse")),
    *((name, masked) for name in MATCHING for masked in (False, True) if not (masked and name == "pkd")),
]


def preset_task(name: str, masked: bool, sizes: tuple[int, ...], device: str) -> Task:
    """One loss by sgfast and by TextBrewer. ``masked`` leaves out a quarter of the first text."""
    batch, heads, length, width, classes = sizes
    pair = name in ("fsp", "nst")
    shape = (batch, heads, length, length) if name.startswith("attention") else (batch, length, width)
    if name.startswith("kd "):
        shape, own = (batch, length // 2, classes), KD_LOSS_MAP[name.removeprefix("kd ")]
    else:
        own = MATCH_LOSS_MAP[name]
    losses = {"TextBrewer": textbrewer_loss(name), "sgfast": own}
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, generator=generator).to(device) for _ in range(4 if pair else 2))
    mask = torch.ones(batch, length, device=device)
    mask[0, length * 3 // 4 :] = 0
    further: tuple[Tensor | None, ...] = () if name.startswith("kd ") else (mask if masked else None,)

    def by(loss: Any) -> Callable[..., Outputs]:
        def run(*tensors: Tensor) -> Outputs:
            sides = (list(tensors[:2]), list(tensors[2:])) if pair else tensors
            return (loss(*sides, *further).reshape(1),)

        return run

    implementations = {one: by(loss) for one, loss in losses.items()}
    bytes_in = sum(one.nbytes for one in inputs)
    return Task(
        "presets",
        name + (", mask" if masked else ""),
        {"batch": batch, "shape": "x".join(map(str, shape[1:]))},
        inputs,
        implementations | {COMPILED: torch.compile(implementations["TextBrewer"])},
        len(inputs),
        3 * bytes_in,
        sum(one.numel() for one in inputs),
        implementations["TextBrewer"],
        head=_all,
    )


def _all(*inputs: Tensor) -> tuple[Tensor, ...]:
    return inputs


@pytest.mark.parametrize("implementation", ["TextBrewer", COMPILED, "sgfast"])
@pytest.mark.parametrize(("name", "masked"), CASES)
def test_presets(
    run_task: Callable[[Task, str], None], small: bool, device: str, implementation: str, name: str, masked: bool
) -> None:
    run_task(preset_task(name, masked, SMALL_SIZES if small else SIZES, device), implementation)
