"""Records of a text or JSONL file, read one at a time, so that files may have any size.

A JSONL file (``.jsonl``, ``.ndjson`` or ``.json``) has one JSON object on each line: ``{"text": "…"}`` or
``{"messages": [{"role": …, "content": …}, …]}``, optionally with a key ``"id"`` that becomes the record's key. Any
other file is plain text, with one record for each line or, on request, for each paragraph. Files are UTF-8, and blank
lines are skipped. Errors name the file and the line. They never show a text, because texts may be private.
"""

import hashlib
import io
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from sgfast.ops.validation import check_choice, did_you_mean
from sgfast.utils import strict_json
from sgfast.utils.input_files import open_regular

TextUnit = Literal["line", "paragraph"]
TEXT_UNITS: tuple[TextUnit, ...] = ("line", "paragraph")
# Treatment of a text: as the message of a user, or without a chat template.
TextAs = Literal["message", "plain"]
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ROLES = ("system", "user", "assistant")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# In bytes: enough for millions of tokens. A file without line ends would otherwise be one record of the file's size.
_LARGEST_RECORD = 2**24


class Record(NamedTuple):
    """Record of a file: its key, its first line (counted from 1), and either a text or the messages of a chat."""

    key: str
    line: int
    text: str | None
    messages: list[dict[str, str]] | None


class RecordError(ValueError):
    """Error of a file of records that cannot be read. The message names the file and, if there is one, the line."""


class _Lines(NamedTuple):
    """Bytes of one record, and their place in the file."""

    line: int
    start: int
    content: bytes


def read_records(path: str | os.PathLike[str], *, text_unit: TextUnit = "line") -> Iterator[Record]:
    """Read a file record by record. Only one record at a time is in memory.

    Args:
        path: a JSONL file, recognized by its suffix, or a text file.
        text_unit: unit of a record in a text file: ``"line"``, or ``"paragraph"`` for lines up to a blank line. JSONL
            files ignore this argument.

    Yields:
        Records in the order of the file. The key is the ``id`` of a JSONL record (a string or an integer), or the
        number of the line.

    Raises:
        RecordError: during iteration. The file does not exist, is not readable, is not a regular file (for example, a
            pipe), or has no records; a record has more than 16 MiB or bytes that are not UTF-8; a line is not a JSON
            object; an object has a key twice, or both or neither of ``text`` and ``messages``; a value has the wrong
            type; ``text`` is empty; a message lacks role or content.
        ValueError: ``text_unit`` is unknown.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "data.jsonl"
        >>> _ = path.write_text('{"text": "good day", "id": "a"}\\n{"messages": [{"role": "user", "content": "hi"}]}')
        >>> for record in read_records(path):
        ...     print(record.key, record.text, record.messages)
        a good day None
        2 None [{'role': 'user', 'content': 'hi'}]
    """
    source, unit = Path(path), _checked_unit(text_unit)
    return (_parse(source, lines) for lines in _each(source, unit))


class IndexedRecords(Sequence[Record]):
    """Sequence of a file's records, for training in any order.

    The constructor reads the whole file once and checks every record. Only the places of the records stay in memory
    (24 bytes for each record); indexing reads a record from the file again.

    Args:
        path: as in `read_records`.
        text_unit: as in `read_records`.

    Raises:
        RecordError: as in `read_records`. Indexing also raises this error if the file has changed and a record cannot
            be read.
        ValueError: ``text_unit`` is unknown.
    """

    def __init__(self, path: str | os.PathLike[str], *, text_unit: TextUnit = "line") -> None:
        self.path = Path(path)
        self._starts, self._lengths, self._lines = array("Q"), array("Q"), array("Q")
        for lines in _each(self.path, _checked_unit(text_unit)):
            _parse(self.path, lines)
            self._starts.append(lines.start)
            self._lengths.append(len(lines.content))
            self._lines.append(lines.line)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        # Each access opens the file, because parallel data loaders must not share a file's position.
        with _opened(self.path) as file:
            file.seek(self._starts[index])
            content = file.read(self._lengths[index])
        return _parse(self.path, _Lines(self._lines[index], self._starts[index], content))


class TextRecords(Sequence[Record]):
    """Sequence of the records of texts in memory, for training in any order. Messages name them by ``path``."""

    def __init__(self, texts: Sequence[str], path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return Record(str(index), index + 1, self._texts[index], None)


def data_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal. A resumed run uses the digest to recognize its data.

    Raises:
        RecordError: the file does not exist or is not readable.
    """
    with _opened(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked_unit(text_unit: TextUnit) -> TextUnit:
    check_choice("text_unit", text_unit, TEXT_UNITS)
    return text_unit


def _is_json(path: Path) -> bool:
    return path.suffix.lower() in _JSON_SUFFIXES


def _opened(path: Path) -> io.BufferedReader:
    try:
        return open_regular(path, wanted="text or JSONL file")
    except ValueError as error:
        raise RecordError(str(error)) from error


def _each(path: Path, text_unit: TextUnit) -> Iterator[_Lines]:
    """Yield the bytes of every record. A file without records is an error."""
    empty = True
    with _opened(path) as file:
        lines = _numbered_lines(path, file)
        for one in lines if _is_json(path) or text_unit == "line" else _paragraphs(path, lines):
            if one.content.strip():
                empty = False
                yield one
    if empty:
        raise RecordError(f"{path} holds no records")


def _numbered_lines(path: Path, file: io.BufferedReader) -> Iterator[_Lines]:
    start = 0
    for line, content in enumerate(iter(lambda: file.readline(_LARGEST_RECORD + 1), b""), start=1):
        length = len(content)
        if length > _LARGEST_RECORD:
            raise RecordError(f"{path}, line {line}: the line is longer than {_LARGEST_RECORD} bytes")
        if line == 1 and content.startswith(_BYTE_ORDER_MARK):
            content, start = content.removeprefix(_BYTE_ORDER_MARK), len(_BYTE_ORDER_MARK)
            length -= len(_BYTE_ORDER_MARK)
        yield _Lines(line, start, content)
        start += length


def _paragraphs(path: Path, lines: Iterable[_Lines]) -> Iterator[_Lines]:
    first: _Lines | None = None
    parts: list[bytes] = []
    size = 0
    for one in lines:
        if one.content.strip():
            first = first or one
            parts.append(one.content)
            size = size + len(one.content)
            if size > _LARGEST_RECORD:
                raise RecordError(f"{path}, line {first.line}: the paragraph is longer than {_LARGEST_RECORD} bytes")
        elif first is not None:
            yield first._replace(content=b"".join(parts))
            first, parts, size = None, [], 0
    if first is not None:
        yield first._replace(content=b"".join(parts))


def _parse(path: Path, lines: _Lines) -> Record:
    try:
        text = lines.content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = lines.line + lines.content.count(b"\n", 0, error.start)
        raise RecordError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error
    if not _is_json(path):
        return Record(str(lines.line), lines.line, text.strip("\r\n"), None)
    try:
        return _json_record(text, lines.line)
    except _MalformedError as error:
        raise RecordError(f"{path}, line {lines.line}: {error}") from error


class _MalformedError(Exception):
    """Error of a line; `_parse` adds the file and the line's number."""


def _json_record(text: str, line: int) -> Record:
    try:
        values = strict_json.loads(text.rstrip("\r\n"), allow_nan=True)  # other keys may hold NaN, as Python writes it
    except ValueError as error:
        reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise _MalformedError(f"not JSON: {reason}") from error
    if not isinstance(values, dict):
        raise _MalformedError(f'must be a JSON object with the key "text" or "messages"; got {_named_type(values)}')
    if ("text" in values) == ("messages" in values):
        both = "both" if "text" in values else "neither"
        raise _MalformedError(f'must have one of the keys "text" and "messages"; it has {both}')
    key = values.get("id", line)
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise _MalformedError(f'"id" must be a string or an integer; got {_named_type(key)}')
    key = _checked_string(str(key), '"id"')
    if "messages" in values:
        return Record(key, line, None, _checked_messages(values["messages"]))
    content = _checked_string(values["text"], '"text"')
    if not content.strip():
        raise _MalformedError('"text" is empty')
    return Record(key, line, content, None)


def _checked_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        raise _MalformedError(f'"messages" must be a list; got {_named_type(messages)}')
    if not messages:
        raise _MalformedError('"messages" is empty')
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise _MalformedError(f"{where} must be an object; got {_named_type(message)}")
        if message.keys() != {"role", "content"}:
            # Text under another key could reach the chat template, where no mask would cover it.
            raise _MalformedError(f'{where} must have the keys "role" and "content" and no other')
        _checked_string(message["content"], f'{where}: "content"')
        if message["role"] not in _ROLES:
            suggestion = did_you_mean(message["role"], _ROLES)
            raise _MalformedError(f'{where}: "role" must be one of {", ".join(_ROLES)}{suggestion}')
    return messages


def _checked_string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _MalformedError(f"{where} must be a string; got {_named_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, which is not a character
        raise _MalformedError(f"{where} is not Unicode text ({error.reason})") from error
    return value


def _named_type(value: Any) -> str:
    """Return JSON's name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
