"""A distillation step from hidden states and heads, beside the dense step, other libraries and the products alone.

    python -m pytest benchmarks/bench_linear.py [--small] [--device cuda] [--out benchmarks/results] [-k NAMES]

``python -m benchmarks.linear_sides`` measures larger sizes, and errors, in one table.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgfast import DivergenceLoss, LinearLogits
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.liger import LIGER
from sgfast.benchmarking.measuring import Outputs, Task
from sgfast.benchmarking.plain import log_softmax

# Tokens, width of both sides, vocabulary, dtype.
Shape = tuple[int, int, int, torch.dtype]
SHAPES: list[Shape] = [(512, 576, 49152, torch.float32), (128, 1024, 128256, torch.bfloat16)]
SMALL_SHAPES: list[Shape] = [(16, 32, 4096, torch.float32), (8, 32, 8192, torch.bfloat16)]
KINDS = ("forward_kl", "jensen_shannon")
HEADS = ("trained", "frozen")
PRODUCTS, TRL = "the products alone", "TRL"
# TRL's and Liger-Kernel's weight of the teacher in the mixture.
_BETA = {"forward_kl": 0.0, "jensen_shannon": 0.5}
# The rows of a chunk of the bare products, about as many as sgfast takes at V = 49152.
_ROWS = 144


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All jobs, each with the implementations that are installed."""
    # Liger-Kernel's loss runs in torch.func, whose kept bytes cannot be measured: benchmarks.linear_sides has it.
    cases = [(kind, head, name) for kind in KINDS for head in HEADS for name in losses(kind) if name != LIGER]
    metafunc.parametrize(("kind", "head", "implementation"), cases)


def losses(kind: str) -> dict[str, Callable[..., Tensor]]:
    """The mean loss of a kind by each implementation, from hidden states and weights of student and teacher."""
    found: dict[str, Callable[..., Tensor]] = {
        PRODUCTS: BareProducts.apply,
        EAGER: lambda *tensors: _dense(kind, *tensors),
        "sgfast": lambda *tensors: _sgfast(kind, None, *tensors),
        "sgfast compile": lambda *tensors: _sgfast(kind, "compile", *tensors),
    }
    if kind == "jensen_shannon" and importlib.util.find_spec("liger_kernel") is not None:
        found[LIGER] = _liger
    if all(importlib.util.find_spec(name) is not None for name in ("trl", "pandas", "datasets")):  # what TRL imports
        found[TRL] = lambda *tensors: _trl(_BETA[kind], *tensors)
    return found


class BareProducts(torch.autograd.Function):
    """The products of a step and nothing else: two forward, one for the hidden states, one for a trained head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        x, y = (hidden.new_empty(min(_ROWS, len(hidden)), len(weight)) for _ in range(2))
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, min(start + _ROWS, len(hidden)))
            count = rows.stop - start
            torch.mm(hidden[rows], weight.T, out=x[:count])
            torch.mm(teacher_hidden[rows], teacher_weight.T, out=y[:count])
            torch.mm(x[:count], weight, out=to_hidden[rows])
            if to_weight is not None:
                torch.addmm(to_weight, x[:count].T, hidden[rows], out=to_weight)
        ctx.gradients = to_hidden, to_weight
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.gradients, None, None


def _dense(kind: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    a, b = log_softmax(hidden @ weight.T), log_softmax(teacher_hidden @ teacher_weight.T)
    if kind == "forward_kl":
        return (b.exp() * (b - a)).sum(-1).mean()
    m = torch.logaddexp(a, b) - torch.log(torch.tensor(2.0, device=a.device))
    return 0.5 * (b.exp() * (b - m) + a.exp() * (a - m)).sum(-1).mean()


def _sgfast(kind: str, impl: Any, hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Tensor:
    return DivergenceLoss(kind, impl=impl)(LinearLogits(hidden, weight), LinearLogits(*teacher))


def _liger(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    # No hard loss, the whole soft loss, beta, ignore_index, temperature, uncompiled as plain PyTorch is.
    options = (None, None, 0.0, 1.0, 0.5, -100, 1.0, False)
    found: Tensor = LigerFusedLinearJSDFunction.apply(hidden, weight, teacher_hidden, teacher_weight, labels, *options)
    return found


def _trl(beta: float, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    found, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, beta)
    mean: Tensor = found.mean()
    return mean


def tensors(shape: Shape, device: str, *, noise: float = 1.0, one_head: bool = False) -> tuple[Tensor, ...]:
    """Hidden states and heads whose logits have a deviation of 3; the sides differ by ``noise``."""
    tokens, width, vocabulary, dtype = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    teacher, weight = normal(tokens, width), normal(vocabulary, width) * (3 / width**0.5)
    student = teacher + noise * normal(tokens, width)
    other = weight if one_head else normal(vocabulary, width) * (3 / width**0.5)
    found = [one.to(device, dtype) for one in (student, weight, teacher)]
    return *found, found[1] if one_head else other.to(device, dtype)


def linear_task(kind: str, head: str, shape: Shape, device: str) -> Task:
    """A step of one kind with a trained or a frozen head of the student, by every implementation."""
    tokens, width, vocabulary, _ = shape
    inputs = tensors(shape, device)

    def outputs(loss: Callable[..., Tensor]) -> Callable[..., Outputs]:
        return lambda *given: (loss(*given).reshape(1),)

    implementations = {name: outputs(loss) for name, loss in losses(kind).items()}
    return Task(
        "linear",
        f"{kind}, {head} head",
        {"tokens": tokens, "width": width, "vocab": vocabulary},
        inputs,
        implementations,
        differentiated=2 if head == "trained" else 1,
        floor_bytes=0,
        elements=tokens * vocabulary,
        incomparable=frozenset(implementations),  # means over all rows: benchmarks.linear_sides measures errors
    )


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda index: "x".join(map(str, SHAPES[index][:3])))
def test_linear(
    run_task: Callable[[Task, str], None],
    small: bool,
    device: str,
    shape: int,
    kind: str,
    head: str,
    implementation: str,
) -> None:
    task = linear_task(kind, head, (SMALL_SHAPES if small else SHAPES)[shape], device)
    run_task(task, implementation)
