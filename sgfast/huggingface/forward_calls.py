"""Which forward pass of a module made given outputs, and what the module was called with."""

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Nodes of the autograd graph between a module's outputs and what its wrappers return: casts, copies, sinks.
_SEARCHED_NODES = 256
# Values that are compared along each dimension, about.
_SAMPLED = 4
# What a teacher must not be given, and what must not be kept alive: a cache holds the keys and values of all layers.
CACHES = ("past_key_values", "cache_params", "mems")


class ForwardCall(NamedTuple):
    """What a forward pass was called with, without caches."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    caches: tuple[str, ...]  # keywords that gave one


class _Sampled(NamedTuple):
    """A forward pass without a graph, and some of the values that it returned."""

    call: ForwardCall
    shapes: tuple[torch.Size, ...]
    samples: tuple[Tensor, ...]


def output_tensors(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors of an output that can be logits: of floating point, with at least two dimensions (a loss has none).

    They are ``logits`` of a ModelOutput or a mapping, else every such tensor of a tuple or a mapping, or the output
    itself.
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
    """A forward hook that finds the call which made given logits.

    A call is kept as long as the tensors that it returned, or their graph, so that evaluations and generations leave
    nothing behind. Wrappers return other tensors than the module did: DistributedDataParallel passes them through a
    function, fully_shard and mixed precision cast them. A call is therefore looked for by the tensor itself, then by
    the first nodes of its graph, and without a graph by sampled values of the last forward. A match is never assumed
    because no other forward is known.
    """

    def __init__(self) -> None:
        self._by_tensor: MutableMapping[Tensor, ForwardCall] = WeakTensorKeyDictionary()
        self._sampled: _Sampled | None = None
        # A hook that torch.compile traces may set attributes, which takes place after the graph has run. It may not
        # tag graphs; `_take_traced` does so later. Two forwards are kept.
        self._traced: tuple[ForwardCall, tuple[Tensor, ...]] | None = None
        self._traced_before: tuple[ForwardCall, tuple[Tensor, ...]] | None = None
        self._paused = False
        self._any = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardCalls, ()  # a copied module must not carry a batch

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], outputs: Any) -> None:
        """Remember a forward."""
        if self._paused:
            return
        caches = tuple(name for name in CACHES if keywords.get(name) is not None)
        call = ForwardCall(arguments, {name: keywords[name] for name in keywords if name not in CACHES}, caches)
        tensors = output_tensors(outputs)
        self._any = True
        if torch.compiler.is_compiling():
            self._traced_before = self._traced
            self._traced = call, tensors
        else:
            self._keep(call, tensors)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore forwards: those of a teacher that runs the module too."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def has_any(self) -> bool:
        """Whether there was a forward."""
        return self._any

    def of(self, logits: Tensor) -> ForwardCall:
        """The call that made ``logits``.

        Raises:
            RuntimeError: no forward is known to have made them, or several have.
        """
        self._take_traced()
        call = self._by_tensor.get(logits)
        if call is not None:
            return call
        found = self._in_graph(logits)
        if len(found) > 1:
            raise RuntimeError(
                f"outputs come from {len(found)} forwards of the student; a loss belongs to one. With several GPUs in "
                "one process (torch.nn.DataParallel), launch one process for each GPU instead"
            )
        if found:
            return found[0]
        if logits.grad_fn is None and self._sampled is not None and _equals(self._sampled, logits):
            return self._sampled.call
        raise RuntimeError(
            "outputs must come from a forward of the student since compute_loss was made, as the model returned them: "
            "no forward is known that made these logits (of forwards without a graph, the last one alone is known once "
            "its logits are gone; of compiled ones, the last two)"
        )

    def _keep(self, call: ForwardCall, tensors: tuple[Tensor, ...]) -> None:
        for tensor in tensors:
            self._by_tensor[tensor] = call
            if tensor.grad_fn is not None:
                # Beside the node, not in a table of nodes, so that it goes with the graph.
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
        """The calls whose outputs are the next ones above a tensor."""
        found: dict[int, ForwardCall] = {}
        edges = [(logits.grad_fn, logits.output_nr)]
        seen: set[Any] = set()
        for node, output in edges:  # grows
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
    """What a node of the graph carries along; torch declares a method and has a property."""
    metadata: dict[Any, Any] = node.metadata
    return metadata


def _sample(tensor: Tensor) -> Tensor:
    """A view of a few values that are spread over a tensor."""
    return tensor[tuple(slice(None, None, max(1, size // _SAMPLED)) for size in tensor.shape)]


def _equals(sampled: _Sampled, logits: Tensor) -> bool:
    """Whether logits are those of a forward, or a cast of them."""
    values = _sample(logits.detach())
    for shape, sample in zip(sampled.shapes, sampled.samples, strict=True):
        if shape == logits.shape and sample.device == values.device:
            narrow = min(sample.dtype, values.dtype, key=lambda dtype: torch.finfo(dtype).bits)
            if torch.equal(sample.to(narrow).nan_to_num(), values.to(narrow).nan_to_num()):
                return True
    return False
