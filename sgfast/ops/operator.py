"""Operators whose arguments are declared once, as a NamedTuple.

A registered operator (`torch.library.custom_op`) needs a flat signature four times: for its schema, its implementation,
its fake and its autograd formula. `define` makes the schema from a NamedTuple of the arguments and hands the tuple to
each of the other three; gradients go back by the arguments' names. A field may be a NamedTuple itself: its fields take
its place in the schema.

Every operator has one more argument, ``formula``: a digest of this package's sources. torch.compile keeps compiled
graphs on the disk under a key that knows the forward call only, not the registered backward that the graph holds. With
the digest in the call, a graph that another version of sgfast compiled cannot match.
"""

import functools
import hashlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for path in sorted(path for folder in ("ops", "loss", "noise_layer") for path in (package / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# Changes with the source of any operation. A constant of the module: torch.compile traces its uses.
FORMULA = _digest_of_sources()


class Operator:
    """A registered operator: call it with its arguments' tuple."""

    def __init__(self, name: str, arguments: type, implementation: Callable[..., Any], **registration: Any) -> None:
        """Register ``sgfast::name``; ``implementation`` takes an ``arguments`` and returns tensors."""
        self.name, self.implementation = name, implementation
        self._arguments = arguments
        self._names = [name for name, *_ in _flat_fields(arguments)]
        run = self._unpacked(implementation, checked=True)
        run.__signature__ = _signature(arguments, implementation)  # type: ignore[attr-defined]
        self._operator = torch.library.custom_op(f"sgfast::{name}", run, **registration)

    def __call__(self, arguments: Any) -> Any:
        """Run the operator."""
        return self._operator(*self.flat(arguments))

    def flat(self, arguments: Any) -> tuple[Any, ...]:
        """The arguments as the schema has them."""
        return *_leaves(arguments), FORMULA

    @property
    def overload(self) -> Any:
        """The operator as `torch.library.opcheck` and a graph know it."""
        return getattr(torch.ops.sgfast, self.name).default

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Give the outputs' shapes: ``fake`` takes the arguments' tuple of fake tensors."""
        self._operator.register_fake(self._unpacked(fake))
        return fake

    def register_gradients(
        self, setup: Callable[[Any, Any, Any], None], gradients: Callable[..., Mapping[str, Tensor | None]]
    ) -> None:
        """Give the backward formula.

        Args:
            setup: ``setup(ctx, arguments, output)`` keeps what backward needs, see `keep`.
            gradients: ``gradients(ctx, *upstream)`` returns gradients by the arguments' names; others have none. The
                gradient of an argument that wants none (see `wanted`) is dropped.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, _pack(self._arguments, iter(inputs)), output)

        def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
            found = gradients(ctx, *upstream)
            unknown = found.keys() - set(self._names)
            if unknown:
                raise RuntimeError(f"sgfast::{self.name} has no arguments {sorted(unknown)} that could have gradients")
            needed = zip(self._names, ctx.needs_input_grad, strict=False)  # PyTorch's has more at its end
            return *(found.get(name) if needs else None for name, needs in needed), None

        self._operator.register_autograd(backward, setup_context=setup_context)

    def wanted(self, ctx: Any, *names: str) -> list[bool]:
        """Whether somebody asks for the gradients of these arguments, in backward."""
        return [bool(ctx.needs_input_grad[self._names.index(name)]) for name in names]

    def _unpacked(self, function: Callable[..., Any], checked: bool = False) -> Callable[..., Any]:
        """``function`` of the arguments' tuple as a function of the flat arguments."""

        @functools.wraps(function)
        def run(*flat: Any, **named: Any) -> Any:
            if named:
                flat = (*flat, *(named[name] for name in (*self._names, "formula")[len(flat) :]))
            if checked and flat[-1] != FORMULA:
                raise RuntimeError(
                    f"this graph calls sgfast::{self.name} as another version of sgfast defined the operator "
                    f"(formula {flat[-1]}, here {FORMULA}): export or compile the graph again"
                )
            return function(_pack(self._arguments, iter(flat)))

        return run


def define(
    name: str, arguments: type, *, mutates_args: Sequence[str] = (), tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated function as the operator ``sgfast::name``, which writes to ``mutates_args`` alone."""
    return lambda implementation: Operator(name, arguments, implementation, mutates_args=mutates_args, tags=tags)


def keep(ctx: Any, *values: Any) -> None:
    """Keep tensors, argument tuples and constants for backward, which gets them back from `kept`."""
    leaves = _leaves(values)
    ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
    ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    ctx.types = [type(value) if _is_named_tuple(type(value)) else None for value in values]


def kept(ctx: Any) -> list[Any]:
    """What `keep` was given."""
    pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
    leaves = iter([constant if tensor is None else tensor for tensor, constant in pairs])
    return [next(leaves) if kind is None else _pack(kind, leaves) for kind in ctx.types]


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _leaves(arguments: tuple[Any, ...]) -> list[Any]:
    found = []
    for value in arguments:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            found += _leaves(value)
        else:
            found.append(value)
    return found


def _pack(arguments: Any, leaves: Iterator[Any]) -> Any:
    return arguments._make([next(leaves) if kind is None else _pack(kind, leaves) for kind in _nested(arguments)])


@functools.cache
def _nested(arguments: type) -> tuple[type | None, ...]:
    """For each field its own NamedTuple, or None."""
    hints = typing.get_type_hints(arguments)
    return tuple(kind if _is_named_tuple(kind := hints[field]) else None for field in arguments._fields)  # type: ignore[attr-defined]


def _flat_fields(arguments: type) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(arguments)
    for field in arguments._fields:  # type: ignore[attr-defined]
        if _is_named_tuple(hints[field]):
            yield from _flat_fields(hints[field])
        else:
            yield field, hints[field]


def _signature(arguments: type, implementation: Callable[..., Any]) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    fields = [*_flat_fields(arguments), ("formula", str)]
    returns = typing.get_type_hints(implementation)["return"]
    return inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in fields],
        return_annotation=returns,
    )
