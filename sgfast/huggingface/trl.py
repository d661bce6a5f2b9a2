"""TRL's generalised Jensen–Shannon loss from this library's operation: the same numbers in less memory.

``trl.experimental.gkd.GKDTrainer`` computes its loss in a static method, so that one line replaces the loss:

    from sgfast.huggingface.trl import generalized_jsd_loss
    from trl.experimental.gkd import GKDTrainer

    class FusedGKDTrainer(GKDTrainer):
        generalized_jsd_loss = staticmethod(generalized_jsd_loss)

Everything else of the Trainer stays: its arguments, on-policy sampling, accumulation and saving. This module does not
import TRL.

``trl.DistillationTrainer`` computes its loss from hidden states and the weights of both heads. There are no logits that
this function could read, so the Trainer keeps its own loss.
"""

from torch import Tensor

from sgfast.loss.divergence_loss import DivergenceLoss
from sgfast.ops import validation

_IGNORED = -100
_REDUCTIONS = ("batchmean", "sum", "mean")


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    r"""Compute the loss of ``GKDTrainer.generalized_jsd_loss``, with the same arguments and values.

    With p = softmax(student/T), q = softmax(teacher/T) and m = beta·q + (1−beta)·p, the loss of a position is, in nats,

        beta·KL(q‖m) + (1−beta)·KL(p‖m)     0 < beta < 1
        KL(q‖p)                             beta = 0
        KL(p‖q)                             beta = 1

    There is no factor T². TRL computes in the logits' dtype. This function computes in float32 (float64 for float64
    logits) and returns that dtype, so 16-bit logits give a more accurate loss than TRL's.

    Args:
        student_logits: (batch, T, V), float32, bfloat16, float16 or float64; slices are read in place.
        teacher_logits: of the same shape.
        labels: (batch, T), −100 at positions that do not count; None: every position counts. The labels are aligned
            with the logits: ``GKDTrainer`` has shifted both.
        beta: the weight of the teacher in the mixture, 0 ≤ beta ≤ 1.
        temperature: T > 0, divides both sides' logits.
        reduction: ``batchmean``: the sum / max(number of counted positions, 1), and without ``labels`` the sum / batch;
            ``sum``; ``mean``: the sum / (number of counted positions · V). A position's loss has no parts, so TRL's
            form without a reduction does not exist here.
        num_items_in_batch: the denominator instead, over all micro-batches and processes; the ``reduction`` is not used
            then.

    Returns:
        A scalar. Without any counted position the loss is exactly 0, with a graph.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes or devices differ, a number out of range, or another reduction.

    Example:
        >>> import torch
        >>> from sgfast.huggingface.trl import generalized_jsd_loss
        >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[0.0, 3.0], [0.0, 0.0]]]).log1p()
        >>> generalized_jsd_loss(student, teacher, beta=0.0)
        tensor(0.1927)
    """
    validation.check_choice("reduction", reduction, _REDUCTIONS)
    mask = None if labels is None else labels != _IGNORED
    averaged = num_items_in_batch is not None or (reduction == "batchmean" and mask is not None)
    loss = DivergenceLoss("jensen_shannon", beta=beta, temperature=temperature, reduction="mean" if averaged else "sum")
    value: Tensor = loss(student_logits, teacher_logits, mask=mask, num_items=num_items_in_batch)
    if averaged or reduction == "sum":
        return value
    if reduction == "batchmean":
        return value / max(student_logits.shape[0], 1)
    counted = student_logits[..., 0].numel() if mask is None else mask.sum().clamp(min=1)
    return value / (counted * student_logits.shape[-1])
