"""The choice of an operation's implementation, and the reason of the choice.

Every operation takes ``impl``. Precedence: the argument, then ``with use_impl(...)``, then the environment
variable ``SGFAST_IMPL``, then ``"auto"``:

============ ===========================================================================================
``auto``     Triton for GPU tensors the kernel supports, PyTorch otherwise; never raises
``torch``    the PyTorch implementation
``compile``  the PyTorch implementation through torch.compile: needs a C++ compiler on a CPU, costs
             seconds on the first call; never chosen unasked. On a CPU the top k are selected uncompiled
``triton``   the Triton kernel; CPU tensors only under ``TRITON_INTERPRET=1``
============ ===========================================================================================

The package ``sgfast_kernels`` needs triton, so it is imported inside the functions that run a kernel.

An explicit choice that cannot run raises ``RuntimeError`` with the reason. The choice is made when the operation runs.
A graph that was compiled before therefore obeys a later ``use_impl``.
"""

import functools
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from sgfast.ops import validation

Implementation = Literal["auto", "torch", "compile", "triton"]
IMPLEMENTATIONS = ("auto", "torch", "compile", "triton")

_context: ContextVar[str | None] = ContextVar("sgfast_impl", default=None)

# Maps a public operation to a function of its arguments. The function returns the reason why the Triton kernel cannot
# run, or None.
_triton_refusals: dict[Callable[..., Any], Callable[..., str | None]] = {}

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ImplementationError(RuntimeError):
    """An implementation that was asked for by name cannot run."""


class Choice(NamedTuple):
    """The implementation that runs, and the reason."""

    implementation: str
    reason: str


def check_impl(impl: str | None, source: str = "impl") -> None:
    """Raise ``ValueError`` unless ``impl`` is None or a known implementation."""
    if impl is not None:
        validation.check_choice(source, impl, IMPLEMENTATIONS)


@contextmanager
def use_impl(impl: Implementation) -> Iterator[None]:
    """Choose the implementation of every operation called inside the block (an ``impl=`` argument still wins).

    Example:
        >>> import sgfast, torch
        >>> with sgfast.use_impl("torch"):
        ...     sgfast.explain(sgfast.ops.hidden_distances, torch.ones(2, 3), torch.ones(2, 3))
        Choice(implementation='torch', reason="use_impl('torch')")
    """
    check_impl(impl)
    token = _context.set(impl)
    try:
        yield
    finally:
        _context.reset(token)


def explain(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Return which implementation ``operation(*args, **kwargs)`` would run, and why, without running it.

    Raises:
        TypeError: ``operation`` is not an operation of ``sgfast.ops``, or the arguments do not fit it.
        ValueError: an argument is a DTensor.
        RuntimeError: an explicit choice cannot run; the message has the reason.
    """
    if operation not in _triton_refusals:
        known = ", ".join(sorted(function.__name__ for function in _triton_refusals))
        raise TypeError(f"explain needs an operation of sgfast.ops ({known}); got {operation!r}")
    bound = inspect.signature(operation).bind(*args, **kwargs)
    bound.apply_defaults()
    impl = bound.arguments.pop("impl")
    check_impl(impl)
    validation.check_tensors(**bound.arguments)
    return select(impl, _triton_refusals[operation](**bound.arguments))


def describe_triton(refusal: Callable[..., str | None]) -> Callable[[_Function], _Function]:
    """Register, for ``explain``, the function that says why Triton cannot run an operation's arguments."""

    def register(operation: _Function) -> _Function:
        _triton_refusals[operation] = refusal
        return operation

    return register


def select(impl: str | None, triton_refusal: str | None) -> Choice:
    """Resolve precedence and check that the result can run; ``triton_refusal`` says why Triton cannot."""
    wanted, source = _wanted(impl)
    if wanted == "torch":
        return Choice("torch", source)
    if wanted == "compile":
        return Choice("compile", source)
    if wanted == "triton":
        if triton_refusal is not None:
            raise ImplementationError(f"{source} cannot run: {triton_refusal}")
        return Choice("triton", source)
    if triton_refusal is not None:
        return Choice("torch", triton_refusal)
    if interpreting():
        return Choice("torch", "auto does not choose the Triton interpreter")
    return Choice("triton", "GPU tensors that the kernel supports")


def _wanted(impl: str | None) -> tuple[str, str]:
    if impl is not None:
        return impl, f"impl={impl!r}"
    if (from_context := _context.get()) is not None:
        return from_context, f"use_impl({from_context!r})"
    if from_environment := os.environ.get("SGFAST_IMPL"):
        check_impl(from_environment, "the environment variable SGFAST_IMPL")
        return from_environment, f"SGFAST_IMPL={from_environment}"
    return "auto", "auto"


def pinned(impl: str | None) -> str | None:
    """Return the choice that forward fixes for its backward.

    Autograd may run backward in another thread, which the context of `use_impl` does not reach.
    """
    return impl if torch.compiler.is_compiling() else _wanted(impl)[0]


def interpreting() -> bool:
    """Return True where Triton's interpreter runs the kernels on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def triton_device_refusal(*tensors: Tensor | None) -> str | None:
    """Say why no Triton kernel can run on the devices of these tensors, or return None."""
    if not _triton_is_installed():
        return "triton is not installed"
    if interpreting():
        return None
    for tensor in tensors:
        # ROCm devices are called "cuda" in PyTorch.
        if tensor is not None and tensor.device.type not in ("cuda", "xpu"):
            return f"{tensor.device.type} tensors (Triton needs a GPU, or TRITON_INTERPRET=1 before the first import)"
    return None


def triton_rows_refusal(**tensors: Tensor) -> str | None:
    """Say why no Triton kernel can read the rows of these (..., D) tensors, or return None.

    The arguments' names are those that the user knows.

    Call this function only after ``triton_device_refusal`` has returned None.
    """
    import sgfast_kernels

    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            return f"{name} is float64 (the kernels compute in float32)"
        if sgfast_kernels.row_layout(tensor) is None:
            return (
                f"{name} has strides {tensor.stride()} (the kernels read rows of contiguous elements, "
                "at most two strides between the rows; .contiguous() makes them so)"
            )
    return None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def implementation_of(body: _Function, implementation: str, one_loop: bool = False) -> _Function:
    """Return ``body``, compiled if the implementation is ``"compile"``; `compiled` explains ``one_loop``."""
    return compiled(body, one_loop) if implementation == "compile" else body


# Inductor writes an intermediate result to memory where the result reads more than a few tensors or takes more than 30
# operations. A second loop then reads the result again. These limits are raised because most of our tensors are scalars
# of a row. Contraction computes a product and a sum in one instruction, with one rounding, in a tenth less time.
_ONE_LOOP: dict[str, Any] = {
    "realize_reads_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "realize_opcount_threshold": 100,
    "cpp.enable_floating_point_contract_flag": "fast",
}


@functools.cache
def compiled(body: _Function, one_loop: bool = False) -> _Function:
    """Return ``body`` through torch.compile with dynamic shapes. The first call raises if compilation fails.

    ``one_loop`` is for a body that is one pass of much arithmetic over rows. No intermediate result is then written to
    memory.
    """
    function = torch.compile(body, dynamic=True, fullgraph=True, options=_ONE_LOOP if one_loop else None)

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            # One compiled version per dtype and setting is intended; the default limit of 8 catches accidents. Numbers
            # among the settings are constants: sums of symbolic numbers round differently, and guards on them fail.
            with torch._dynamo.config.patch(recompile_limit=512, specialize_float=True):
                return function(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
            missing = "" if compiler else " (no C++ compiler was found)"
            first_line = str(error).strip().splitlines()[0]
            raise ImplementationError(f"impl='compile' cannot run{missing}: {first_line}") from error

    return run  # type: ignore[return-value]


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raise under torch.func.jvp or torch.autograd.forward_ad: a custom op would return a zero tangent silently."""
    if torch.compiler.is_compiling():
        return
    stack = torch._C._functorch.get_interpreter_stack()
    under_jvp = any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack or ())
    if under_jvp or any(tensor is not None and _tangent(tensor) is not None for tensor in tensors):
        raise RuntimeError(f"{name} has no forward-mode derivative; use reverse mode (backward, torch.autograd.grad)")


def _tangent(tensor: Tensor) -> Tensor | None:
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call,no-any-return]
