"""Sides of a divergence that are not logits.

The logits of a language model, (tokens, vocabulary), are what runs out of memory. `sgfast.divergences`,
`sgfast.DivergenceLoss`, the functions of `sgfast.loss.divergences` and `sgfast.UtilityMetrics` take one of these values
in the place of logits.
"""

from typing import Literal

from sgfast.ops import validation
from sgfast.ops.linear.expectation import expectation_of
from sgfast.ops.sides import HeadExpectation, LinearLogits

__all__ = ["HeadExpectation", "LinearLogits", "summarize_teacher"]

FORMS = ("head_expectation",)


def summarize_teacher(
    side: LinearLogits, form: Literal["head_expectation"], *, max_chunk_bytes: int | None = None
) -> HeadExpectation:
    """Turn a teacher's side into a smaller value that a loss takes in its place, without a graph.

    Args:
        side: the teacher.
        form: ``head_expectation``: E_q[weight] and the entropy of q, float32 (float64 if a tensor is). The teacher has
            no soft cap.
        max_chunk_bytes: bound on the temporaries; default 64 MiB on a CPU, 512 MiB on a GPU.

    Raises:
        TypeError: ``side`` is no `LinearLogits`.
        ValueError: an unknown form, or a soft cap.

    Example:
        >>> import torch
        >>> from sgfast import DivergenceLoss, LinearLogits
        >>> from sgfast.sides import summarize_teacher
        >>> weight = torch.eye(3)
        >>> teacher = summarize_teacher(LinearLogits(torch.tensor([[0.0, 0.0, 4.0]]), weight), "head_expectation")
        >>> teacher
        HeadExpectation(vector=(1, 3), entropy=(1,))
        >>> DivergenceLoss("forward_kl")(LinearLogits(torch.zeros(1, 3), weight), teacher)
        tensor(0.9213)
    """
    validation.check_choice("form", form, FORMS)
    if not isinstance(side, LinearLogits):
        raise TypeError(f"side must be a LinearLogits for the form {form}; got {type(side).__name__}")
    if side.softcap is not None:
        raise ValueError(f"side must have no soft cap for the form {form}; got softcap={side.softcap}")
    return expectation_of(side, max_chunk_bytes)
