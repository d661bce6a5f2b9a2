"""TRL's generalised Jensen–Shannon losses from this library's operations: the same numbers in less memory.

``trl.experimental.gkd.GKDTrainer`` computes its loss in a static method, so that one line replaces the loss:

    from sgfast.huggingface.trl import generalized_jsd_loss
    from trl.experimental.gkd import GKDTrainer

    class FusedGKDTrainer(GKDTrainer):
        generalized_jsd_loss = staticmethod(generalized_jsd_loss)

Everything else of the Trainer stays: its arguments, on-policy sampling, accumulation and saving. This module does not
import TRL.

``trl.DistillationTrainer`` computes its loss from hidden states and the weights of both heads, in a function of its
module. One line replaces this function:

    from sgfast.huggingface.trl import chunked_divergence_loss
    from trl.trainer import distillation_trainer

    distillation_trainer._chunked_divergence_loss = chunked_divergence_loss
"""

import torch
from torch import Tensor

from sgfast.loss.divergence_loss import DivergenceLoss
from sgfast.ops import divergences, validation
from sgfast.sides import LinearLogits

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


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Compute the loss of ``trl.DistillationTrainer`` from hidden states, with the same arguments and values.

    The loss of a position is that of `generalized_jsd_loss`. Logits exist for a few rows at a time
    (`sgfast.sides.LinearLogits`), in float32 whatever the dtype of the hidden states.

    Args:
        student_hidden_states: (B, K, D), the input of the student's head at the completion's tokens.
        teacher_hidden_states: (B, K, D'), D' may differ from D.
        student_lm_head_weight: (V, D); a DTensor is gathered once.
        teacher_lm_head_weight: (V, D').
        completion_mask: (B, K), 1 = counted.
        beta: the weight of the teacher in the mixture, 0 ≤ beta ≤ 1; 0 is forward KL, 1 reverse KL.
        num_items_in_batch: the denominator; None for the number of counted positions, at least 1.
        student_lm_head_bias: (V,), or None.
        teacher_lm_head_bias: (V,), or None.
        student_logit_scale: factor of the student's logits.
        teacher_logit_scale: factor of the teacher's logits.
        student_final_logit_softcapping: bound c of the student's logits, c·tanh(z/c); None for none.
        teacher_final_logit_softcapping: the teacher's.
        temperature: T > 0, divides both sides' logits after scale and soft cap.

    Returns:
        The loss; the sum of the student's entropies over the counted positions, in nats, without graph; and the number
        of these positions. Gradients reach the student alone.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes or devices differ, or a number is out of range.

    Example:
        >>> import torch
        >>> from sgfast.huggingface.trl import chunked_divergence_loss
        >>> weight, hidden = torch.eye(3), torch.tensor([[[1.0, 0.0, 0.0]]])
        >>> loss, entropy, count = chunked_divergence_loss(hidden, 2 * hidden, weight, weight, torch.ones(1, 1), 0.5)
        >>> round(loss.item(), 4), round(entropy.item(), 4), count.item()
        (0.026, 0.9753, 1)
    """
    student = LinearLogits(
        student_hidden_states,
        _whole(student_lm_head_weight),
        None if student_lm_head_bias is None else _whole(student_lm_head_bias),
        scale=student_logit_scale,
        softcap=student_final_logit_softcapping,
    )
    with torch.no_grad():
        teacher = LinearLogits(
            teacher_hidden_states.detach(),
            _whole(teacher_lm_head_weight).detach(),
            None if teacher_lm_head_bias is None else _whole(teacher_lm_head_bias).detach(),
            scale=teacher_logit_scale,
            softcap=teacher_final_logit_softcapping,
        )
    mask = completion_mask != 0
    loss = DivergenceLoss("jensen_shannon", beta=beta, temperature=temperature)
    value: Tensor = loss(student, teacher, mask=mask, num_items=num_items_in_batch)
    with torch.no_grad():
        # The cross-entropy of a distribution with itself is its entropy.
        entropy = divergences(student, student, "cross_entropy", mask=mask, temperature=temperature)["cross_entropy"]
    return value, entropy.sum(), mask.sum()


def _whole(tensor: Tensor) -> Tensor:
    """Return a DTensor's whole value, and any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
