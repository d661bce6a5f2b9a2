"""Search for the forward pass of a module that made given outputs, and for the arguments of that pass."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Most nodes of the autograd graph that are searched. Wrappers add nodes above a module's outputs: casts, copies, sinks.
_SEARCHED_NODES = 256
# Approximate number of compared values along each dimension.
_SAMPLED = 4
# Arguments that are neither passed to a teacher nor kept alive: a cache holds the keys and values of all layers.
CACHES = ("past_key_values", "cache_params", "mems")


class ForwardCall(NamedTuple):
    """Arguments of a forward pass, without caches."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    caches: tuple[str, ...]  # names of the keywords that held a cache
    head: Any = None  # weights of the head that the pass left out; None if the pass made logits


class _Sampled(NamedTuple):
    """Forward pass without an autograd graph, and samples of the values that the pass returned."""

    call: ForwardCall
    shapes: tuple[torch.Size, ...]
    samples: tuple[Tensor, ...]


def output_tensors(outputs: Any) -> tuple[Tensor, ...]:
    """Return the tensors of an output that can be logits: floating point, with at least two dimensions.

    A ModelOutput or a mapping with ``logits`` gives that tensor. Another mapping or a tuple gives every tensor that can
    be logits. A tensor gives itself.
    """
    if isinstance(outputs, Tensor):
        parts: tuple[Any, ...] = (outputs,)
    elif isinstance(outputs, Mapping):
        logits = outputs.get("logits")
        parts = tuple(outputs.values()) if logits is None else (logits,)
    elif isinstance(outputs, tuple):
        parts = outputs
    else:
        parts = (getattr(outputs, "logits", None),)
    return tuple(part for part in parts if isinstance(part, Tensor) and part.dim() > 1 and part.is_floating_point())


class ForwardCalls:
    """Forward hook that remembers calls and finds the call that made given logits.

    A call is kept as long as the tensors that the call returned, or their graph. Evaluations and generations therefore
    leave nothing behind. Wrappers return other tensors than the module: DistributedDataParallel passes the tensors
    through a function; fully_shard and mixed precision cast them. The search compares first the tensor itself, then the
    first nodes of its graph. For tensors without a graph, the search compares sampled values of the last forward pass.
    A call is never assumed to match only because no other call is known.

    Args:
        take_head: returns the ``head`` of the pass that ends.
    """

    def __init__(self, take_head: Callable[[], Any] = lambda: None) -> None:
        self._take_head = take_head
        self._by_tensor: MutableMapping[Tensor, ForwardCall] = WeakTensorKeyDictionary()
        self._sampled: _Sampled | None = None
        # A hook that torch.compile traces may set attributes (after the compiled graph has run) but may not tag graphs.
        # The last two traced calls are therefore stored here, and `_take_traced` tags their graphs later.
        self._traced: tuple[ForwardCall, tuple[Tensor, ...]] | None = None
        self._traced_before: tuple[ForwardCall, tuple[Tensor, ...]] | None = None
        self._paused = False
        self._any = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardCalls, ()  # a copied module must not carry a batch

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], outputs: Any) -> None:
        """Remember a forward pass."""
        if self._paused:
            return
        caches = tuple(name for name in CACHES if keywords.get(name) is not None)
        kept = {name: keywords[name] for name in keywords if name not in CACHES}
        call = ForwardCall(arguments, kept, caches, self._take_head())
        tensors = output_tensors(outputs)
        self._any = True
        if torch.compiler.is_compiling():
            self._traced_before = self._traced
            self._traced = call, tensors
        else:
            self._keep(call, tensors)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore forward passes, for a teacher that runs the module too."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def has_any(self) -> bool:
        """Return whether there was a forward pass."""
        return self._any

    def of(self, logits: Tensor) -> ForwardCall:
        """Return the call that made ``logits``.

        Raises:
            RuntimeError: no known forward pass made the logits, or more than one did.
        """
        self._take_traced()
        call = self._by_tensor.get(logits)
        if call is not None:
            return call
        found = self._in_graph(logits)
        if len(found) > 1:
            raise RuntimeError(
                f"outputs must come from one forward of the student; got outputs of {len(found)} forwards. If one "
                "process uses several GPUs (torch.nn.DataParallel), launch one process for each GPU instead"
            )
        if found:
            return found[0]
        if logits.grad_fn is None and self._sampled is not None and _equals(self._sampled, logits):
            return self._sampled.call
        raise RuntimeError(
            "outputs must be what a forward of the student returned after compute_loss was made; no forward is known "
            "that made these logits (without a graph, only the last forward is known after its logits are deleted; "
            "with torch.compile, only the last two forwards are known)"
        )

    def _keep(self, call: ForwardCall, tensors: tuple[Tensor, ...]) -> None:
        for tensor in tensors:
            self._by_tensor[tensor] = call
            if tensor.grad_fn is not None:
                # The call is stored on the node, not in a table of nodes, so that the call is freed with the graph.
                _metadata(tensor.grad_fn).setdefault(self, {})[tensor.output_nr] = call
        without_graph = tuple(tensor.detach() for tensor in tensors if tensor.grad_fn is None)
        if without_graph:
            shapes = tuple(tensor.shape for tensor in without_graph)
            self._sampled = _Sampled(call, shapes, tuple(_sample(tensor).clone() for tensor in without_graph))

    def _take_traced(self) -> None:
        for traced in (self._traced_before, self._traced):
            if traced is not None:
                self._keep(*traced)
        self._traced = self._traced_before = None

    def _in_graph(self, logits: Tensor) -> list[ForwardCall]:
        """Return the calls whose outputs lie next above a tensor in its graph."""
        found: dict[int, ForwardCall] = {}
        edges = [(logits.grad_fn, logits.output_nr)]
        seen: set[Any] = set()
        for node, output in edges:  # the list grows during the loop
            if node is None or (node, output) in seen or len(seen) >= _SEARCHED_NODES:
                continue
            seen.add((node, output))
            call = _metadata(node).get(self, {}).get(output)
            if call is None:
                edges.extend(node.next_functions)
            else:
                found[id(call)] = call
        return list(found.values())


def _metadata(node: Any) -> dict[Any, Any]:
    """Return the metadata of a graph node. (torch declares a method, but ``metadata`` is a property.)"""
    metadata: dict[Any, Any] = node.metadata
    return metadata


def _sample(tensor: Tensor) -> Tensor:
    """Return a view of a few values, spread over a tensor."""
    return tensor[tuple(slice(None, None, max(1, size // _SAMPLED)) for size in tensor.shape)]


def _equals(sampled: _Sampled, logits: Tensor) -> bool:
    """Return whether logits equal the outputs of a forward pass, or a cast of the outputs."""
    values = _sample(logits.detach())
    for shape, sample in zip(sampled.shapes, sampled.samples, strict=True):
        if shape == logits.shape and sample.device == values.device:
            narrow = min(sample.dtype, values.dtype, key=lambda dtype: torch.finfo(dtype).bits)
            if torch.equal(sample.to(narrow).nan_to_num(), values.to(narrow).nan_to_num()):
                return True
    return False
