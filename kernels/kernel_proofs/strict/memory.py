"""The memory of a launch: bounds, poison, races, program order, and the bytes that move.

Every access is checked at once against the tensors that were passed to the launch, and logged. When the launch ends,
the log is sorted by address and searched for races.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

LOAD, STORE, ATOMIC = 0, 1, 2


class StrictError(AssertionError):
    """An error that a GPU would make as well."""


@dataclass
class Traffic:
    """Bytes of one launch, by the kernel's argument. Each lane counts, also where lanes read one address."""

    kernel: str
    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)


class _Extent:
    """The elements of a tensor argument, as addresses."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name = name
        self.start, self.item = tensor.data_ptr(), tensor.element_size()
        levels = sorted(
            ((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and stride),
            reverse=True,
        )
        self.end = self.start + self.item * (1 + sum(stride * (size - 1) for stride, size in levels))
        # An address in overlapping windows (as_strided) has no unique index. Every address between the ends is
        # accepted.
        inner_spans = [1 + sum(stride * (size - 1) for stride, size in levels[i + 1 :]) for i in range(len(levels))]
        overlap = any(stride < span for (stride, _), span in zip(levels, inner_spans, strict=True))
        self.levels = [(1, (self.end - self.start) // self.item)] if overlap else levels

    def contains(self, addresses: np.ndarray) -> np.ndarray:
        """Return which addresses are addresses of elements."""
        offset = addresses - self.start
        remainder = offset // self.item
        inside = (offset >= 0) & (offset % self.item == 0)
        for stride, size in self.levels:
            remainder = remainder - stride * np.clip(remainder // stride, 0, size - 1)
        return inside & (remainder == 0)

    def overlaps(self, addresses: np.ndarray) -> bool:
        """Return whether the range of the addresses overlaps the range of the tensor."""
        return bool(addresses.min() < self.end and addresses.max() >= self.start)


@dataclass
class _Access:
    kind: int
    addresses: np.ndarray
    size: int
    program: int
    #: The number of barriers passed in this launch. Accesses of one program with the same number are unordered.
    epoch: int


class _Launch:
    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]):
        self.traffic = Traffic(kernel)
        self.extents = [_Extent(name, tensor) for name, tensor in tensors.items() if tensor.numel()]
        self.log: list[_Access] = []
        self.order: np.ndarray | None = None
        self.program = self.epoch = 0
        self.has_other = False
        #: Modules of triton.language whose functions the interpreter has replaced for this launch.
        self.replaced: set[int] = set()

    def access(self, kind: int, pointers: Any, mask: np.ndarray, size: int) -> None:
        addresses, mask = np.broadcast_arrays(pointers.data, mask)
        addresses = addresses[mask.astype(bool)].astype(np.int64)
        outside = np.ones(len(addresses), bool)
        for extent in self.extents:
            if not outside.any():
                break
            inside = extent.contains(addresses[outside])
            count = int(inside.sum()) * size
            for counted, kinds in ((self.traffic.loaded, (LOAD, ATOMIC)), (self.traffic.stored, (STORE, ATOMIC))):
                if kind in kinds and count:
                    counted[extent.name] = counted.get(extent.name, 0) + count
            outside[outside] = ~inside
        if outside.any():
            where = self._name(int(addresses[outside][0]))
            raise StrictError(
                f"out of bounds: {('load', 'store', 'atomic')[kind]} of {int(outside.sum())} lanes in program "
                f"{self.program} of {self.traffic.kernel}, first {where}"
            )
        if len(addresses):
            self.log.append(_Access(kind, addresses, size, self.program, self.epoch))

    def _name(self, address: int) -> str:
        if not self.extents:
            return "at a pointer, but the launch was passed no tensor"
        nearest = min(self.extents, key=lambda extent: max(extent.start - address, address - extent.end, 0))
        return f"at {nearest.name} {address - nearest.start:+d} bytes"

    def finish(self) -> None:
        """Look for races in the log."""
        written = [extent for extent in self.extents if extent.name in self.traffic.stored]
        touching = [a for a in self.log if a.kind != LOAD or any(extent.overlaps(a.addresses) for extent in written)]
        if not written:
            return
        granule = min(a.size for a in touching)
        parts = [(a.addresses[:, None] + np.arange(0, a.size, granule)).reshape(-1) for a in touching]
        lengths = [len(part) for part in parts]
        address = np.concatenate(parts)

        def of_access(values: list[int]) -> np.ndarray:
            return np.repeat(np.array(values, np.int64), lengths)

        program, kind = of_access([a.program for a in touching]), of_access([a.kind for a in touching])
        epoch, access = of_access([a.epoch for a in touching]), of_access(list(range(len(touching))))
        # Stable, so that the accesses of one program to one address stay in the order they were made.
        order = np.lexsort((program, address))
        self._check_sorted(address[order], program[order], kind[order], epoch[order], access[order])

    def _check_sorted(
        self, address: np.ndarray, program: np.ndarray, kind: np.ndarray, epoch: np.ndarray, access: np.ndarray
    ) -> None:
        same = address[1:] == address[:-1]
        same_program = same & (program[1:] == program[:-1])
        wrote, atomics = kind[:-1] != LOAD, (kind[1:] == ATOMIC) & (kind[:-1] == ATOMIC)
        twice = same_program & (access[1:] == access[:-1]) & (kind[1:] == STORE)
        unordered = same_program & wrote & (epoch[1:] == epoch[:-1]) & ~atomics & ~twice

        group = np.concatenate([[0], np.flatnonzero(~same) + 1])
        shared = np.minimum.reduceat(program, group) != np.maximum.reduceat(program, group)
        stored = np.logical_or.reduceat(kind == STORE, group)
        atomic = np.logical_or.reduceat(kind == ATOMIC, group)
        plain = np.logical_or.reduceat(kind != ATOMIC, group)
        racing = shared & (stored | (atomic & plain))

        if racing.any():
            first = int(group[racing.argmax()])
            members = address == address[first]
            writers = set(program[members & (kind == STORE)])
            what = "write/write" if len(writers) > 1 else "plain/atomic" if atomic[racing.argmax()] else "read/write"
            programs = sorted(set(program[members]))
            self._fail(f"{what} race between programs {programs[:4]}", address[first])
        if twice.any():
            first = int(twice.argmax())
            self._fail(f"two lanes of one store in program {program[first]}", address[first])
        if unordered.any():
            first = int(unordered.argmax())
            then = "stores" if kind[first + 1] == STORE else "loads"
            self._fail(f"program {program[first]} stores and then {then} without tl.debug_barrier()", address[first])

    def _fail(self, what: str, address: int) -> None:
        raise StrictError(f"{what}, in {self.traffic.kernel} {self._name(int(address))}")


_launch: _Launch | None = None
_order = "random"
_recorders: list[list[Traffic]] = []


def _current() -> _Launch:
    if _launch is None:
        raise RuntimeError("memory access outside a launch")
    return _launch


@contextmanager
def program_order(order: str) -> Iterator[None]:
    """Run the programs of every launch inside in ``"forward"``, ``"reverse"`` or ``"random"`` order."""
    global _order
    if order not in ("forward", "reverse", "random"):
        raise ValueError(f"order must be forward, reverse or random; got {order!r}")
    previous, _order = _order, order
    try:
        yield
    finally:
        _order = previous


@contextmanager
def count_traffic() -> Iterator[list[Traffic]]:
    """Collect the traffic of every launch inside, in order."""
    recorder: list[Traffic] = []
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def install() -> None:
    """Patch the interpreter's launch and its memory operations."""
    builder = interpreter.InterpreterBuilder
    patch(interpreter.GridExecutor, "__call__", _launched)
    patch(interpreter, "_patch_lang", _replaced_functions)
    patch(builder, "set_grid_idx", _started)
    patch(TritonSemantic, "load", _asked_to_load)
    patch(builder, "create_masked_load", _loaded)
    patch(builder, "create_masked_store", _stored)
    patch(builder, "create_atomic_rmw", _updated)
    patch(builder, "create_atomic_cas", _compared)
    patch(builder, "create_barrier", _passed_barrier)


def patch(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``wrap(owner.name)``."""
    setattr(owner, name, wrap(getattr(owner, name)))


def _replaced_functions(original: Callable[..., Any]) -> Callable[..., Any]:
    def patch_lang(function: Callable[..., Any]) -> Any:
        # Every call of a device function would search the same modules again, which takes half of the time.
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if _launch is not None and modules <= _launch.replaced:
            return None
        if _launch is not None:
            _launch.replaced |= modules
        return original(function)

    return patch_lang


def _launched(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        signature = inspect.signature(self.fn)
        named = {name: value for name, value in kwargs.items() if name in signature.parameters}
        bound = signature.bind(*args, **named).arguments
        _launch = _Launch(self.fn.__name__, dict(_tensors(bound)))
        try:
            # Infinities and NaNs are values like others on a GPU.
            with np.errstate(all="ignore"):
                original(self, *args, **kwargs)
            _launch.finish()
            for recorder in _recorders:
                recorder.append(_launch.traffic)
        except InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None
        finally:
            _launch = None

    return call


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": item for i, item in enumerate(value)})


def _started(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        launch = _current()
        _, height, depth = self.grid_dim
        if launch.order is None:
            launch.order = np.arange(np.prod(self.grid_dim))
            if _order == "reverse":
                launch.order = launch.order[::-1]
            elif _order == "random":
                launch.order = np.random.default_rng(len(launch.order)).permutation(launch.order)
        launch.program = program = int(launch.order[(x * height + y) * depth + z])
        launch.epoch += 1
        original(self, program // (height * depth), program // depth % height, program % depth)

    return set_grid_idx


def _item_size(pointers: Any) -> int:
    return int(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)


def _asked_to_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, pointer: Any, mask: Any, other: Any, *rest: Any) -> Any:
        # Triton drops an ``other`` of a single zero on the way to the builder.
        _current().has_other = other is not None
        return original(self, pointer, mask, other, *rest)

    return load


def _loaded(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        _current().access(LOAD, pointers, mask.data, _item_size(pointers))
        loaded = original(self, pointers, mask, other, *rest, **options)
        if other is None and not _current().has_other and not mask.data.all():
            data = loaded.data.copy()
            data[~np.broadcast_to(mask.data, data.shape).astype(bool)] = _poison(loaded)
            loaded = interpreter.TensorHandle(data, loaded.dtype)
        return loaded

    return create_masked_load


def _poison(loaded: Any) -> Any:
    if loaded.dtype == tl.bfloat16:
        return 0x7FC1  # a NaN
    if loaded.data.dtype.kind == "f":
        return np.nan
    # As an index this number leads far out of bounds, even if its product with an element size wraps around.
    return True if loaded.data.dtype == bool else np.iinfo(loaded.data.dtype).max // 3


def _stored(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _current().access(STORE, pointers, mask.data, _item_size(pointers))
        return original(self, pointers, value, mask, *rest, **options)

    return create_masked_store


def _updated(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _current().access(ATOMIC, pointers, mask.data, _item_size(pointers))
        return original(self, operation, pointers, value, mask, *rest)

    return create_atomic_rmw


def _compared(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        _current().access(ATOMIC, pointers, np.ones_like(pointers.data, bool), _item_size(pointers))
        return original(self, pointers, *rest)

    return create_atomic_cas


def _passed_barrier(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_barrier(self: Any, *args: Any) -> None:
        _current().epoch += 1

    return create_barrier
