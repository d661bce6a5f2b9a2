"""Compile the launches of ``kernel_proofs.cases`` without their GPUs, and read the machine code.

A case is called with tensors on the meta device, at the size that is timed. Its launches are caught and not made.
Triton's own launcher derives the signature and the specialisations, so the compiled kernel is the one that would run.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """A launch that was caught."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Resources(NamedTuple):
    """The resources of a compiled kernel.

    Numbers per element count the loop's instructions, or the kernel's where there is no loop, over the tile's elements.
    """

    registers: int
    spills: int
    shared_bytes: int
    #: Counts in the loop: loads and stores of at least 16 bytes, and all loads and stores.
    vector_loads: int
    loads: int
    vector_stores: int
    stores: int
    special_per_element: float
    instructions_per_element: float
    #: Counts in the whole kernel.
    instructions: int
    float64: int


@contextmanager
def caught_launches() -> Iterator[list[Launch]]:
    """Collect launches in place of making them."""
    launches: list[Launch] = []

    def catch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    original = jit.JITFunction.run
    jit.JITFunction.run = catch
    try:
        yield launches
    finally:
        jit.JITFunction.run = original


def compile_launch(launch: Launch, target: GPUTarget) -> Resources:
    """Compile a launch as its launcher would on ``target``, and read the resources from the machine code."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    # Many cases share their first launch.
    key = (source.hash(), target, backend.hash(), str(sorted(options.__dict__.items(), key=str)))
    if key not in _known:
        _known[key] = _resources(triton.compile(source, target=target, options=options.__dict__), bound, target)
    return _known[key]


_known: dict[tuple[Any, ...], Resources] = {}


def _resources(compiled: Any, bound: dict[str, Any], target: GPUTarget) -> Resources:
    # Tile sizes are the compile-time constants that begin with B: BN rows, BD or BV columns.
    tile = 1
    for name, value in bound.items():
        if re.fullmatch(r"B[A-Z]+", name):
            tile *= value
    elements_per_thread = tile / (compiled.metadata.num_warps * target.warp_size)
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    return read(compiled, elements_per_thread)


class _Syntax(NamedTuple):
    """Patterns of an assembly listing: labels, instructions (operation, operands), targets of jumps, loads."""

    label: str
    instruction: str
    jump: str
    load: str


_SASS = _Syntax(
    r"(\.L_\w+):",
    r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)",
    r"BRA\b.*?(\.L_\w+)",
    r"LD(G|GSTS)\b",
)
_PTX = _Syntax(
    r"(\$L__BB\w+):",
    r"\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_.:]*)(.*)",
    r"bra\S*\s+(\$L__BB\w+)",
    r"(ld\.global|cp\.async)\S*",
)
_AMDGCN = _Syntax(r"(\.LBB\w+):", r"\t([a-z]+_[a-z0-9_]+)(.*)", r"s_c?branch\S*\s+(\.LBB\w+)", r"(global|buffer)_load_")


def _parse(listing: str, syntax: _Syntax) -> tuple[list[str], list[str]]:
    """All instructions, and the instructions of the first innermost loop that loads.

    If no loop loads, the second list equals the first. Later loops serve tails and rows that are read again.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(syntax.label, line):
            labels[label[1]] = len(code)
        elif instruction := re.match(syntax.instruction, line):
            code.append(instruction[1] + instruction[2])
            jump = re.match(syntax.jump, code[-1])
            if jump and jump[1] in labels:
                spans.append((labels[jump[1]], len(code)))
    # Every NVIDIA kernel ends with an endless loop of one instruction.
    loops = [span for span in spans if span[1] - span[0] > 1]
    innermost = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    start, end = min(((a, b) for a, b in innermost if _count(code[a:b], syntax.load)), default=(0, len(code)))
    return code, code[start:end]


def _count(code: list[str], pattern: str) -> int:
    return sum(re.match(pattern, instruction) is not None for instruction in code)


def _read_nvidia(compiled: Any, elements_per_thread: float) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code, loop = _parse(_output("nvdisasm", "-c", file.name), _SASS)
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    _, ptx_loop = _parse(compiled.asm["ptx"], _PTX)
    # The assembler may unroll the loop. One trip through the unrolled loop does the work of several trips.
    loads = _count(loop, r"LD(G|GSTS)\b")
    trips = max(1, round(loads / max(1, _count(ptx_loop, r"(ld\.global|cp\.async)\S*"))))
    return Resources(
        registers=int(registers[1]),
        spills=_count(code, r"(STL|LDL)\b"),
        shared_bytes=compiled.metadata.shared,
        vector_loads=_count(loop, r"LD(G|GSTS)\b\S*\.(128|256)") // trips,
        loads=loads // trips,
        vector_stores=_count(loop, r"STG\b\S*\.(128|256)") // trips,
        stores=_count(loop, r"STG\b") // trips,
        special_per_element=round(_count(loop, "MUFU") / trips / elements_per_thread, 2),
        instructions_per_element=round(len(loop) / trips / elements_per_thread, 1),
        instructions=len(code),
        float64=_count(code, r"D(ADD|MUL|FMA|SETP)\b"),
    )


def _read_amd(compiled: Any, elements_per_thread: float) -> Resources:
    listing = compiled.asm["amdgcn"]
    code, loop = _parse(listing, _AMDGCN)

    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", listing)
        assert found is not None, key
        return int(found[1])

    return Resources(
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count"),
        shared_bytes=compiled.metadata.shared,
        vector_loads=_count(loop, r"(global|buffer)_load_dwordx4"),
        loads=_count(loop, r"(global|buffer)_load_"),
        vector_stores=_count(loop, r"(global|buffer)_store_dwordx4"),
        stores=_count(loop, r"(global|buffer)_store_"),
        special_per_element=round(_count(loop, r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f(16|32)") / elements_per_thread, 2),
        instructions_per_element=round(len(loop) / elements_per_thread, 1),
        instructions=len(code),
        float64=_count(code, r"v_(add|mul|fma|rcp)_f64"),
    )


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
