"""The client file: safetensors, with a JSON description and a checksum. ``docs/client_file.md`` describes the format.

The reader trusts nothing in the file. It compares every size with the file's size before it allocates memory of that
size. The checksum covers each byte, so that a damaged file never loads. Nothing is unpickled, imported or opened by
name.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

from sgfast.utils import strict_json
from sgfast.utils.files import replacing
from sgfast.utils.input_files import check_path, open_regular
from sgfast.utils.tensor_stream import write_tensors

FORMAT = "sgfast text transform"
FORMAT_VERSION = 1
# The limit of the format safetensors itself.
_LARGEST_HEADER = 100_000_000
_METADATA = ("format", "format_version", "content", "sha256")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_DIMENSIONS = 8
# The checksum is computed while zeros stand in its place.
_BLANK = "0" * 64
_CHUNK = 2**20
_Result = TypeVar("_Result")


class _Entry(NamedTuple):
    """The place of a tensor according to the header, in bytes from the header's end."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_client_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Any) -> None:
    """Write tensors and their description. A file at the path is replaced once the new file is whole and on the disk.

    Equal tensors and an equal description give equal bytes.

    Raises:
        FileNotFoundError: there is no folder to write to.
        OSError: ``path`` is not a file, or the disk is full.
        ValueError: the description holds NaN, or is larger than the format allows.
    """
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "content": json.dumps(description, ensure_ascii=False, allow_nan=False),
        "sha256": _BLANK,
    }
    with replacing(path) as temporary:
        write_tensors(temporary, tensors, metadata)
        _write_checksum(temporary)


def _write_checksum(path: Path) -> None:
    with open(path, "r+b") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"tokenizer and configuration take {length} bytes; the format allows {_LARGEST_HEADER}")
        header = file.read(length)
        digest = hashlib.sha256(prefix + header)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        file.seek(len(prefix) + header.index(_checksum_field(_BLANK)))
        file.write(_checksum_field(digest.hexdigest()))


def _checksum_field(checksum: str) -> bytes:
    # No string of the header can hold these bytes: quotation marks inside a string are escaped.
    return f'"sha256":"{checksum}"'.encode()


def read_client_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of ``write_client_file``: tensors and description.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the path is a folder or a device, or the file is damaged, truncated, of another kind or of a newer
            version; the message names the path.
    """
    return _reading(path, _read)


def check_client_file(path: str | os.PathLike[str]) -> None:
    """Check a file's header without reading its tensors, so that a file of another kind is refused at once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_client_file`, except faults of the checksum and the description.
    """
    _reading(path, _header)


def _reading(path: str | os.PathLike[str], read: Callable[[BinaryIO, int], _Result]) -> _Result:
    check_path(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    file = open_regular(path, wanted="text transform")
    try:
        with file:
            return read(file, os.fstat(file.fileno()).st_size)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} {error}") from error


def _header(file: BinaryIO, size: int) -> tuple[bytes, bytes, dict[str, str], list[_Entry]]:
    """Read the header's length, the header, the metadata in it, and the entries of the tensors."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _LARGEST_HEADER):
        kind = "holds pickled data, which is never loaded; it is " if _looks_pickled(prefix) else "is damaged or "
        raise ValueError(f"{kind}not a safetensors file: {size} bytes cannot hold a header of {length}")
    header = file.read(length)
    metadata, entries = _parsed(header, size - 8 - length)
    _check_format(metadata)
    return prefix, header, metadata, entries


def _read(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    prefix, header, metadata, entries = _header(file, size)
    field = _checksum_field(metadata["sha256"])
    if not re.fullmatch("[0-9a-f]{64}", metadata["sha256"]) or header.count(field) != 1:
        raise ValueError("is damaged: its checksum cannot be read")
    digest = hashlib.sha256(prefix + header.replace(field, _checksum_field(_BLANK)))
    tensors = {}
    for entry in entries:
        tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
        values = tensors[entry.name].view(-1).view(torch.uint8).numpy().data
        if file.readinto(values) != len(values):  # type: ignore[attr-defined]
            raise ValueError("is truncated")
        digest.update(values)
    if digest.hexdigest() != metadata["sha256"]:
        raise ValueError("is damaged: its checksum does not match")
    try:
        description = strict_json.loads(metadata["content"])
    except ValueError as error:
        raise ValueError(f"cannot be used: its description is no JSON that is allowed here: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"cannot be used: its description is of type {type(description).__name__}")
    return tensors, description


def _looks_pickled(prefix: bytes) -> bool:
    """Return True for the first bytes of a PyTorch archive, or of a pickle of protocol 2 and later."""
    return prefix.startswith(b"PK\x03\x04") or (prefix[:1] == b"\x80" and prefix[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError("is not a text transform of sgfast")
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"cannot be used: its format version is {version[:20]!r}, this sgfast reads {str(FORMAT_VERSION)!r}"
        )
    if sorted(metadata) != sorted(_METADATA):
        raise ValueError(f"is damaged: its metadata must be {', '.join(_METADATA)}")


def _parsed(header: bytes, data_size: int) -> tuple[dict[str, str], list[_Entry]]:
    """Read the metadata and the tensors' entries, in the order of the data, which they fill without gap or overlap."""
    try:
        fields = strict_json.loads(header.decode())
    except ValueError as error:
        raise ValueError(f"is damaged or not a safetensors file: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("is damaged or not a safetensors file: its header is no JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("is damaged: its metadata are no strings")
    entries = sorted((_entry(name, field) for name, field in fields.items()), key=lambda entry: entry.begin)
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise ValueError(f"is damaged: the tensor {entry.name!r} does not begin where the one before it ends")
        position = entry.end
    if position != data_size:
        raise ValueError(f"is damaged or truncated: its tensors need {position} bytes, it has {data_size}")
    return metadata, entries


def _entry(name: str, field: Any) -> _Entry:
    where = f"the tensor {name[:100]!r}"
    if not isinstance(field, dict) or sorted(field) != ["data_offsets", "dtype", "shape"]:
        raise ValueError(f"is damaged: {where} must have data_offsets, dtype and shape")
    shape, offsets, dtype = field["shape"], field["data_offsets"], field["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"is damaged: {where} must be of dtype {', '.join(_DTYPES)}; got {str(dtype)[:20]!r}")
    if not _whole_numbers(shape, 1) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"is damaged: {where} has no valid shape")
    if not _whole_numbers(offsets, 0) or len(offsets) != 2:
        raise ValueError(f"is damaged: {where} has no valid data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"is damaged: {where} does not fill its {end - begin} bytes")
    return _Entry(name, _DTYPES[dtype], tuple(shape), begin, end)


def _whole_numbers(values: Any, smallest: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= smallest for value in values)
