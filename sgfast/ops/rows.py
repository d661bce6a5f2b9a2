"""Rows of tensors of any rank and stride: how the PyTorch implementations bound their memory.

An operation over the last dimension sees a ``(..., V)`` tensor as rows. These helpers walk the rows in chunks, skip
the masked ones, and read row-strided views such as ``logits[:, :-1]`` where they lie.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

DEFAULT_CHUNK_BYTES = 8 * 2**20


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that every loss and metric is computed in: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def row_chunks(
    shape: Sequence[int], mask: Tensor | None, row_bytes: int, max_chunk_bytes: int
) -> Iterator[Tensor | slice]:
    """Yield the rows to compute: slices without a mask, index tensors of the selected rows with one.

    On a GPU every row is computed, because a search for the selected rows would stop the queue: see ``zero_masked``.

    Args:
        shape: the row shape (the tensor's shape without its last dimension).
        mask: boolean, of that shape; None selects every row.
        row_bytes: temporaries that one row needs.
        max_chunk_bytes: bound on a chunk's temporaries; a chunk has at least one row.
    """
    rows = max(1, max_chunk_bytes // max(row_bytes, 1))
    if mask is None or mask.device.type != "cpu":
        total = 1
        for size in shape:
            total *= size
        for start in range(0, total, rows):
            yield slice(start, min(start + rows, total))
    else:
        selected = mask.reshape(-1).nonzero().squeeze(-1)
        yield from torch.split(selected, rows) if selected.numel() else ()


def keep_freed_memory(size: int) -> None:
    """Let a CPU reuse the memory of one chunk's temporaries for the next chunk, up to 32 MiB.

    The C library of Linux keeps freed memory up to the size of the largest block freed so far. Without such a block
    every temporary comes from the system anew, page by page, which takes several times as long as the arithmetic. The
    block here is never written to, so it costs nothing.
    """
    torch.empty(min(size, 2**25 - 2**16), dtype=torch.uint8)


def read_rows(tensor: Tensor, chunk: Tensor | slice) -> Tensor:
    """Return rows of a ``(..., V)`` tensor as ``(rows, V)``: a view if the strides allow, else a copy of the chunk."""
    if isinstance(chunk, slice) and _leading_dimensions_collapse(tensor):
        return tensor.view(-1, tensor.shape[-1])[chunk]
    if isinstance(chunk, slice):
        chunk = torch.arange(chunk.start, chunk.stop, device=tensor.device)
    if tensor.dim() == 1:
        return tensor[None]
    return tensor[torch.unravel_index(chunk, tensor.shape[:-1])]


def copied_bytes(tensor: Tensor) -> int:
    """Return the bytes that `read_rows` allocates for one row of a slice: 0 where the slice is a view."""
    return 0 if _leading_dimensions_collapse(tensor) else tensor.shape[-1] * tensor.element_size()


def read_scalars(tensor: Tensor, chunk: Tensor | slice) -> Tensor:
    """Return one scalar per row, ``(rows, 1)``, of a tensor of the row shape."""
    return read_rows(tensor[..., None], chunk)


def empty_gradients(noisy: Tensor, clean: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Return empty tensors for both sides' gradients; the shape is (0,) for a gradient that nobody asked for."""
    to_noisy, to_clean = room_for_gradients((noisy, clean), wanted)
    return to_noisy, to_clean


def room_for_gradients(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Return room for each tensor's gradient; (0,) for an unwanted one, because an operator cannot return None."""
    return [tensor.new_empty(tensor.shape if one else 0) for tensor, one in zip(tensors, wanted, strict=True)]


def zero_masked(values: Tensor, mask: Tensor | None, chunk: Tensor | slice) -> Tensor:
    """Return ``(rows, ...)`` values with masked rows exactly 0, even if NaN or inf was computed there."""
    if mask is None or isinstance(chunk, Tensor):
        return values
    selected = mask.reshape(-1)[chunk]
    return torch.where(selected.view(-1, *[1] * (values.dim() - 1)), values, 0)


def _leading_dimensions_collapse(tensor: Tensor) -> bool:
    expected: int | None = None
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return False
        expected = size * stride
    return True
