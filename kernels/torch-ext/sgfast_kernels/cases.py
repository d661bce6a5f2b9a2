"""Every launch that is proved: compiled for each GPU, counted in the interpreter, timed where there is a GPU.

A case calls a launching function of this package with real arguments, so that what is compiled has the signature, the
specialisations and the tile of a real launch. To add a kernel, add its cases.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .hidden import hidden_backward, hidden_forward


class Case(NamedTuple):
    """One launch, its floor and its budgets. An element is one column of one row, however many tensors hold it."""

    name: str
    function: Callable[..., Any]
    #: ``arguments(rows, device)`` → what to call the function with.
    arguments: Callable[[int, str], tuple[Any, ...]]
    width: int
    #: Bytes that must move per element: each input read once, each output written once.
    floor: float
    #: Counted bytes over the floor's: what masks, row scalars and a ragged tail may add.
    traffic: float = 1.025
    #: Rows that are compiled for and timed; enough that no cache holds the tensors, few enough for a 16 GB GPU.
    rows: int = 32768
    #: Registers a thread may use on NVIDIA (of 65536: 32 leave room for all 2048 threads, 64 for half).
    registers: int = 64
    #: Loads of 16 bytes or more in the compiled loop; 0 where rows are not aligned.
    vector_loads: int = 0


def _hidden(dtype: torch.dtype, width: int, *gradients: bool) -> Callable[[int, str], tuple[Any, ...]]:
    """Arguments of hidden_forward, or of hidden_backward if it is said which gradients are needed."""

    def arguments(rows: int, device: str) -> tuple[Any, ...]:
        noisy, clean = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
        mask = torch.ones(rows, dtype=torch.bool, device=device)
        if not gradients:
            return noisy, clean, mask, 1e-8
        upstream, row_scalars = (torch.rand(4, rows, device=device) for _ in range(2))
        return noisy, clean, mask, upstream, row_scalars, 1e-8, *gradients

    return arguments


_bf16, _fp32 = torch.bfloat16, torch.float32

CASES = [
    Case("hidden_forward bf16 64", hidden_forward, _hidden(_bf16, 64), 64, 4, traffic=1.13, vector_loads=4),
    Case("hidden_forward bf16 512", hidden_forward, _hidden(_bf16, 512), 512, 4, vector_loads=4),
    Case("hidden_forward bf16 4096", hidden_forward, _hidden(_bf16, 4096), 4096, 4, vector_loads=4),
    Case("hidden_forward bf16 4097", hidden_forward, _hidden(_bf16, 4097), 4097, 4),
    Case("hidden_forward bf16 16384", hidden_forward, _hidden(_bf16, 16384), 16384, 4, vector_loads=4),
    Case("hidden_forward fp32 4096", hidden_forward, _hidden(_fp32, 4096), 4096, 8, registers=72, vector_loads=8),
    Case(
        "hidden_backward bf16 4096 noisy", hidden_backward, _hidden(_bf16, 4096, True, False), 4096, 6, vector_loads=4
    ),
    Case("hidden_backward bf16 4096 both", hidden_backward, _hidden(_bf16, 4096, True, True), 4096, 8, vector_loads=4),
    Case("hidden_backward fp32 4096 both", hidden_backward, _hidden(_fp32, 4096, True, True), 4096, 16, vector_loads=8),
]
