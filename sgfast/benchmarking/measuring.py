"""Time, memory and accuracy of one computation by one implementation."""

import gc
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Outputs = Sequence[Tensor]
Result = TypeVar("Result")
_FLUSHED_BYTES = 2**28  # more than any GPU's L2
_COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}


def first_rows(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the first rows of every input."""
    return tuple(one[:8] for one in inputs)


class Task(NamedTuple):
    """One computation on inputs of one size, and its implementations."""

    family: str
    name: str
    #: The sizes of the inputs: ``{"tokens": 64, "vocab": 32000}``.
    sizes: dict[str, float | str | None]
    inputs: tuple[Tensor, ...]
    #: Functions of the inputs that return tensors, one row for each row of the first input; others are compared with
    #: the first of them.
    implementations: Mapping[str, Callable[..., Outputs]]
    #: Gradients of the outputs' sum go to this many inputs, from the first on; 0 for forward alone.
    differentiated: int
    #: Bytes that must move, each input read once and each output written once, forward and backward.
    floor_bytes: float
    #: The number of elements (logits, features) that kept bytes are divided by.
    elements: int
    #: The reference in float64 on ``head(*inputs)``, inputs of a few rows; None if there is no reference.
    oracle: Callable[..., Outputs] | None = None
    head: Callable[..., tuple[Tensor, ...]] = first_rows
    #: Implementations that return other values, such as a sum or a draw of their own.
    incomparable: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.inputs[0].device

    def run(self, implementation: str) -> tuple[Outputs, Outputs]:
        """Compute the outputs and the gradients."""
        return _run(self.implementations[implementation], self.inputs, self.differentiated)


def measure(
    task: Task, implementation: str, seconds: float | None = None, *, budget: float = 0.4, timed: bool = True
) -> dict[str, Any]:
    """Measure a task. ``seconds`` is the time if it is known; otherwise ``budget`` seconds are spent on measuring it.

    Returns:
        family, task, implementation, sizes, dtype, ``milliseconds`` (median), ``floor_gb_per_s`` (what must move over
        the time), ``peak_bytes`` (allocated at most beyond the inputs, results included), ``kept_bytes_per_element``
        (by autograd until backward, inputs apart), and of the first rows against float64: ``value_error`` (absolute,
        the largest), ``relative_value_error`` and ``gradient_error`` (the largest of a row, in the norm, relative).
    """
    if seconds is None and timed:
        seconds = median_seconds(lambda: task.run(implementation), task.device, budget)
    record: dict[str, Any] = {
        "family": task.family,
        "task": task.name,
        "implementation": implementation,
        "dtype": str(task.inputs[0].dtype).removeprefix("torch."),
        **task.sizes,
    }
    if seconds is None:
        return record | errors(task, implementation, task.run(implementation))
    record["milliseconds"] = 1e3 * seconds
    record["floor_gb_per_s"] = task.floor_bytes / seconds / 1e9 if task.floor_bytes else None
    record["peak_bytes"], found = peak_bytes(lambda: task.run(implementation), task.device)
    if task.differentiated:
        kept = kept_bytes(task.implementations[implementation], task.inputs, task.differentiated)
        record["kept_bytes_per_element"] = kept / task.elements
    return record | errors(task, implementation, found)


def _run(function: Callable[..., Outputs], inputs: Sequence[Tensor], differentiated: int) -> tuple[Outputs, Outputs]:
    if not differentiated:
        with torch.no_grad():
            return function(*inputs), ()
    leaves = [one.detach().requires_grad_() for one in inputs[:differentiated]]
    outputs = function(*leaves, *inputs[differentiated:])
    return outputs, torch.autograd.grad(sum(one.sum() for one in outputs), leaves)  # type: ignore[arg-type]


def median_seconds(function: Callable[[], Any], device: torch.device, budget: float = 0.4) -> float:
    """Return the median time of at least three rounds after a first one; on a GPU with cold caches."""
    return median(interleaved_seconds({"": function}, device, budget)[""])


def interleaved_seconds(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, budget: float = 0.4
) -> dict[str, list[float]]:
    """Measure functions that take turns, so that other work on the machine slows all of them alike.

    Turns go on for ``budget`` seconds per function, for at least three and at most a thousand.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(1000):
        if turn >= 3 and sum(map(sum, times.values())) >= budget * len(functions):
            break
        for name, function in functions.items():
            seconds, result = run_timed(function, device)
            times[name].append(seconds)
            del result  # freeing it is not the computation
    return times


def run_timed(function: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the seconds that a function takes, and its result; on a GPU with cold caches."""
    if device.type == "cuda":
        torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def peak_bytes(function: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """Return the peak of PyTorch's allocator beyond its bytes before, and the function's result, which counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds of the profiler write a line for each use
    gc.collect()  # blocks freed inside but made before would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    results = recorded.profiler.kineto_results
    events = [one for one in results.events() if one.name() == "[memory]"]
    live = itertools.accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns()))
    return max(live, default=0), result


def kept_bytes(function: Callable[..., Outputs], inputs: Sequence[Tensor], differentiated: int) -> int:
    """Return the bytes that autograd holds between forward and backward, without the inputs."""
    leaves = [one.detach().requires_grad_() for one in inputs[:differentiated]]
    given = {one.untyped_storage().data_ptr() for one in inputs}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = function(*leaves, *inputs[differentiated:])  # noqa: F841  # while they live, so does what they keep
    return sum(kept.values())


def errors(task: Task, implementation: str, found: tuple[Outputs, Outputs]) -> dict[str, float]:
    """Return the errors of the first rows of ``run``'s result; no errors if the task has no reference."""
    if task.oracle is None or implementation in task.incomparable:
        return {}
    exact = [one.double() if one.is_floating_point() else one for one in task.head(*task.inputs)]
    expected, expected_gradients = _run(task.oracle, exact, task.differentiated)
    values, gradients = found
    value_error = relative = gradient_error = 0.0
    for value, wanted in zip(values, expected, strict=True):
        difference = value[: len(wanted)].double() - wanted
        value_error = max(value_error, difference.abs().max().item())
        relative = max(relative, _relative_by_row(difference, wanted))
    largest = {"value_error": value_error, "relative_value_error": relative}
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        difference = gradient[: len(wanted)].double() - wanted
        gradient_error = max(gradient_error, _relative_by_row(difference, wanted))
        largest["gradient_error"] = gradient_error
    return largest


def _relative_by_row(difference: Tensor, wanted: Tensor) -> float:
    """Return the largest quotient of a row's norms."""
    norms = [one.detach().reshape(len(one), -1).norm(dim=-1) for one in (difference, wanted)]
    return float((norms[0] / norms[1].clamp_min(1e-30)).max())


def copy_gb_per_s(device: str) -> float:
    """Measure a plain copy of more bytes than caches hold: gigabytes read and written per second, the ceiling."""
    kind = torch.device(device).type
    source = torch.zeros(_COPIED_BYTES[kind], dtype=torch.uint8, device=device)
    destination = torch.zeros_like(source)
    seconds = median_seconds(lambda: destination.copy_(source), source.device)
    return 2 * source.numel() / seconds / 1e9
