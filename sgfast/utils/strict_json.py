"""Parser of untrusted JSON that refuses duplicate keys and NaN, and whose memory is bounded by the size of the text."""

import json
import re
from typing import Any

# Most characters of a document outside its strings. After parsing, a byte of text inside a string takes a few bytes of
# memory, and a byte outside takes up to thirty (in lists of empty lists).
_LARGEST_STRUCTURE = 2**20
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


def loads(text: str, *, largest_structure: int = _LARGEST_STRUCTURE, allow_nan: bool = False) -> Any:
    r"""Parse a JSON text.

    Args:
        text: a text with one JSON value.
        largest_structure: the most characters that the text may have outside strings.
        allow_nan: accept ``NaN``, ``Infinity`` and ``-Infinity``. JSON does not have these values, but Python writes
            them.

    Raises:
        ValueError: the text is not JSON, has a key twice in one object, NaN or an infinity, is nested too deeply, or
            has more than ``largest_structure`` characters outside strings.

    Example:
        >>> loads('{"a": [1, "\\u00e9"]}')
        {'a': [1, 'é']}
        >>> loads('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' occurs twice
    """
    structure = len(text)
    if structure > largest_structure:
        for string in _STRING.finditer(text):
            structure -= string.end() - string.start()
    if structure > largest_structure:
        raise ValueError(
            f"{structure} characters of JSON outside strings are more than the {largest_structure} allowed"
        )
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=float if allow_nan else _refused)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:100]!r} occurs twice")
        result[key] = value
    return result


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
