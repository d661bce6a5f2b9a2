"""Chunks of rows in the PyTorch implementation: their size, and the reads of logits, supports, labels and scales."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.divergence.atoms import Chunk, Settings, softmax_scalars
from sgfast.ops.divergence.kinds import LABEL_KIND
from sgfast.ops.divergence.problem import Problem
from sgfast.ops.divergence.rows import forward_rows
from sgfast.ops.topk import selection

# With this many logits a thread's temporaries fit into a cache of 2 MiB, and the work costs more than the start of the
# thread.
_LOGITS_PER_THREAD = 64 * 1024
# The number for values and gradients from one read: twice as many operations start for a chunk.
_LOGITS_PER_THREAD_FOR_BOTH = 128 * 1024
# The number for a top-k support. A chunk then has fewer temporaries and needs many small calls.
_LOGITS_PER_THREAD_TO_SELECT_FROM = 256 * 1024


def settings_of(problem: Problem) -> Settings:
    """Return the settings that do not depend on the values of tensors, so that a graph can be traced."""
    return Settings(
        problem.kind_names,
        problem.support if problem.has_support else "full",
        problem.beta,
        problem.skew,
        paired=problem.clean_temperature is not None,
        label_smoothing=problem.label_smoothing,
    )


def chunk_settings(problem: Problem) -> Settings:
    """Return the settings of a chunk's arithmetic inside an operator, where the values of tensors can be read."""
    temperature = problem.temperature
    # Only a CPU can read the temperature without waiting for a queue.
    labelled = problem.labels is not None and temperature.device.type == "cpu"
    return settings_of(problem)._replace(unit_temperature=labelled and bool((temperature == 1).all()))


def row_chunks(
    problem: Problem, choice: dispatch.Choice, settings: Settings, both: bool = False
) -> Iterator[Tensor | slice]:
    """Yield chunks whose temporaries stay within the caller's bound. Smaller chunks are taken where they are faster.

    On a CPU every uncompiled operation is a pass over the chunk. The chunk should stay in the cache and give each
    thread enough work.
    """
    logits, mask, top_k, max_chunk_bytes = problem.noisy, problem.mask, problem.top_k, problem.max_chunk_bytes
    size, dtype = logits.shape[-1], rows.compute_dtype(logits, problem.clean)
    count = 0.0 if mask is None else 4.0  # the selected rows of both sides and their gradients
    if problem.support_mask is not None:
        count += masked_temporaries(settings)
    elif choice.implementation == "compile":
        count += compiled_temporaries(settings, dtype)
    else:
        count += temporaries(settings, problem.support_width / size, converted=logits.dtype != dtype)
    row_bytes = math.ceil(size * dtype.itemsize * count)
    if mask is None:
        row_bytes += rows.copied_bytes(logits) + rows.copied_bytes(problem.clean)
    if top_k:
        row_bytes = max(row_bytes, selection.temporary_bytes(logits, top_k))
    if logits.device.type == "cpu" and choice.implementation == "torch":
        per_thread = _LOGITS_PER_THREAD_FOR_BOTH if both else _LOGITS_PER_THREAD
        per_thread = per_thread if settings.support == "full" else _LOGITS_PER_THREAD_TO_SELECT_FROM
        max_chunk_bytes = min(max_chunk_bytes, per_thread * torch.get_num_threads() * row_bytes // size)
    if logits.device.type == "cpu":
        rows.keep_freed_memory(max_chunk_bytes)
    return rows.row_chunks(logits.shape[:-1], mask, row_bytes, max_chunk_bytes)


def temporaries(settings: Settings, selected: float, converted: bool) -> float:
    """Return how many temporaries of a chunk's size are alive at once, in forward or in backward towards both sides.

    ``selected`` is the share of the logits that the support selects. tests/ops/divergence/test_divergence_memory.py
    counts the temporaries.
    """
    kinds = min(len(settings.kinds), 5)
    if settings.support == "full":
        return 12 + kinds + 3 * (kinds > 3) + (settings.label_smoothing > 0) + 2 * converted
    whole = 4 + (settings.support == "tail") + (LABEL_KIND in settings.kinds)
    return whole + (settings.label_smoothing > 0) + 2 * converted + (17 + kinds) * selected


def masked_temporaries(settings: Settings) -> float:
    """Return the number of temporaries for a support that is a mask, whose indices are 64 bits wide."""
    return temporaries(settings, 1, converted=True) + 5


def compiled_temporaries(settings: Settings, dtype: torch.dtype) -> float:
    """Return how many temporaries compiled code writes to memory: none if one loop finds all sums of a row."""
    one_loop = settings.support == "full" and dtype == torch.float32 and settings.beta == 0.5
    one_loop = one_loop and len(settings.kinds) <= 4 and LABEL_KIND not in settings.kinds and not settings.reads_log_p
    # An eighth stands for none. Another version of PyTorch may write one temporary after all. Memory is then at most
    # eight times the caller's bound.
    return 1 / 8 if one_loop else max(8, 4 + len(settings.kinds))


def forward_of(implementation: str) -> Callable[..., Tensor]:
    """Return `forward_rows`, as two programs where it is compiled.

    In each program the second pass over a row finds the row in the cache. In a single program the arithmetic on row
    scalars would separate the passes, and each pass would run over all rows before the next.
    """
    if implementation != "compile":
        return forward_rows
    find_scalars = dispatch.compiled(softmax_scalars, one_loop=True)
    find_values = dispatch.compiled(forward_rows, one_loop=True)

    def run(chunk: Chunk, sides_wanted: tuple[bool, bool]) -> Tensor:
        kept = find_scalars(chunk.noisy, chunk.clean, chunk.scales) if chunk.settings.divergences else None
        found: Tensor = find_values(chunk, sides_wanted, kept)
        return found

    return run


def read_chunks(
    problem: Problem,
    choice: dispatch.Choice,
    settings: Settings,
    kept_indices: Tensor | None = None,
    difference: Tensor | None = None,
    both: bool = False,
) -> Iterator[tuple[Tensor | slice, Chunk]]:
    """Yield each chunk and the numbers of its rows.

    Backward passes the ``kept_indices`` of a top-k support. If the ``difference`` of the logits is given, the noisy
    logits are the clean ones and the difference, and `Problem.noisy` is not read. ``both`` announces that values and
    gradients are computed at once.
    """
    noisy_scale = 1 / problem.temperature
    clean_scale = noisy_scale if problem.clean_temperature is None else 1 / problem.clean_temperature
    for place in row_chunks(problem, choice, settings, both):
        noisy, clean = (_read_logits(side, place, choice) for side in (problem.noisy, problem.clean))
        apart = None if difference is None else rows.read_rows(difference, place)
        noisy = noisy if apart is None else clean + apart
        noisy_scales = rows.read_scalars(noisy_scale, place)
        clean_scales = noisy_scales if clean_scale is noisy_scale else rows.read_scalars(clean_scale, place)
        support = _read_support(problem, place, noisy, clean, choice, kept_indices)
        labels = None if problem.labels is None else rows.read_scalars(problem.labels, place)
        yield place, Chunk(noisy, clean, (noisy_scales, clean_scales), settings, *support, labels, apart)


def _read_logits(logits: Tensor, place: Tensor | slice, choice: dispatch.Choice) -> Tensor:
    """Read rows (rows, V), in place where the strides allow."""
    found = rows.read_rows(logits, place)
    if choice.implementation == "compile":
        torch._dynamo.mark_static(found, 1)  # loops of a known length are twice as fast
    return found


def _read_support(
    problem: Problem,
    place: Tensor | slice,
    noisy: Tensor,
    clean: Tensor,
    choice: dispatch.Choice,
    kept_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the rows' support as padded indices and their validity."""
    if problem.support_mask is not None:
        return indices_of_mask(rows.read_rows(problem.support_mask, place))
    if not problem.top_k:
        return no_support(problem.noisy)
    if kept_indices is not None:
        return selection.unpack_union(rows.read_rows(kept_indices, place))
    find_support = selection.union_finder(choice.implementation, problem.noisy.device)
    return find_support(noisy, clean, problem.top_k, problem.top_k_of)


def indices_of_mask(support_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return padded indices (rows, V) of a mask's True entries, and their validity.

    Padding repeats the last valid index.
    """
    positions = torch.arange(support_mask.shape[-1], device=support_mask.device).expand(support_mask.shape)
    last_valid = positions.masked_fill(~support_mask, 0).amax(-1, keepdim=True)
    return torch.where(support_mask, positions, last_valid), support_mask


def no_support(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty indices and validity: the support is the whole vocabulary."""
    return like.new_empty((1, 0), dtype=torch.int64), like.new_empty((1, 0), dtype=torch.bool)
