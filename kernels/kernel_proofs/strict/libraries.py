"""Device libraries and inline assembly, which the stock interpreter refuses, as exact functions in numpy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

_erf = np.vectorize(math.erf, otypes=[np.float64])

LIBDEVICE: dict[str, Callable[..., np.ndarray]] = {
    "acos": np.arccos,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "cos": np.cos,
    "cospi": lambda x: np.cos(np.pi * x.astype(np.float64)),
    "div_rn": np.divide,
    "erf": _erf,
    "erfc": lambda x: 1 - _erf(x),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fast_expf": np.exp,
    "fast_log2f": np.log2,
    "fast_logf": np.log,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "pow": np.power,
    "rint": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "sinpi": lambda x: np.sin(np.pi * x.astype(np.float64)),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "trunc": np.trunc,
}

# The assembly text of a call has one instruction. It is searched for these names.
ASSEMBLY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cos.approx": np.cos,
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
    "rcp.approx": lambda x: 1 / x,
    "rsqrt.approx": lambda x: 1 / np.sqrt(x),
    "sin.approx": np.sin,
    "tanh.approx": np.tanh,
}


class _Results:
    """The results of an instruction by number, as the builder expects them."""

    def __init__(self, handle: Any):
        self.handle = handle

    def get_result(self, _: int) -> Any:
        return self.handle


def _emulated(function: Callable[..., np.ndarray]) -> Callable[..., Any]:
    def call(*arguments: Any, **_: Any) -> Any:
        tensors = [interpreter.interpreter_semantic.to_tensor(argument) for argument in arguments]
        first = tensors[0]
        data = function(*(tensor.handle.data for tensor in tensors)).astype(first.handle.data.dtype)
        return tl.tensor(interpreter.TensorHandle(data, first.dtype), first.type)

    return call


def _inline_assembly(
    self: Any, assembly: str, constraints: str, values: list[Any], result_type: Any, is_pure: bool, pack: int
) -> _Results:
    """Emulate one instruction. Unknown assembly is refused, because a guess would let a kernel pass without proof."""
    for instruction, function in ASSEMBLY.items():
        if instruction in assembly:
            data = function(values[0].data).astype(values[0].data.dtype)
            return _Results(interpreter.TensorHandle(data, values[0].dtype))
    raise NotImplementedError(f"no emulation of this inline assembly: {assembly}")


def install() -> None:
    """Replace libdevice's functions, and inline assembly, in the interpreter."""
    for name, function in LIBDEVICE.items():
        setattr(libdevice, name, _emulated(function))
    interpreter.InterpreterBuilder.create_inline_asm = _inline_assembly
