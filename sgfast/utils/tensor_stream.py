"""Writer of safetensors files. The same tensors and metadata give the same bytes in every process.

The writer of the package safetensors changes the order of metadata between calls. Here a full disk raises OSError.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sgfast.utils.files import replacing

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Largest header, in bytes, that readers of the format accept.
_LARGEST_HEADER = 100_000_000
_ALIGNMENT = 8


class TensorStream:
    """Safetensors file that is being written; see `streamed_tensors`."""

    def __init__(self, data: IO[bytes], metadata: Mapping[str, str]) -> None:
        self._data = data
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._header_size = len(json.dumps(self._header))
        self._position = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor.

        Raises:
            ValueError: the name was written before, the format does not have the dtype (for example, a complex one),
                or the header of all tensors would exceed the format's 100 MB.
        """
        if name in self._header:
            raise ValueError(f"the tensor {name!r} is written already")
        content = _bytes_of(tensor)
        end = self._position + len(content)
        entry = _entry(tensor, self._position, end)
        self._header_size += len(json.dumps({name: entry}))
        if self._header_size > _LARGEST_HEADER:
            raise ValueError("too many tensors for one safetensors file: split the data")
        self._header[name] = entry
        self._data.write(content)
        self._position = end

    def copy_to(self, file: IO[bytes]) -> None:
        """Write the whole file: the header's length, the header, the tensors."""
        file.write(_encoded(self._header))
        self._data.seek(0)
        shutil.copyfileobj(self._data, file, 1 << 20)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file in place. Tensors are ordered by element size, the largest first, then by name.

    Args:
        path: path of the file, such as the temporary path of `sgfast.utils.files.replacing`.
        tensors: tensors on any device. Tensors that share memory are written separately.
        metadata: metadata of the header.

    Raises:
        ValueError: the format does not have a tensor's dtype, or the header exceeds 100 MB.
        OSError: the disk is full.

    Example:
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp()) / "numbers.safetensors"
        >>> write_tensors(path, {"b": torch.tensor([2]), "a": torch.tensor([1.0])}, {"format": "pt"})
        >>> sorted(load_file(path).items())
        [('a', tensor([1.])), ('b', tensor([2]))]
    """
    # Larger elements come first, so that each tensor begins at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = _entry(tensor, position, end)
        position = end
    encoded = _encoded(header)
    if len(encoded) > _LARGEST_HEADER:
        raise ValueError(f"names and metadata take {len(encoded)} bytes; the format allows {_LARGEST_HEADER}")
    with open(path, "wb") as file:
        file.write(encoded)
        for _, tensor in ordered:
            file.write(_bytes_of(tensor))


def _entry(tensor: Tensor, begin: int, end: int) -> dict[str, Any]:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"a tensor of {tensor.dtype} cannot be written")
    return {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _encoded(header: Mapping[str, Any]) -> bytes:
    """Encode the header's length and the header, padded with spaces."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def streamed_tensors(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Iterator[TensorStream]:
    """Write a safetensors file one tensor at a time, and replace the file at ``path`` if the block succeeds.

    The format's header comes first and holds the place of every tensor. The tensors are therefore stored in an unnamed
    file in the same folder until the block ends, and the disk needs room for two copies.

    Raises:
        OSError: before the block, another process writes the same file, or `sgfast.utils.files.replacing` refuses the
            path.

    Example:
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp()) / "numbers.safetensors"
        >>> with streamed_tensors(path, {"format": "pt"}) as stream:
        ...     for number in range(3):
        ...         stream.write(str(number), torch.tensor([number]))
        >>> load_file(path)["2"]
        tensor([2])
    """
    with replacing(path, alone=True) as temporary, tempfile.TemporaryFile(dir=temporary.parent) as data:
        stream = TensorStream(data, metadata)
        yield stream
        with temporary.open("wb") as file:
            stream.copy_to(file)
