"""Location of message contents in a chat that a template has rendered.

Masks over tokens need the place of each message's content in the rendered text. Templates may strip, reorder, repeat
and drop contents. A search for a content in the text could find template words or another message instead. This module
therefore compares renderings of the template:

1. The chat is rendered twice: once with its contents, and once with every content replaced by a character of its own
   that occurs nowhere else. The second rendering, cut at these characters, gives the template's literal pieces in
   order. If pieces and contents together give the first rendering, every span is known exactly.
2. Otherwise the template edits some content (most templates that do so strip white space). Each message is then
   replaced alone. The span of the message is the stretch between the common beginning and the common end of the two
   renderings. The span is exact if the template strips the content. If the template rewrites the content, or prints
   other text that depends on the content, the span is the shortest single stretch that holds everything that depends
   on the content. The span can then be too long, but never too short.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Characters that texts do not use: the two private use planes.
_PLACEHOLDERS = range(0xF0000, 0x110000)


class Rendering(NamedTuple):
    """Text of a chat, and the character ranges of each message's content (no range if the template dropped it)."""

    text: str
    spans: list[list[tuple[int, int]]]


def locate_contents(render: Callable[[Sequence[str]], str], contents: Sequence[str]) -> Rendering:
    """Render a chat and find each content.

    Args:
        render: a function that renders the chat with the given contents, one for each message.
        contents: the contents of the chat.
    """
    text = render(contents)
    taken = set(text).union(*contents)
    unused = (character for character in map(chr, _PLACEHOLDERS) if character not in taken)
    placeholders = list(itertools.islice(unused, len(contents)))
    spans = _fit(text, render(placeholders), dict(zip(placeholders, contents, strict=True)))
    if spans is None:
        spans = []
        for index, placeholder in enumerate(placeholders):
            other = render([*contents[:index], placeholder, *contents[index + 1 :]])
            start, end = _changed_span(text, other)
            # A content without visible characters cannot fill a stretch with visible ones: the template wrote that.
            other_text = not contents[index].strip() and text[start:end].strip()
            spans.append([(start, start if other_text else end)])
    return Rendering(text, spans)


def _fit(text: str, pattern: str, contents: Mapping[str, str]) -> list[list[tuple[int, int]]] | None:
    """Return the spans of each placeholder's content in ``text``, or None if the filled ``pattern`` is another text."""
    spans: dict[str, list[tuple[int, int]]] = {placeholder: [] for placeholder in contents}
    position = 0
    for piece in re.split(f"([{''.join(contents)}])", pattern):
        expected = contents.get(piece, piece)
        if not text.startswith(expected, position):
            return None
        end = position + len(expected)
        if piece in contents:
            spans[piece].append((position, end))
        position = end
    return list(spans.values()) if position == len(text) else None


def _changed_span(text: str, other: str) -> tuple[int, int]:
    """Return the stretch of ``text`` between the common beginning and the common end of both texts."""
    start = _common_prefix_length(text, other)
    return start, len(text) - _common_prefix_length(text[start:][::-1], other[start:][::-1])


def _common_prefix_length(a: str, b: str) -> int:
    """Return the length of the common beginning, by bisection: slices compare faster than single characters."""
    equal, limit = 0, min(len(a), len(b))
    while equal < limit:
        middle = (equal + limit + 1) // 2
        if a[equal:middle] == b[equal:middle]:
            equal = middle
        else:
            limit = middle - 1
    return equal


def overlapping_tokens(offsets: Tensor, start: int, end: int) -> Tensor:
    """Return a mask (T,) bool of the tokens that share a character with [start, end).

    Args:
        offsets: (T, 2), the character range of each token. A token with an empty range stands for the next character.
        start: first character.
        end: one past the last character.
    """
    if start == end:
        return torch.zeros(len(offsets), dtype=torch.bool)
    starts, ends = offsets.unbind(-1)
    return (starts < end) & (ends.maximum(starts + 1) > start)


def skip_white_space(text: str, position: int) -> int:
    """Return the position of the first visible character at or after ``position``, or the end."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position
