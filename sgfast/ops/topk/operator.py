"""The registered operator ``sgfast::top_k_support``: implementation and fake; the indices have no gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.operator import define
from sgfast.ops.topk.selection import support_width, temporary_bytes, union_finder, unpack_union


def triton_size_refusal(k: int, size: int) -> str | None:
    """Say why the kernels cannot select k of a row of this size, or return None.

    The caller has checked the devices before.
    """
    import sgfast_kernels

    most, widest = sgfast_kernels.MAX_TOP_K, sgfast_kernels.MAX_TOP_K_WIDTH
    if k > most:
        return f"top k = {k} (the kernels select at most {most} of a row)"
    if size > widest:
        return f"a vocabulary of {size} (the kernels select from rows of at most {widest})"
    return None


def triton_refusal(noisy_logits: Tensor, clean_logits: Tensor, k: int, **_: Any) -> str | None:
    """Say why Triton cannot run these arguments, or return None."""
    return (
        dispatch.triton_device_refusal(noisy_logits, clean_logits)
        or triton_size_refusal(k, noisy_logits.shape[-1])
        or dispatch.triton_rows_refusal(noisy_logits=noisy_logits, clean_logits=clean_logits)
    )


class Problem(NamedTuple):
    """The arguments of ``sgfast::top_k_support``, checked."""

    noisy_logits: Tensor
    clean_logits: Tensor
    k: int
    max_chunk_bytes: int
    impl: str | None


@define("top_k_support", Problem)
def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Find the indices and their validity, (..., min(2k, V)) each."""
    noisy, clean, k, max_chunk_bytes, impl = problem
    choice = dispatch.select(impl, triton_refusal(noisy, clean, k))
    if choice.implementation == "triton":
        import sgfast_kernels

        one = torch.ones((), device=noisy.device).expand(noisy.shape[:-1])
        return unpack_union(sgfast_kernels.top_k_union(noisy, clean, None, one, k)[0])
    body = union_finder(choice.implementation, noisy.device)
    indices, valid = _room(problem)
    row_bytes = temporary_bytes(noisy, k) + rows.copied_bytes(noisy) + rows.copied_bytes(clean)
    for chunk in rows.row_chunks(noisy.shape[:-1], None, row_bytes, max_chunk_bytes):
        indices.view(-1, indices.shape[-1])[chunk], valid.view(-1, valid.shape[-1])[chunk] = body(
            rows.read_rows(noisy, chunk), rows.read_rows(clean, chunk), k
        )
    return indices, valid


@forward.register_fake
def _room(problem: Problem) -> tuple[Tensor, Tensor]:
    shape, size = problem.noisy_logits.shape[:-1], problem.noisy_logits.shape[-1]
    indices = problem.noisy_logits.new_empty((*shape, support_width(problem.k, "both", size)), dtype=torch.int64)
    return indices, torch.empty_like(indices, dtype=torch.bool)
