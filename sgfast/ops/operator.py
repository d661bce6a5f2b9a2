"""Operators whose arguments are declared once, as a NamedTuple.

A registered operator (`torch.library.custom_op`) needs a flat signature four times: for its schema, its implementation,
its fake and its autograd formula. `define` makes the schema from a NamedTuple of the arguments and passes the tuple to
the implementation, the fake and the autograd formula. Gradients are returned by the arguments' names. A field may be a
NamedTuple itself: then its fields stand in the schema in its place.

Every operator has one more argument, ``formula``: a digest of this package's sources. torch.compile keeps compiled
graphs on the disk under a key that knows the forward call only, not the registered backward that the graph holds. With
the digest in the call, a graph that another version of sgfast compiled cannot match.
"""

import functools
import hashlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgfast._version import __version__


def _digest_of_sources() -> str:
    digest = hashlib.sha256(__version__.encode())  # all that a package without its sources has
    package = Path(__file__).parent.parent
    for path in sorted(path for folder in ("ops", "loss", "noise_layer") for path in (package / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# A digest that changes with the source of any operation. It is a constant of the module, so torch.compile can trace it.
FORMULA = _digest_of_sources()


class Operator:
    """A registered operator: call it with its arguments' tuple."""

    def __init__(self, name: str, arguments: type, implementation: Callable[..., Any], **registration: Any) -> None:
        """Register ``sgfast::name``; ``implementation`` takes an ``arguments`` and returns tensors."""
        self.name, self.implementation = name, implementation
        self._layout = _layout(arguments)
        self._names = [name for name, _ in self._layout.flat_fields]
        run = self._unpacked(implementation, checked=True)
        run.__signature__ = self._signature(implementation)  # type: ignore[attr-defined]
        self._operator = torch.library.custom_op(f"sgfast::{name}", run, **registration)

    def __call__(self, arguments: Any) -> Any:
        """Run the operator."""
        return self._operator(*self.flat(arguments))

    def flat(self, arguments: Any) -> tuple[Any, ...]:
        """Return the arguments in the order of the schema, and the digest."""
        return *self._layout.flatten(arguments), FORMULA

    @property
    def overload(self) -> Any:
        """Return the operator in the form that `torch.library.opcheck` and graphs use."""
        return getattr(torch.ops.sgfast, self.name).default

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``fake``, which makes outputs of the right shapes from the arguments' tuple of fake tensors."""
        self._operator.register_fake(self._unpacked(fake))
        return fake

    def register_gradients(
        self, setup: Callable[[Any, Any, Any], None], gradients: Callable[..., Mapping[str, Tensor | None]]
    ) -> None:
        """Give the backward formula.

        Args:
            setup: ``setup(ctx, arguments, output)`` keeps what backward needs, see `keep`.
            gradients: ``gradients(ctx, *upstream)`` returns gradients by the arguments' names. Arguments without a name
                there have no gradient. A gradient that nobody asked for (see `wanted`) is dropped.
        """

        names = frozenset(self._names)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, self._layout.pack(inputs), output)

        def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
            found = gradients(ctx, *upstream)
            unknown = found.keys() - names
            if unknown:
                raise RuntimeError(f"sgfast::{self.name} has no arguments {sorted(unknown)} that could have gradients")
            needed = zip(self._names, ctx.needs_input_grad, strict=False)  # PyTorch's tuple is longer
            return *(found.get(name) if needs else None for name, needs in needed), None

        self._operator.register_autograd(backward, setup_context=setup_context)

    def wanted(self, ctx: Any, *names: str) -> list[bool]:
        """In backward, say for each named argument whether its gradient is asked for."""
        needs = dict(zip(self._names, ctx.needs_input_grad, strict=False))
        return [bool(needs[name]) for name in names]

    def _signature(self, implementation: Callable[..., Any]) -> inspect.Signature:
        fields = [*self._layout.flat_fields, ("formula", str)]
        return inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                for name, kind in fields
            ],
            return_annotation=typing.get_type_hints(implementation)["return"],
        )

    def _unpacked(self, function: Callable[..., Any], checked: bool = False) -> Callable[..., Any]:
        """Turn a function of the arguments' tuple into a function of the flat arguments."""

        @functools.wraps(function)
        def run(*flat: Any, **named: Any) -> Any:
            if named:
                flat = (*flat, *(named[name] for name in (*self._names, "formula")[len(flat) :]))
            if checked and flat[-1] != FORMULA:
                raise RuntimeError(
                    f"this graph calls sgfast::{self.name} as another version of sgfast defined the operator "
                    f"(formula {flat[-1]}, here {FORMULA}): export or compile the graph again"
                )
            return function(self._layout.pack(flat))

        return run


def define(
    name: str, arguments: type, *, mutates_args: Sequence[str] = (), tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated function as the operator ``sgfast::name``, which writes to ``mutates_args`` alone."""
    return lambda implementation: Operator(name, arguments, implementation, mutates_args=mutates_args, tags=tags)


def keep(ctx: Any, *values: Any) -> None:
    """Keep tensors, argument tuples and constants for backward, which gets them back from `kept`."""
    kinds: list[Any] = [type(value) for value in values]
    ctx.layouts = [_layout(kind) if _is_named_tuple(kind) else None for kind in kinds]
    pairs = zip(values, ctx.layouts, strict=True)
    leaves = [leaf for value, layout in pairs for leaf in (layout.flatten(value) if layout else (value,))]
    ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
    ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def kept(ctx: Any) -> list[Any]:
    """Return the values that `keep` was given."""
    pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
    leaves = [constant if tensor is None else tensor for tensor, constant in pairs]
    values, place = [], 0
    for layout in ctx.layouts:
        values.append(layout.pack(leaves, place) if layout else leaves[place])
        place += layout.size if layout else 1
    return values


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


class _Layout:
    """Places of the fields of a NamedTuple, nested ones included, in a flat sequence."""

    def __init__(self, arguments: Any) -> None:
        hints = typing.get_type_hints(arguments)
        named = [(field, hints[field]) for field in arguments._fields]
        nested = [_layout(hint) if _is_named_tuple(hint) else None for _, hint in named]
        self._make = arguments._make
        # Every call packs and flattens several times. A tuple without nested tuples is therefore copied at once.
        self._nested = nested if any(nested) else None
        #: Names and types.
        self.flat_fields: list[tuple[str, Any]] = []
        for field, layout in zip(named, nested, strict=True):
            self.flat_fields += layout.flat_fields if layout else [field]
        self.size = len(self.flat_fields)

    def flatten(self, arguments: tuple[Any, ...]) -> Sequence[Any]:
        """Return the fields as one flat sequence."""
        if self._nested is None:
            return arguments
        flat: list[Any] = []
        for value, layout in zip(arguments, self._nested, strict=True):
            flat += layout.flatten(value) if layout else (value,)
        return flat

    def pack(self, flat: Sequence[Any], place: int = 0) -> Any:
        """Return the tuple whose first field is at ``place``."""
        if self._nested is None:
            return self._make(flat[place : place + self.size])
        values = []
        for layout in self._nested:
            values.append(layout.pack(flat, place) if layout else flat[place])
            place += layout.size if layout else 1
        return self._make(values)


@functools.cache
def _layout(arguments: Any) -> _Layout:
    return _Layout(arguments)
