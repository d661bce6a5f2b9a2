"""The arithmetic of `score_rows`, one chunk of rows at a time.

Scores are (..., K), and keys broadcast to the scores. `forward_rows` and `backward_rows` are right for all scores. The
quick ways take a third of the passes. They are right if their sums are finite, which means that no score is infinite. A
CPU can look at the sums without waiting.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sgfast.ops import rows

Kind = Literal["squared_error", "cross_entropy"]


class _Distributions(NamedTuple):
    """The parts of the cross entropy and of its gradients. Every field is (..., K)."""

    p: Tensor
    q: Tensor
    weights: Tensor  # k where the column counts, else 0
    log_p: Tensor  # 0 where the column does not count


def _differences(
    student: Tensor, teacher: Tensor, keys: Tensor | None, threshold: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return s − t, and two masks: the columns whose difference depends on s, and on t."""
    if threshold is None:
        both = (student != -math.inf) & (teacher != -math.inf)
        student_counts = teacher_counts = both if keys is None else both & (keys != 0)
    else:
        # The test is not `>`, because a NaN must stay in the result.
        student_counts, teacher_counts = ~(student <= threshold), ~(teacher <= threshold)
    difference = torch.where(student_counts, student, 0) - torch.where(teacher_counts, teacher, 0)
    return difference, student_counts, teacher_counts


def _log_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log p, p). In a row of −inf alone, every p is 0."""
    maximum = scores.detach().amax(-1, keepdim=True)
    shifted = scores - torch.where(maximum == -math.inf, 0, maximum)
    exponentials = shifted.exp()
    total = exponentials.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1, total)
    return shifted - total.log(), exponentials / total


def _distributions(student: Tensor, teacher: Tensor, keys: Tensor | None, threshold: float | None) -> _Distributions:
    if keys is not None:
        # A masked key's score stays in the softmax, unless it is NaN or infinite.
        student, teacher = (torch.where((keys == 0) & ~side.isfinite(), -math.inf, side) for side in (student, teacher))
    counts = student != -math.inf
    if threshold is not None:
        counts = counts & ~(teacher <= threshold)
    weights = counts.to(student.dtype) if keys is None else torch.where(counts, keys, 0)
    log_p, p = _log_softmax(student)
    _, q = _log_softmax(teacher)
    return _Distributions(p, q, weights, torch.where(counts, log_p, 0))


def forward_rows(student: Tensor, teacher: Tensor, keys: Tensor | None, kind: Kind, threshold: float | None) -> Tensor:
    """Compute the values (...) of two (..., K). Autograd differentiates them for second derivatives."""
    student, teacher = (side.to(rows.compute_dtype(student, teacher)) for side in (student, teacher))
    if kind == "squared_error":
        squares = _differences(student, teacher, keys, threshold)[0].square()
        return (squares if keys is None else squares * keys).sum(-1)
    found = _distributions(student, teacher, keys, threshold)
    return -(found.weights * found.q * found.log_p).sum(-1)


def backward_rows(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | None,
    upstream: Tensor,
    kind: Kind,
    threshold: float | None,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute gradients (..., K) to the sides that need them, in the arithmetic's dtype."""
    student, teacher = (side.to(rows.compute_dtype(student, teacher)) for side in (student, teacher))
    upstream = upstream[..., None]
    if kind == "squared_error":
        difference, student_counts, teacher_counts = _differences(student, teacher, keys, threshold)
        slope = 2 * upstream * (difference if keys is None else difference * keys)
        return (
            torch.where(student_counts, slope, 0) if needs_student else None,
            torch.where(teacher_counts, -slope, 0) if needs_teacher else None,
        )
    p, q, weights, log_p = _distributions(student, teacher, keys, threshold)
    student_gradient = teacher_gradient = None
    if needs_student:
        mass = weights * q
        student_gradient = upstream * (p * mass.sum(-1, keepdim=True) - mass)
    if needs_teacher:
        surprise = -weights * log_p
        teacher_gradient = upstream * q * (surprise - (q * surprise).sum(-1, keepdim=True))
    return student_gradient, teacher_gradient


def forward_rows_on_cpu(
    student: Tensor, teacher: Tensor, keys: Tensor | None, kind: Kind, threshold: float | None
) -> Tensor:
    """Compute `forward_rows` by the quick way if its sums are finite."""
    dtype = rows.compute_dtype(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    if kind == "squared_error":
        terms = (_above(s, threshold) - _above(t, threshold)).square_()
    else:
        terms = _drop_below(t.softmax(-1).mul_(s.log_softmax(-1)), t, threshold).neg_()
    values = (terms if keys is None else terms.mul_(keys)).sum(-1)
    return values if values.isfinite().all() else forward_rows(student, teacher, keys, kind, threshold)


def backward_rows_on_cpu(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor | None,
    upstream: Tensor,
    kind: Kind,
    threshold: float | None,
    needs_student: bool,
    needs_teacher: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute `backward_rows` by the quick way if its sums are finite."""
    dtype = rows.compute_dtype(student, teacher)
    s, t, slope = student.to(dtype), teacher.to(dtype), upstream[..., None]
    student_gradient = teacher_gradient = None
    if kind == "squared_error":
        common = (_above(s, threshold) - _above(t, threshold)).mul_(2 * slope)
        common = common if keys is None else common.mul_(keys)
        quick = bool(common.sum(-1).isfinite().all())
        if needs_teacher:
            teacher_gradient = _drop_below(-common, t, threshold)
        if needs_student:
            student_gradient = _drop_below(common, s, threshold)
    else:
        log_p, mass = s.log_softmax(-1), _drop_below(q := t.softmax(-1), t, threshold, in_place=False)
        mass = mass if keys is None else mass * keys
        surprise = mass * log_p
        total_surprise = surprise.sum(-1, keepdim=True)
        quick = bool(total_surprise.isfinite().all())
        if needs_teacher:
            teacher_gradient = (q * total_surprise).sub_(surprise).mul_(slope)
        if needs_student:
            student_gradient = log_p.exp_().mul_(mass.sum(-1, keepdim=True)).sub_(mass).mul_(slope)
    if quick:
        return student_gradient, teacher_gradient
    return backward_rows(student, teacher, keys, upstream, kind, threshold, needs_student, needs_teacher)


def _above(scores: Tensor, threshold: float | None) -> Tensor:
    """Replace scores at or below the threshold by 0."""
    return scores if threshold is None else F.threshold(scores, threshold, 0.0)


def _drop_below(terms: Tensor, scores: Tensor, threshold: float | None, in_place: bool = True) -> Tensor:
    """Replace the terms of scores at or below the threshold by 0."""
    if threshold is None:
        return terms
    below = scores <= threshold
    return terms.masked_fill_(below, 0) if in_place else terms.masked_fill(below, 0)
