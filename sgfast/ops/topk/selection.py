"""The union of two sides' top-k logits at every position, exactly, with ties going to the lower index.

``torch.topk`` promises no order among equal values, and in bfloat16 most rows have ties at the k-th value. Each logit
is therefore packed with its index into one 64-bit key, ordered by (value descending, index ascending): all keys differ
and any selection of the k largest is the same one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sgfast.ops import dispatch


def check_k(name: str, k: int, size: int) -> None:
    """Check a number of logits against the vocabulary's size."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{name} must be an int; got {type(k).__name__}")
    if not 1 <= k <= size:
        raise ValueError(f"{name} must be between 1 and the vocabulary's size, {size}; got {k}")


def top_k_indices(logits: Tensor, k: int) -> Tensor:
    """Indices (rows, k) of the k largest logits of each row (rows, V), the lower index first among equal ones."""
    if logits.dtype == torch.float64:  # the two parts of a key would need more than 64 bits
        return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # Adding 0 turns −0 into +0, which must tie with it. Flipping the lower bits of negative floats makes the order of
    # their bit patterns, read as integers, the order of the values.
    bits = (logits.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = logits.shape[-1] - 1
    inverted_index = torch.arange(last, -1, -1, device=logits.device)
    keys = (ordered.long() << 32) | inverted_index
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def _top_k_set(logits: Tensor, k: int) -> Tensor:
    """Return `top_k_indices` in any order.

    On a CPU more than k logits are selected, so that the selection mostly holds every logit equal to the k-th.
    """
    size = logits.shape[-1]
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return top_k_indices(logits, k)
    values, selected = logits.topk(min(k + k // 8 + 16, size), dim=-1)
    smallest = values[:, k - 1 : k]
    with_nan = values[:, 0].isnan()  # NaN comes first
    if not (with_nan | (values[:, k:] == smallest).any(-1)).any():
        return selected[:, :k]
    # The order is: all logits above the k-th, then the logits equal to the k-th by index.
    place = torch.where(values > smallest, -1, torch.where(values == smallest, selected, size))
    indices = selected.gather(-1, place.argsort(-1)[:, :k])
    # A row whose last selected logit equals the k-th may have more equal logits outside the selection. Such a row is
    # ordered by its keys. Keys take much memory and are therefore made for one row at a time.
    crowded = with_nan | ((values[:, -1:] == smallest)[:, 0] & (values.shape[-1] < size))
    for row in crowded.nonzero()[:, 0].tolist():
        indices[row] = top_k_indices(logits[row : row + 1], k)
    return indices


def support_width(k: int, top_k_of: str, size: int) -> int:
    """Return the largest number of indices in a support: the top k of one side, or the union of both sides'."""
    return min(2 * k, size) if top_k_of == "both" else k


def union_of_top_k(noisy: Tensor, clean: Tensor, k: int, top_k_of: str = "both") -> tuple[Tensor, Tensor]:
    """Union of both sides' top-k: ascending indices (rows, min(2k, V)) and which of them are valid.

    Padding repeats the row's last valid index, so that every entry is an index of the union. If ``top_k_of`` is
    ``noisy`` or ``clean``, the result is the top-k of this side alone, (rows, k), all valid.
    """
    size = noisy.shape[-1]
    if top_k_of != "both":
        indices = _top_k_set(noisy if top_k_of == "noisy" else clean, k).sort(dim=-1).values
        return indices, torch.ones_like(indices, dtype=torch.bool)
    both = torch.cat([_top_k_set(noisy, k), _top_k_set(clean, k)], dim=-1).sort(dim=-1).values
    first = torch.ones_like(both, dtype=torch.bool)
    first[:, 1:] = both[:, 1:] != both[:, :-1]
    place = first.cumsum(-1) - 1  # among the union; the second of two equal indices goes where the first does
    width = support_width(k, top_k_of, size)
    union = both[:, -1:].repeat(1, width).scatter_(-1, place, both)
    valid = torch.arange(width, device=both.device) <= place[:, -1:]
    return union, valid


def union_finder(implementation: str, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `union_of_top_k`, compiled if ``implementation`` asks for compilation and the device is no CPU.

    Compiled code makes a key of every logit, which is slower on a CPU than selecting.
    """
    return dispatch.implementation_of(union_of_top_k, "torch" if device.type == "cpu" else implementation)


def temporary_bytes(logits: Tensor, k: int) -> int:
    """Return an upper bound of the bytes that `union_finder`'s function allocates for one row.

    A crowded row on a CPU allocates its 64-bit keys after the other temporaries are free.
    """
    if logits.device.type == "cpu":
        return 100 * k + 2048  # the selection, and the sorts of both sides' indices
    return 32 * logits.shape[-1]  # the float copy, its bits, 64-bit keys and their parts, one side after the other


def unpack_union(kept_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Turn ascending int32 indices, −1 after the last, into the indices and flags of `union_of_top_k`."""
    valid = kept_indices >= 0
    last_valid = kept_indices.amax(-1, keepdim=True)
    return torch.where(valid, kept_indices, last_valid).long(), valid
