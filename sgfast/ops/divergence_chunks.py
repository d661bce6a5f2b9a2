"""How `divergences` walks the rows of its logits in PyTorch: how many at a time, and what is read of each chunk."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows, topk
from sgfast.ops.divergence_rows import LABEL_KIND, Settings, forward_rows, softmax_scalars

# What keeps a thread's share of the temporaries in a 2 MiB cache and makes up for starting the thread.
_LOGITS_PER_THREAD = 64 * 1024
# Of selecting some, which has fewer temporaries and makes many small calls for every chunk.
_LOGITS_PER_THREAD_TO_SELECT_FROM = 256 * 1024


def make_settings(
    kinds: str,
    top_k: int,
    support: str,
    beta: float,
    skew: float,
    labels: Tensor | None,
    label_smoothing: float,
    temperature: Tensor,
) -> Settings:
    """The settings of a chunk's arithmetic."""
    # Only a CPU can look at the temperature without waiting for a queue.
    unit_temperature = labels is not None and temperature.device.type == "cpu" and bool((temperature == 1).all())
    kind_names = tuple(kinds.split(","))
    return Settings(kind_names, support if top_k else "full", beta, skew, unit_temperature, label_smoothing)


def row_chunks(
    sides: tuple[Tensor, Tensor],
    mask: Tensor | None,
    dtype: torch.dtype,
    choice: dispatch.Choice,
    settings: Settings,
    top_k: int,
    support_width: int,
    max_chunk_bytes: int,
) -> Iterator[Tensor | slice]:
    """Chunks whose temporaries stay within the caller's bound, and are fewer where that is faster.

    Uncompiled on a CPU, every operation is a pass over the chunk: it should stay in the cache, and give each thread
    enough to do.
    """
    logits, size = sides[0], sides[0].shape[-1]
    count = 0.0 if mask is None else 4.0  # the selected rows of both sides and their gradients
    if choice.implementation == "compile":
        count += compiled_temporaries(settings, dtype)
    else:
        count += temporaries(settings, support_width / size, converted=logits.dtype != dtype)
    row_bytes = math.ceil(size * dtype.itemsize * count)
    if mask is None:
        row_bytes += sum(map(rows.copied_bytes, sides))
    if top_k:
        row_bytes = max(row_bytes, topk.temporary_bytes(logits, top_k))
    if logits.device.type == "cpu" and choice.implementation == "torch":
        per_thread = _LOGITS_PER_THREAD if settings.support == "full" else _LOGITS_PER_THREAD_TO_SELECT_FROM
        max_chunk_bytes = min(max_chunk_bytes, per_thread * torch.get_num_threads() * row_bytes // size)
    if logits.device.type == "cpu":
        rows.keep_freed_memory(max_chunk_bytes)
    return rows.row_chunks(logits.shape[:-1], mask, row_bytes, max_chunk_bytes)


def temporaries(settings: Settings, selected: float, converted: bool) -> float:
    """How many temporaries of a chunk's size are alive at once, in forward or in backward towards both sides.

    ``selected`` is the part of the logits that the support has. tests/ops/test_divergence.py counts them.
    """
    kinds = min(len(settings.kinds), 5)
    if settings.support == "full":
        return 12 + kinds + (settings.label_smoothing > 0) + 2 * converted
    return 4 + (settings.label_smoothing > 0) + (LABEL_KIND in settings.kinds) + 2 * converted + (17 + kinds) * selected


def compiled_temporaries(settings: Settings, dtype: torch.dtype) -> float:
    """How many temporaries compiled code writes to memory: none where one loop has all sums of a row."""
    one_loop = settings.support == "full" and dtype == torch.float32 and settings.beta == 0.5
    one_loop = one_loop and len(settings.kinds) <= 4 and not {LABEL_KIND, "cross_entropy"} & set(settings.kinds)
    # Where there should be none, one that another version of PyTorch needs would be eight times what is allowed.
    return 1 / 8 if one_loop else max(8, 4 + len(settings.kinds))


def forward_of(implementation: str) -> Callable[..., Tensor]:
    """`forward_rows`; compiled, it is two programs, in each of which a row is read from the cache after the first time.

    In one program the arithmetic between the passes, vectorized over rows, would part the passes: each over all rows.
    """
    if implementation != "compile":
        return forward_rows
    find_scalars = dispatch.compiled(softmax_scalars, one_loop=True)
    find_values = dispatch.compiled(forward_rows, one_loop=True)

    def run(noisy: Tensor, clean: Tensor, inverse_temperature: Tensor, settings: Settings, *rest: Any) -> Tensor:
        kept = find_scalars(noisy, clean, inverse_temperature) if settings.divergences else None
        found: Tensor = find_values(noisy, clean, inverse_temperature, settings, *rest, kept)
        return found

    return run


def read_logits(logits: Tensor, chunk: Tensor | slice, choice: dispatch.Choice) -> Tensor:
    """A chunk's rows (rows, V), in place where the strides allow."""
    found = rows.read_rows(logits, chunk)
    if choice.implementation == "compile":
        torch._dynamo.mark_static(found, 1)  # loops of a known length are twice as fast
    return found


def no_support(like: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and their validity where the support is the whole vocabulary."""
    return like.new_empty((1, 0), dtype=torch.int64), like.new_empty((1, 0), dtype=torch.bool)


def read_labels(labels: Tensor | None, chunk: Tensor | slice) -> Tensor | None:
    """A chunk's labels, (rows, 1)."""
    return None if labels is None else rows.read_scalars(labels, chunk)
