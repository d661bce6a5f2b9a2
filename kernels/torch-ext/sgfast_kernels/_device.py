"""Differences between vendors. No other module asks which GPU a kernel is compiled for."""

from typing import Any

import triton.language as tl

_FAST_LOG2 = {"cuda": "__nv_fast_log2f", "hip": "__ocml_native_log2_f32"}


def fast_log2(b_x: Any, _semantic: Any = None) -> Any:
    """log2 of a normal float32 by the GPU's own instruction: the error is 2e-7 near 1 and one rounding elsewhere.

    ``tl.log2`` spends 10 to 40 instructions on subnormal numbers and the last bit.
    """
    if _semantic is None:  # the interpreter
        return tl.log2(b_x)
    symbols = {(tl.float32,): (_FAST_LOG2[_semantic.builder.options.backend_name], tl.float32)}
    return tl.core.extern_elementwise("", "", [b_x], symbols, is_pure=True, _semantic=_semantic)


# Called while a kernel is compiled.
fast_log2.__triton_builtin__ = True  # type: ignore[attr-defined]
