"""A safetensors file written tensor by tensor: safetensors' own writer needs all of them in memory at once."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Tensor

from sgfast.utils.files import replacing

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
# What readers of the format accept.
_LARGEST_HEADER = 100_000_000
_ALIGNMENT = 8


class TensorStream:
    """What is being written; see `streamed_tensors`."""

    def __init__(self, data: IO[bytes], metadata: Mapping[str, str]) -> None:
        self._data = data
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._header_size = len(json.dumps(self._header))
        self._position = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor.

        Raises:
            ValueError: a name that was written before, a dtype that is not among float64 to bfloat16, int64 and bool,
                or more tensors than the format's header holds (100 MB).
        """
        if name in self._header:
            raise ValueError(f"the tensor {name!r} is written already")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"a tensor of {tensor.dtype} cannot be written")
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        end = self._position + len(content)
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self._position, end]}
        self._header_size += len(json.dumps({name: entry}))
        if self._header_size > _LARGEST_HEADER:
            raise ValueError("too many tensors for one safetensors file: split the data")
        self._header[name] = entry
        self._data.write(content)
        self._position = end

    def copy_to(self, file: IO[bytes]) -> None:
        """Write the whole file: the header's length, the header, the tensors."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        file.write(len(header).to_bytes(8, "little") + header)
        self._data.seek(0)
        shutil.copyfileobj(self._data, file, 1 << 20)


@contextmanager
def streamed_tensors(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Iterator[TensorStream]:
    """Write a safetensors file one tensor at a time, replacing what is at ``path`` once the block has succeeded.

    The tensors wait in an unnamed file in the same folder, since the format's header, which says where each one lies,
    comes first: the disk needs room for both.

    Example:
        >>> from pathlib import Path
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp()) / "numbers.safetensors"
        >>> with streamed_tensors(path, {"format": "pt"}) as stream:
        ...     for number in range(3):
        ...         stream.write(str(number), torch.tensor([number]))
        >>> load_file(path)["2"]
        tensor([2])
    """
    with replacing(path) as temporary, tempfile.TemporaryFile(dir=temporary.parent) as data:
        stream = TensorStream(data, metadata)
        yield stream
        with temporary.open("wb") as file:
            stream.copy_to(file)
