"""Triton's interpreter, made as strict as a GPU is.

The stock interpreter runs one program after another on whole numpy arrays. It therefore accepts errors that fail on
hardware. ``install()``, called in a process that set ``TRITON_INTERPRET=1`` before its first import of triton, adds:

=================== ==================================================================================================
bounds              every unmasked lane of a load or store lies on an element of a tensor passed to the launch; the
                    gaps of a strided view do not count
poison              lanes masked off in a load without ``other=`` hold NaN, or a huge integer (stock: 0)
races               two programs on one address, one of them writing, not both atomically; two lanes of one store on
                    one address; a load or store after a store of the same program without ``tl.debug_barrier()``
program order       programs run in a shuffled order (``program_order`` chooses), so that results which depend on the
                    order change
unwritten outputs   ``torch.empty`` fills with NaN
bfloat16            casts round to nearest even, arithmetic is done in float32 and rounded once, reductions over
                    bfloat16 are refused (stock: bit patterns are added as integers)
asserts             ``tl.device_assert`` works; int32 arithmetic that overflows raises
libdevice           the common functions, and inline assembly of one approximate instruction
traffic             ``count_traffic`` records the bytes that each launch loads and stores
=================== ==================================================================================================

Not modelled: fused multiply-add contraction, flushed subnormals, tf32, the order of a reduction inside a program,
registers and shared memory, caches. Races within one program are judged between whole loads and stores. The layer
patches Triton's interpreter, which is no public API: it is tested with Triton 3.6 and 3.9.
"""

import torch
import triton
from triton.runtime import interpreter

from kernel_proofs.strict import arithmetic, libraries, memory
from kernel_proofs.strict.memory import StrictError, Traffic, count_traffic, program_order

__all__ = ["StrictError", "Traffic", "count_traffic", "install", "program_order"]


def install() -> None:
    """Patch this process's interpreter, once."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before the first import of triton")
    if hasattr(interpreter, "_sgfast_strict"):
        return
    interpreter._sgfast_strict = True
    memory.install()
    arithmetic.install()
    libraries.install()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
