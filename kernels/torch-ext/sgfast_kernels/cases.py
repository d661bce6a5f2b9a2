"""Every launch that is proved: compiled for each GPU, counted in the interpreter, timed where there is a GPU.

A case calls a launching function of this package with real arguments, so that what is compiled has the signature, the
specialisations and the tile of a real launch. To add a kernel, add its cases.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._divergence_launch import KINDS
from .divergence import divergence_forward
from .divergence_backward import divergence_backward
from .hidden import hidden_backward, hidden_forward
from .lse import lse_pair


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
    #: Instructions per element in each launch's loop on sm90, as many launches as are held to it. An H200 reads 4 bytes
    #: an element while it issues 26 instructions: more, and memory waits.
    instructions: tuple[float, ...] = ()


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


def _logits(dtype: torch.dtype, width: int, rows: int, device: str) -> tuple[Tensor, ...]:
    """Both sides, mask and temperature."""
    noisy, clean = (3 * torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2))
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    return noisy, clean, mask, torch.full((), 1.5, device=device).expand(rows)


def _lse(dtype: torch.dtype, width: int) -> Callable[[int, str], tuple[Any, ...]]:
    """Arguments of lse_pair."""
    return lambda rows, device: _logits(dtype, width, rows, device)


def _divergence(
    dtype: torch.dtype, width: int, kinds: Sequence[str], *gradients: bool
) -> Callable[[int, str], tuple[Any, ...]]:
    """Arguments of divergence_forward, or of divergence_backward if it is said which gradients are needed."""

    def arguments(rows: int, device: str) -> tuple[Any, ...]:
        logits = _logits(dtype, width, rows, device)
        # The middle column: any will do.
        labels = [torch.full((rows,), width // 2, device=device)] if "label_cross_entropy" in kinds else []
        if not gradients:
            return *logits, kinds, 0.5, 0.1, *labels
        # Maxima and sums must be the logits'; what the partials add up to may be anything.
        row_scalars = torch.rand(4 + 2 * len(kinds), rows, device=device)
        for i, side in enumerate(logits[:2]):
            row_scalars[2 * i] = side.amax(-1)
            weights = (side.float() - row_scalars[2 * i][:, None]).div_(1.5).exp_()
            row_scalars[2 * i + 1] = weights.sum(-1)
        return *logits, torch.rand(len(kinds), rows, device=device), row_scalars, kinds, 0.5, 0.1, *gradients, *labels

    return arguments


_bf16, _fp32 = torch.bfloat16, torch.float32
_KINDS = {
    "kl": ("forward_kl",),
    "js": ("jensen_shannon",),
    "rest": ("jeffreys", "total_variation", "squared_hellinger"),
    "metrics": ("jeffreys", "jensen_shannon", "total_variation", "squared_hellinger"),
    "labels": ("forward_kl", "label_cross_entropy"),
    "all": KINDS[:-1],
}


def _forward(dtype: torch.dtype, width: int, kinds: str, **limits: Any) -> Case:
    """A case whose floor is one read of both sides: two passes move twice that."""
    name = f"divergence_forward {'bf16' if dtype == _bf16 else 'fp32'} {width} {kinds}"
    arguments = _divergence(dtype, width, _KINDS[kinds])
    return Case(name, divergence_forward, arguments, width, 2 * dtype.itemsize, traffic=2.05, rows=2048, **limits)


def _backward(dtype: torch.dtype, width: int, kinds: str, *needs: bool, **limits: Any) -> Case:
    """A case that reads both sides and writes the gradients needed."""
    sides = "both" if all(needs) else "noisy"
    name = f"divergence_backward {'bf16' if dtype == _bf16 else 'fp32'} {width} {kinds} {sides}"
    arguments = _divergence(dtype, width, _KINDS[kinds], *needs)
    floor = (2 + sum(needs)) * dtype.itemsize
    return Case(name, divergence_backward, arguments, width, floor, rows=2048, **{"vector_loads": 4} | limits)


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
    Case(
        "lse_pair bf16 32000",
        lse_pair,
        _lse(_bf16, 32000),
        32000,
        4,
        rows=8192,
        vector_loads=4,
        instructions=(15.5,),
    ),
    _forward(_bf16, 151936, "kl", instructions=(15.5, 12)),
    _forward(_bf16, 32000, "js", instructions=(15.5, 20)),
    _forward(_bf16, 32000, "rest", registers=80, instructions=(15.5, 23.5)),
    _forward(_bf16, 151936, "metrics", registers=96, instructions=(15.5, 30.5)),
    _forward(_bf16, 32000, "labels", instructions=(19.5, 12)),
    _forward(_bf16, 32001, "kl", instructions=(18.5, 15)),
    _forward(_fp32, 32000, "js", registers=80),
    _backward(_bf16, 151936, "kl", True, False),
    _backward(_bf16, 32000, "js", True, False, registers=96),
    _backward(_bf16, 32000, "labels", True, False, registers=80),
    # 16 bytes a load would take more registers than there are; on AMD the loads have 8.
    _backward(_bf16, 32000, "all", True, True, registers=192, vector_loads=0),
    _backward(_fp32, 32000, "js", True, False),
]
