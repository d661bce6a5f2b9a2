"""The duties of a registered operation towards PyTorch, checked for a table of cases.

An operation's test file names its cases and applies every check to the cases:

    CASES = [registration.Case("masked", function, arguments)]

    @registration.each_check(CASES)
    def test_registration(check, case):
        check(case)

Where kernels can run (see implementations.py), the checks run under ``use_impl("triton")``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sgfast
from tests.implementations import DEVICE, RUNS_TRITON


class Case(NamedTuple):
    """A call to check. Plant NaN at masked rows: the NaN must not change any result."""

    name: str
    #: ``function(*tensors)`` → a tensor or a tuple of tensors.
    function: Callable[..., Any]
    #: ``arguments(rows, dtype)`` → tensors on the CPU whose first dimension is ``rows``; floating ones get gradients.
    arguments: Callable[[int, torch.dtype], tuple[Tensor, ...]]
    #: The PyTorch implementation has gradients of gradients.
    double_backward: bool = True


def check_schema(case: Case) -> None:
    """``torch.library.opcheck`` on every sgfast operator that the call and its backward run."""
    recorder = Recorder()
    with recorder:
        _values_and_gradients(case.function, _leaves(case))
    assert recorder.calls, "no operator of sgfast ran"
    for operator, arguments in recorder.calls:
        # Only the PyTorch implementation has gradients of gradients.
        once = RUNS_TRITON or not case.double_backward
        leaf = torch.detach if once and "backward" in operator.name() else _leaf
        tensors = (leaf(argument) if isinstance(argument, Tensor) else argument for argument in arguments)
        torch.library.opcheck(operator, tuple(tensors))


def check_gradients(case: Case) -> None:
    """First and second derivatives against finite differences, in float64."""
    leaves = tuple(_leaves(case, dtype=torch.float64, rows=3))

    def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
        # gradcheck numbers outputs of integers in one place and leaves them out in another.
        return tuple(output for output in _tuple(case.function(*tensors)) if output.is_floating_point())

    torch.autograd.gradcheck(differentiable, leaves, eps=1e-6, atol=1e-6)
    if case.double_backward:
        torch.autograd.gradgradcheck(differentiable, leaves, eps=1e-6, atol=1e-5)


def check_compiled(case: Case) -> None:
    """The same values and gradients through ``torch.compile(fullgraph=True)``, also when the rows change."""
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 7):
            leaves = _leaves(case, rows=rows)
            _assert_same(_values_and_gradients(compiled, leaves), _values_and_gradients(case.function, leaves))


def check_inductor(case: Case) -> None:
    """The same values and gradients through the default compiler."""
    torch._dynamo.reset()
    leaves = _leaves(case)
    compiled = torch.compile(case.function, fullgraph=True)
    _assert_same(_values_and_gradients(compiled, leaves), _values_and_gradients(case.function, leaves))


def check_fake_gpu(case: Case) -> None:
    """Compare shapes, dtypes and device of the GPU path, without a GPU."""
    expected = _tuple(case.function(*case.arguments(5, torch.bfloat16)))
    with FakeTensorMode():
        arguments = [
            torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda")
            for one in case.arguments(5, torch.bfloat16)
        ]
        outputs = _tuple(case.function(*arguments))
    for output, like in zip(outputs, expected, strict=True):
        assert (output.shape, output.dtype, output.device.type) == (like.shape, like.dtype, "cuda")


def check_export(case: Case) -> None:
    """``torch.export`` with a dynamic number of rows gives a program that is right for another number of rows."""

    class Program(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return _tuple(case.function(*tensors))

    arguments = [argument.to(DEVICE) for argument in case.arguments(5, torch.float32)]
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(Program(), tuple(arguments), dynamic_shapes=(tuple({0: rows} for _ in arguments),))
    arguments = [argument.to(DEVICE) for argument in case.arguments(7, torch.float32)]
    _assert_same(exported.module()(*arguments), _tuple(case.function(*arguments)))


def check_checkpointing(case: Case) -> None:
    """The same gradients under activation checkpointing."""
    leaves = _leaves(case)
    checkpointed = functools.partial(checkpoint, case.function, use_reentrant=False)
    _assert_same(_values_and_gradients(checkpointed, leaves), _values_and_gradients(case.function, leaves))


CHECKS = [
    check_schema,
    check_gradients,
    check_compiled,
    check_inductor,
    check_fake_gpu,
    check_export,
    check_checkpointing,
]
# The kernels have no float64. Fake tensors and a second compiler do not look inside kernels.
TRITON_CHECKS = [check_schema, check_compiled, check_export, check_checkpointing]


def each_check(
    cases: Sequence[Case], *, has_kernel: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrise a test over checks and cases. Without a kernel every process checks the PyTorch implementation."""

    def name(value: Any) -> str:
        return value.name if isinstance(value, Case) else value.__name__

    def under_triton(check: Callable[[Case], None]) -> Any:
        @functools.wraps(check)
        def run(case: Case) -> None:
            with sgfast.use_impl("triton"):
                check(case)

        return pytest.param(run, marks=pytest.mark.triton, id=f"{check.__name__}-triton")

    checks = [under_triton(check) for check in TRITON_CHECKS] if RUNS_TRITON and has_kernel else CHECKS

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return pytest.mark.parametrize("case", cases, ids=name)(
            pytest.mark.parametrize("check", checks, ids=name)(test)
        )

    return decorate


class Recorder(TorchDispatchMode):
    """Collects the calls of sgfast operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "sgfast":
            self.calls.append((operator, args))
        return operator(*args, **(kwargs or {}))

    def backward_arguments(self) -> dict[str, Any]:
        """Return the arguments of the only backward operator that ran, by name."""
        ((operator, arguments),) = [call for call in self.calls if "backward" in str(call[0])]
        return dict(zip((one.name for one in operator._schema.arguments), arguments, strict=True))


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _leaves(case: Case, rows: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [_leaf(argument.to(DEVICE)) for argument in case.arguments(rows, dtype)]


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _values_and_gradients(function: Callable[..., Any], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = _tuple(function(*leaves))
    # Unequal weights, so that no gradient cancels by symmetry.
    total = sum(
        (output * torch.arange(1, output.numel() + 1, device=output.device).view_as(output)).sum() for output in outputs
    )
    differentiable = [leaf for leaf in leaves if leaf.requires_grad]
    return *(output.detach() for output in outputs), *torch.autograd.grad(total, differentiable)


def _assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(one.isfinite().all() for one in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
