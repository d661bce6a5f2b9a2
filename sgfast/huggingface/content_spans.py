"""Where a chat template put the contents of the messages it rendered.

Masks over tokens need to know where in the rendered text each message's content went, and templates strip, reorder,
repeat and drop contents as they like. Searching the text for a content would confuse it with template words and with
other messages, so the template itself is asked:

1. Render the chat, and render it again with every content replaced by a character of its own that occurs nowhere
   else. Cut at those characters, the second rendering gives the template's literal pieces in their order. If pieces
   and contents, put together, give the first rendering again, every span is known exactly.
2. Otherwise the template edits some content (most often it strips white space). Then each message is replaced alone:
   what its replacement changes, between the common beginning and the common end of the two renderings, is its span.
   For stripped contents this is exact. For a template that rewrites a content, or decides by it what else to print,
   it is the shortest single stretch that holds all that depends on the content: too much rather than too little.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Characters that no text needs: the two private use planes.
_PLACEHOLDERS = range(0xF0000, 0x110000)


class Rendering(NamedTuple):
    """A chat's text and, for each message, the character ranges of its content (none if the template dropped it)."""

    text: str
    spans: list[list[tuple[int, int]]]


def locate_contents(render: Callable[[Sequence[str]], str], contents: Sequence[str]) -> Rendering:
    """Render a chat and find each content.

    Args:
        render: renders the chat with these contents in place of its own, one for each message.
        contents: the chat's own contents.
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
            # What has no visible characters cannot fill a stretch that has: the template put something else there.
            other_text = not contents[index].strip() and text[start:end].strip()
            spans.append([(start, start if other_text else end)])
    return Rendering(text, spans)


def _fit(text: str, pattern: str, contents: Mapping[str, str]) -> list[list[tuple[int, int]]] | None:
    """Where each placeholder's content lies in ``text``, if filling the placeholders of ``pattern`` gives ``text``."""
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
    """The stretch of ``text`` between what both begin with and what both end with."""
    start = _common_prefix_length(text, other)
    return start, len(text) - _common_prefix_length(text[start:][::-1], other[start:][::-1])


def _common_prefix_length(a: str, b: str) -> int:
    """By halving: comparing slices is much faster than comparing characters one by one."""
    equal, limit = 0, min(len(a), len(b))
    while equal < limit:
        middle = (equal + limit + 1) // 2
        if a[equal:middle] == b[equal:middle]:
            equal = middle
        else:
            limit = middle - 1
    return equal


def overlapping_tokens(offsets: Tensor, start: int, end: int) -> Tensor:
    """Return (T,) bool: which tokens share a character with [start, end).

    Args:
        offsets: (T, 2), each token's characters; a token without any stands for the character it precedes.
        start: first character.
        end: one past the last.
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
