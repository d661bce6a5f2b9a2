"""Rendering of untrusted chat templates in bounded time and memory.

The sandbox of transformers protects the machine from a template, but a template can still run for ever: ``{% for %}``
loops nest, ``x ~ x`` doubles a text, ``'x'.center(10**9)`` takes a gigabyte in one call. This module renders in the
same environment (the same filters, globals and settings) with a budget. Loops, calls, joined strings, lists and output
spend from the budget before their memory is taken. The budget grows with the chat, so long chats do not fail.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, cast

from jinja2 import Template, nodes
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# One unit stands for about one written character or one executed node. The whole budget lasts one to two seconds.
_UNITS, _UNITS_PER_CHARACTER, _UNITS_PER_MESSAGE = 2**22, 64, 2**14
_CALL, _ENTRY = 48, 4
_LARGEST_NUMBER, _MOST_BITS = 10**6, 10**4
# Chat templates do not use these filters. The sizes of their inputs and outputs do not bound their time.
_LEFT_OUT_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_LEFT_OUT_GLOBALS = ("lipsum",)
_PADDING = ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "truncate", "zfill")
_FORMATTING = ("format", "format_map")

_left: ContextVar[int] = ContextVar("units that are left of the budget")


class TemplateBudgetError(ValueError):
    """Error of a template that needs more time or memory than its budget allows."""


def render_bounded(template: str, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
    """Render a chat as transformers would, within a budget.

    Raises:
        TemplateBudgetError: the template takes too long or writes too much.
        Exception: any other error that the template raises.
    """
    compiled = compiled_bounded(template)
    characters = sum(len(value) for message in messages for value in message.values())
    token = _left.set(_UNITS + _UNITS_PER_CHARACTER * characters + _UNITS_PER_MESSAGE * len(messages))
    try:
        return compiled.render(messages=messages, tools=None, documents=None, **variables)
    finally:
        _left.reset(token)


@lru_cache(maxsize=8)
def compiled_bounded(template: str) -> Template:
    """Compile a template for bounded rendering.

    Raises:
        jinja2.TemplateSyntaxError: the text is not a valid template.
        RecursionError: the template is nested too deeply.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _BoundedEnvironment.__new__(_BoundedEnvironment)
    vars(environment).update(vars(_compile_jinja_template("").environment))
    environment.filters = {
        name: _bounded_filter(name, function)
        for name, function in environment.filters.items()
        if name not in _LEFT_OUT_FILTERS
    }
    environment.globals = {name: value for name, value in environment.globals.items() if name not in _LEFT_OUT_GLOBALS}
    environment.finalize = _written
    environment.cache = None
    return environment.from_string(template)


def _spend(units: int) -> None:
    left = _left.get(_UNITS) - units
    if left < 0:
        raise TemplateBudgetError("it takes too long, or writes too much")
    _left.set(left)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with a budget for every operation whose cost depends on its operands."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _generate(self, source: nodes.Template, *arguments: Any, **keywords: Any) -> Any:
        source = cast(nodes.Template, _Counting().visit(source))
        self.size = sum(1 for _ in source.find_all(nodes.Node))
        return super()._generate(source, *arguments, **keywords)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "%" and isinstance(left, str):
            _check_format(left, _numbers_in((right,)))
        elif operator == "**":
            _spend(_power_bits(left, right))
        elif operator == "*" and not numbers:
            repeated, times = (left, right) if isinstance(right, int) else (right, left)
            _spend(_size(repeated) * abs(times if isinstance(times, int) else 1))
        elif operator == "*":
            _check_bits(left, right)
        elif operator == "+" and not numbers:
            _spend(_size(left) + _size(right))
        return _measured(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *arguments: Any, **keywords: Any) -> Any:
        # The body of a macro runs at each call, for any arguments.
        _spend(2 * self.size + 2 * _CALL if isinstance(function, Macro) else _CALL)
        # The sandbox has wrapped ``format`` in another function.
        method = getattr(function, "__wrapped__", function)
        name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | list | tuple | dict):
            arguments = _checked_call(name, (owner, *arguments), keywords)[1:]
        else:
            arguments = _checked_call("", arguments, keywords)
        return _measured(super().call(context, function, *arguments, **keywords))

    def concat(self, pieces: Iterable[str]) -> str:
        return "".join(_paid(pieces))

    def joined(self, *pieces: Any) -> str:
        """Return the result of the operator ``~``."""
        return "".join(_paid(str(_written(piece)) for piece in pieces))

    def measured(self, value: Any) -> Any:
        """Pay for a new list, tuple, dictionary or slice, and return it."""
        return _measured(value)

    def counted(self, values: Iterable[Any], cost: int) -> Iterator[Any]:
        """Yield the values of a loop, and pay ``cost`` (the nodes of its body) for each."""
        for value in values:
            _spend(_CALL + cost)
            yield value


class _Counting(NodeTransformer):
    """Transformer that inserts calls of the environment's counting functions into a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - the name is jinja2's
        cost = sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        node.iter = _call("counted", cast(nodes.Expr, node.iter), nodes.Const(cost))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("measured", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("measured", node) if node.ctx == "load" else node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("measured", node)

    visit_Dict = visit_List  # noqa: N815


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    line = arguments[0].lineno
    call = nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), list(arguments), [], None, None, lineno=line)
    call.environment = arguments[0].environment
    return call


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)  # keeps the mark of a filter that takes the context
    def bounded(*arguments: Any, **keywords: Any) -> Any:
        _spend(_CALL)
        values = _checked_call(name, arguments[passed:], keywords)
        return _measured(function(*arguments[:passed], *values, **keywords))

    return bounded


def _checked_call(name: str, values: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """Pay for a call before it is made, and return the values to call with."""
    everything = (*values, *keywords.values())
    numbers = _numbers_in(everything)
    if max(numbers, default=0) > _LARGEST_NUMBER:
        raise TemplateBudgetError(f"it calls {name or 'a function'} with a number above {_LARGEST_NUMBER}")
    _spend(sum(map(_size, everything)))
    text = values[0] if values and isinstance(values[0], str) else ""
    if name in _FORMATTING:
        _check_format(text, numbers)
    elif name in _PADDING:
        breaks = text.count("\n") + text.count("\t")
        _spend((1 + breaks + (_weight(values[0]) if name == "tojson" else 0)) * max(numbers, default=1))
    elif name == "replace" and len(values) > 2 and all(isinstance(value, str) for value in values[:3]):
        _spend(text.count(values[1]) * len(values[2]))
    elif name == "translate" and len(values) > 1 and isinstance(values[1], Mapping):
        _spend(len(text) * max((_size(value) for value in values[1].values()), default=1))
    elif name in ("string", "tojson", "urlencode", "escape", "e") and values:
        _spend(_weight(values[0]))
    elif name == "join" and values:
        return _paid_join(values, keywords)
    return values


def _paid_join(values: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """Pay for ``text.join(pieces)`` or ``pieces | join(text)`` piece by piece: a generator may make the pieces."""
    method = isinstance(values[0], str) and len(values) > 1 and not isinstance(values[1], str)
    position = 1 if method else 0
    between = values[0] if method else keywords.get("d", values[1] if len(values) > 1 else "")

    def pieces() -> Iterator[Any]:
        for piece in values[position]:
            _spend(_weight(piece) + _size(between) + 1)
            yield piece

    return (*values[:position], pieces(), *values[position + 1 :])


def _paid(pieces: Iterable[str]) -> Iterator[str]:
    for piece in pieces:
        _spend(len(piece) + 1)
        yield piece


def _written(value: Any) -> Any:
    """Pay for a value that is about to become text, and return it."""
    if not isinstance(value, str):
        _spend(_weight(value))
    return value


def _measured(value: Any) -> Any:
    if isinstance(value, str | bytes):
        _spend(len(value))
    elif isinstance(value, list | tuple | dict):
        _spend(_weight(value))
    return value


def _size(value: Any) -> int:
    """Return how many characters or entries a copy of a value has."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _weight(value: Any) -> int:
    """Return about how many characters a value has as text. Counting ends when the budget is exceeded.

    A part that occurs several times counts each time.
    """
    limit, total, waiting = _left.get(_UNITS), 0, [value]
    while waiting and total <= limit:
        one = waiting.pop()
        total += _ENTRY
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, int):
            total += one.bit_length() // 3
    return total


def _numbers_in(values: Iterable[Any]) -> list[int]:
    """Return the magnitudes of the integers among values and one level inside them."""
    found = []
    for value in values:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        found += [abs(one) for one in inner if isinstance(one, int)]
    return found


def _check_format(text: str, numbers: Iterable[int]) -> None:
    """Pay for the most that a format may write. Its widths stand in the text or among the numbers."""
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    takes_numbers = "*" in text or re.search(r"\{[^{}]*\{", text) is not None
    widest = max([1, *widths, *(numbers if takes_numbers else ())])
    _spend(len(text) + (text.count("%") + text.count("{")) * widest)


def _power_bits(base: Any, exponent: Any) -> int:
    if isinstance(base, int) and isinstance(exponent, int):
        bits = max(1, base.bit_length()) * max(1, abs(exponent))
        if bits > _MOST_BITS:
            raise TemplateBudgetError("it computes with numbers of thousands of digits")
    return 1


def _check_bits(*factors: Any) -> None:
    if sum(factor.bit_length() for factor in factors if isinstance(factor, int)) > _MOST_BITS:
        raise TemplateBudgetError("it computes with numbers of thousands of digits")
