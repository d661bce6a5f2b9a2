"""Check that the time of an untrusted regular expression is bounded, before the expression runs.

A backtracking matcher takes exponential time on ``(a+)+b``. On ``(a{999}){999}`` the memory grows with the product of
the counts. This module therefore parses a pattern first and allows only parts whose cost has a bound: literals,
classes, groups, alternatives, lookarounds and quantifiers. References to groups are refused, and so are repetitions of
a part that matches in more than one way. The patterns of published tokenizers need no more.
"""

import re
from typing import NamedTuple

# Patterns of published tokenizers have 300 characters, match in 20 ways, and pass over the text once.
_LONGEST = 10_000
_MOST_WAYS = 256
_LARGEST_SIZE = 2**14
_DEEPEST = 30
# A counted repetition with more choices than this costs like an unbounded one.
_MOST_COUNTED = 8

_COUNT = re.compile(r"\{(\d{1,6})?(,)?(\d{1,6})?\}")
_GROUP = re.compile(r"\((?:\?(?::|=|!|<=|<!|>|[imsx-]{1,8}:))?")
_FLAGS = re.compile(r"\(\?[ims-]{1,8}\)")
_PROPERTY = re.compile(r"\\[pP]\{\^?[A-Za-z0-9_ &=-]{1,64}\}")
_HEXADECIMAL = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]{1,6}\}|u[0-9A-Fa-f]{4})")
_POSIX = re.compile(r"\[:\^?[a-z]{1,10}:\]")
_CHARACTERS, _PLACES = "sSdDwWhHrntfv", "bBAzZ"


class _Part(NamedTuple):
    """Properties of a part of a pattern."""

    # The fewest characters that the part matches.
    width: int = 0
    # The number of ways to match, without repetitions.
    ways: int = 1
    # The number of characters and classes after all counts are written out.
    size: int = 0
    # The depth of nested loops over the text inside the part.
    loops: int = 0
    # The depth of nested loops if a later part of the pattern can fail.
    open_loops: int = 0
    can_fail: bool = False


def check_pattern(pattern: str, where: str, *, most_loops: int = 1) -> int:
    r"""Check that a pattern's time is bounded, and return the fewest characters that the pattern matches.

    Args:
        pattern: a regular expression in the syntax that Oniguruma and Python share.
        where: name of the pattern in errors.
        most_loops: the largest depth of nested passes over the text, for each place where a match may begin: 1 allows
            ``a*b``, 2 allows ``a*b*c``.

    Raises:
        ValueError: the time or the memory of the pattern exceeds the bounds, or the pattern has an unknown part.

    Example:
        >>> check_pattern(r" ?\p{L}+|\s+(?!\S)", "pattern")
        1
        >>> check_pattern("(a+)+b", "pattern")
        Traceback (most recent call last):
        ...
        ValueError: pattern repeats something that matches in more than one way (at character 5): '(a+)+b'
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"{where} has {len(pattern)} characters; allowed are {_LONGEST}")
    reader = _Reader(pattern, where)
    part = reader.alternatives(0)
    if reader.position < len(pattern):
        reader.refuse("has a bracket too many")
    if part.loops > most_loops:
        reader.refuse("passes over the text too often")
    return part.width


class _Reader:
    def __init__(self, pattern: str, where: str) -> None:
        self.pattern, self.where, self.position = pattern, where, 0

    def refuse(self, fault: str) -> None:
        raise ValueError(f"{self.where} {fault} (at character {self.position}): {self.pattern[:60]!r}")

    def alternatives(self, depth: int) -> _Part:
        if depth > _DEEPEST:
            self.refuse("is nested too deeply")
        parts = [self.sequence(depth)]
        while self.pattern.startswith("|", self.position):
            self.position += 1
            parts.append(self.sequence(depth))
        return self.checked(
            _Part(
                width=min(part.width for part in parts),
                ways=sum(part.ways for part in parts),
                size=sum(part.size for part in parts),
                loops=max(part.loops for part in parts),
                open_loops=max(part.open_loops for part in parts),
                can_fail=all(part.can_fail for part in parts),
            )
        )

    def sequence(self, depth: int) -> _Part:
        parts: list[_Part] = []
        while self.position < len(self.pattern) and self.pattern[self.position] not in "|)":
            parts.append(self.quantified(depth))
        whole = _Part()
        for part in reversed(parts):
            whole = self.checked(
                _Part(
                    width=whole.width + part.width,
                    ways=whole.ways * part.ways,
                    size=whole.size + part.size,
                    # If a later part can fail, the matcher tries each choice of a loop.
                    loops=whole.loops + (part.open_loops if whole.can_fail else part.loops),
                    open_loops=whole.open_loops + part.open_loops,
                    can_fail=whole.can_fail or part.can_fail,
                )
            )
        return whole

    def quantified(self, depth: int) -> _Part:
        part = self.single(depth)
        while (counts := self.counts()) is not None:
            part = self.checked(self.repeated(part, *counts))
        return part

    def counts(self) -> tuple[int, int | None] | None:
        """Read a quantifier and return its least and greatest count (None: unlimited); None if none follows."""
        character = self.pattern[self.position : self.position + 1]
        count = _COUNT.match(self.pattern, self.position)
        if character and character in "*+?":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
            self.position += 1
        elif count is not None and (count[1] or count[3]):
            least = int(count[1] or 0)
            most = least if count[2] is None else int(count[3]) if count[3] else None
            self.position = count.end()
        else:
            return None
        # A lazy or possessive mark adds no work. After a count, a plus sign is another quantifier.
        if self.pattern.startswith(("?",) if character == "{" else ("?", "+"), self.position):
            self.position += 1
        return least, most

    def repeated(self, part: _Part, least: int, most: int | None) -> _Part:
        size = part.size * max(least, most or 1, 1)
        can_fail = part.can_fail and least > 0
        if most is None or most - least > _MOST_COUNTED:
            if part.ways > 1 or part.open_loops or part.width == 0:
                self.refuse("repeats something that matches in more than one way")
            return _Part(part.width * least, 1, size, part.loops, 1, can_fail)
        if most < least:
            self.refuse("has a count whose end is below its start")
        ways = min(sum(min(part.ways, _MOST_WAYS) ** number for number in range(least, most + 1)), 2 * _MOST_WAYS)
        return _Part(part.width * least, ways, size, part.loops * most, part.open_loops * most, can_fail)

    def single(self, depth: int) -> _Part:
        character = self.pattern[self.position]
        if character == "(":
            return self.group(depth)
        if character == "[":
            self.character_class()
        elif character == "\\":
            return self.escape()
        elif character in "^$":
            self.position += 1
            return _Part(can_fail=True)
        elif character in "*+?":
            self.refuse("has a quantifier of nothing")
        else:
            self.position += 1
        return _Part(width=1, size=1, can_fail=True)

    def group(self, depth: int) -> _Part:
        if flags := _FLAGS.match(self.pattern, self.position):
            self.position = flags.end()
            return _Part()
        opening = _GROUP.match(self.pattern, self.position)
        assert opening is not None
        if "x" in opening[0] or self.pattern.startswith("?", opening.end()):
            self.refuse("has a group of a kind that is not allowed")
        self.position = opening.end()
        part = self.alternatives(depth + 1)
        if not self.pattern.startswith(")", self.position):
            self.refuse("has a bracket that is not closed")
        self.position += 1
        if opening[0] in ("(?=", "(?!", "(?<=", "(?<!"):
            return part._replace(width=0, open_loops=part.loops, can_fail=True)
        return part

    def escape(self) -> _Part:
        for known in (_PROPERTY, _HEXADECIMAL):
            if found := known.match(self.pattern, self.position):
                self.position = found.end()
                return _Part(width=1, size=1, can_fail=True)
        character = self.pattern[self.position + 1 : self.position + 2]
        if not character or (character.isalnum() and character not in _CHARACTERS + _PLACES):
            self.refuse("has an escape that is not allowed")
        self.position += 2
        return _Part(can_fail=True) if character in _PLACES else _Part(width=1, size=1, can_fail=True)

    def character_class(self) -> None:
        """Skip a class ``[…]``, in which brackets may nest."""
        depth, start = 0, self.position
        while self.position < len(self.pattern):
            character = self.pattern[self.position]
            if posix := _POSIX.match(self.pattern, self.position):
                self.position = posix.end()
                continue
            if character == "\\":
                self.escape()
                continue
            self.position += 1
            if character == "[":
                depth += 1
                if self.pattern.startswith("^", self.position):
                    self.position += 1
                if self.pattern.startswith("]", self.position):  # a bracket that comes first is a character
                    self.position += 1
            elif character == "]":
                depth -= 1
                if depth == 0:
                    return
            if depth > _DEEPEST:
                self.refuse("is nested too deeply")
        self.position = start
        self.refuse("has a class that is not closed")

    def checked(self, part: _Part) -> _Part:
        if part.ways > _MOST_WAYS:
            self.refuse(f"matches in more than {_MOST_WAYS} ways")
        if part.size > _LARGEST_SIZE:
            self.refuse(f"has more than {_LARGEST_SIZE} characters once its counts are written out")
        return part
