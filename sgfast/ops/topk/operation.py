"""The union of two sides' top-k logits at every position: `selection` finds it, exactly, in PyTorch."""

from torch import Tensor

from sgfast.ops import dispatch, validation
from sgfast.ops.topk.operator import Problem, forward, triton_refusal
from sgfast.ops.topk.selection import check_k


@dispatch.describe_triton(triton_refusal)
def top_k_support(
    noisy_logits: Tensor,
    clean_logits: Tensor,
    k: int,
    *,
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Union of the two sides' top-k indices at each position, as padded ascending indices.

    Args:
        noisy_logits: (..., V), float32, bfloat16, float16 or float64.
        clean_logits: of the same shape.
        k: how many logits of each side, 1 ≤ k ≤ V. Among equal logits the lower index wins.
        max_chunk_bytes: bound on temporaries beyond the outputs (at least one row); default 8 MiB.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        ``(indices, valid)``: int64 and bool, (..., min(2k, V)). Where ``valid`` is False the index repeats the last
        valid one. The dense boolean form is ``sgfast.metrics.get_top_k_support_mask``.

    Raises:
        TypeError: logits are not floating tensors, or ``k`` is not an int.
        ValueError: shapes differ, or ``k`` is out of range.

    Example:
        >>> import torch
        >>> from sgfast.ops import top_k_support
        >>> top_k_support(torch.tensor([0.0, 5.0, 1.0, 1.0]), torch.tensor([0.0, 5.0, 2.0, 3.0]), k=2)
        (tensor([1, 2, 3, 3]), tensor([ True,  True,  True, False]))
    """
    validation.check_pair("noisy_logits", noisy_logits, "clean_logits", clean_logits)
    check_k("k", k, noisy_logits.shape[-1])
    dispatch.check_impl(impl)
    chunk_bytes = validation.chunk_bytes(max_chunk_bytes)
    indices, valid = forward(Problem(noisy_logits.detach(), clean_logits.detach(), k, chunk_bytes, impl))
    return indices, valid
