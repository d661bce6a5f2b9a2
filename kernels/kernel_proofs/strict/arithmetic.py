"""Numbers as a GPU computes them: bfloat16, NaN in minima and maxima, live asserts, int32 overflow.

The interpreter keeps bfloat16 as its bits in uint16 arrays, and most of its operations treat these as integers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from kernel_proofs.strict.memory import StrictError, patch

Handle = interpreter.TensorHandle
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def install() -> None:
    """Patch the interpreter's casts and arithmetic."""
    builder = interpreter.InterpreterBuilder
    # device_assert, and the overflow checks of integer arithmetic, are compiled in debug mode only.
    interpreter.interpreter_builder.options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    patch(builder, "cast_impl", _cast)
    patch(builder, "create_fp_to_fp", _float_to_float)
    patch(builder, "binary_op", _binary)
    patch(builder, "unary_op", _unary)
    patch(builder, "create_fma", _fma)
    patch(builder, "create_dot", _dot)
    # Hardware's default returns the other operand for a NaN; Triton 3.6 interprets it as numpy's propagating form.
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    patch(interpreter.ReduceOps, "apply_impl", _reduce)
    patch(interpreter.ScanOps, "apply_impl", _reduce)
    patch(interpreter, "_patch_lang_tensor", _index)


def to_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits, to nearest even. NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16 bits to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: Any) -> Any:
    return Handle(from_bits(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _rounded(values: np.ndarray) -> Any:
    return Handle(values, tl.int1) if values.dtype == bool else Handle(to_bits(values), tl.bfloat16)


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, destination: Any) -> Any:
        narrow = destination.scalar == tl.bfloat16
        if _is_bfloat16(source) == narrow:
            return original(self, source, destination)
        if narrow:
            return Handle(to_bits(source.data.astype(np.float32)), tl.bfloat16)
        wide = _widened(source)
        return wide if destination.scalar == tl.float32 else original(self, wide, destination)

    return cast_impl


def _float_to_float(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, source: Any, destination: Any, rounding: Any) -> Any:
        types = (source.dtype.scalar, destination.scalar)
        nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
        if nearest and tl.bfloat16 in types and all(one.primitive_bitwidth >= 16 for one in types):
            return self.cast_impl(source, destination)
        return original(self, source, destination, rounding)

    return create_fp_to_fp


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if _is_bfloat16(left) and left.data.dtype == np.uint16 and operation not in _BITWISE:
            return _rounded(operation(from_bits(left.data), from_bits(right.data)))
        return original(self, left, right, operation)

    return binary_op


def _unary(original: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, value: Any, operation: Any) -> Any:
        if _is_bfloat16(value):
            return _rounded(operation(from_bits(value.data)))
        return original(self, value, operation)

    return unary_op


def _fma(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar not in (tl.bfloat16, tl.float32):
            return original(self, x, y, z)
        # A product of two float32 is exact in float64. The sum is rounded once, apart from rare double roundings.
        narrow = _is_bfloat16(z)
        x, y, z = (_widened(one).data.astype(np.float64) for one in (x, y, z))
        result = (x * y + z).astype(np.float32)
        return _rounded(result) if narrow else Handle(result, tl.float32)

    return create_fma


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, left: Any, right: Any, accumulator: Any, *rest: Any) -> Any:
        return original(self, _widened(left), _widened(right), accumulator, *rest)

    return create_dot


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, operands: Any) -> Any:
        if any(getattr(operand, "dtype", None) == tl.bfloat16 for operand in operands):
            raise StrictError("reduction over bfloat16: cast to float32 first")
        return original(self, operands)

    return apply_impl


def _index(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a scalar be a loop bound. Triton 3.6 asks for a conversion that numpy 2.4 no longer makes."""

    def patch_language_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    return patch_language_tensor
