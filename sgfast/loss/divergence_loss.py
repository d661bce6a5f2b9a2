"""A divergence between student and teacher logits as a module to drop into a training loop."""

from typing import Literal

import torch
from torch import Tensor, nn

from sgfast.loss.components import masked_mean
from sgfast.ops import validation
from sgfast.ops.dispatch import Implementation
from sgfast.ops.divergence import divergences
from sgfast.ops.divergence_options import Support, check_labels, check_options, check_temperature
from sgfast.ops.divergence_rows import LABEL_KIND
from sgfast.ops.topk import check_k

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


class DivergenceLoss(nn.Module):
    r"""Distillation loss: a divergence between the next-token distributions of student and teacher, and hard labels.

    For every counted position, in nats:

        loss = (1 − w)·D(student, teacher)·(T² if asked for) + w·CE(student, label)

    D is one of `sgfast.ops.divergences` at temperature T, with p the student and q the teacher; CE is the cross-entropy
    at temperature 1, 0 where the label is ``ignore_index``; w is ``hard_label_weight``. Both come from the same pass
    over the logits, which keeps nothing per logit for backward and never copies them.

    A position counts where ``mask`` is nonzero; without ``mask``, where its label is not ``ignore_index``; without
    labels, everywhere. Positions that do not count are not read: NaN there reaches neither the loss nor a gradient.

    Labels are not shifted. A causal language model's logits at position t predict token t + 1:

        loss(student_logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:])
        loss(student_logits, teacher_logits, F.pad(labels, (0, 1), value=-100)[:, 1:])  # the same

    The slices are read in place, but PyTorch's backward of a slice makes a second gradient as large as the logits;
    shifting the labels alone, as the second line does, saves it.

    The losses that others offer:

    ================================  =======================================================================
    Hinton et al. 2015                ``"forward_kl", temperature=T, scale_by_temperature_squared=True``
    MiniLLM (Gu et al. 2024)          ``"reverse_kl"`` (its single-step, exact part)
    GKD (Agarwal et al. 2024)         ``"jensen_shannon", beta=β``; at β = 0 ``"forward_kl"``, at 1 ``"reverse_kl"``
    DistiLLM (Ko et al. 2024)         ``"skew_forward_kl"``, ``"skew_reverse_kl"`` with ``skew=λ``
    soft labels                       ``"cross_entropy"``
    ================================  =======================================================================

    Args:
        kind: one of `sgfast.ops.divergences`' kinds.
        top_k: restrict D to the union of both sides' top-k logits; None for the whole vocabulary.
        support: what the restriction means: ``tail`` (one more atom for the rest: a true divergence), ``truncate`` or
            ``renormalize``. No effect without ``top_k``.
        temperature: T > 0, divides both sides' logits in D.
        beta: weight of the teacher in the Jensen–Shannon mixture, 0 < beta < 1.
        skew: weight of the first argument in the skew kinds' mixture, 0 ≤ skew < 1.
        scale_by_temperature_squared: multiply D by T², which keeps the size of its gradient when T changes.
        hard_label_weight: w, between 0 and 1; above 0 every call needs labels, and at 1 D has no part.
        ignore_index: the label that says "no label here".
        shared_vocab: compare the first n columns only, D and CE alike, when the two sides pad one vocabulary
            differently. Labels must be below n.
        reduction: ``mean``: the sum over counted positions / max(their number, 1); ``sum``; ``none``: per position, 0
            where it does not count.
        impl: see `sgfast.ops.dispatch`.

    Raises:
        TypeError: an argument's type.
        ValueError: an unknown name, a number out of range.

    The module has no parameters and no state. The teacher's side is not detached: compute its logits under
    ``torch.no_grad()`` unless it is to be trained too.

    Example:
        >>> import torch
        >>> loss = DivergenceLoss("forward_kl", temperature=2.0, scale_by_temperature_squared=True)
        >>> student, teacher = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 4.0], [2.0, 2.0, 2.0]])
        >>> loss(student, teacher)
        tensor(0.8661)
        >>> loss(student, teacher, labels=torch.tensor([2, -100]))
        tensor(1.7322)
    """

    def __init__(
        self,
        kind: str,
        *,
        top_k: int | None = None,
        support: Support = "tail",
        temperature: float = 1.0,
        beta: float = 0.5,
        skew: float = 0.1,
        scale_by_temperature_squared: bool = False,
        hard_label_weight: float = 0.0,
        ignore_index: int = -100,
        shared_vocab: int | None = None,
        reduction: Reduction = "mean",
        impl: Implementation | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(kind, str):
            raise TypeError(f"kind must be a string; got {type(kind).__name__}")
        check_options(kind, support, beta, skew, impl)
        check_temperature(temperature)
        for name, count in (("top_k", top_k), ("shared_vocab", shared_vocab)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
                raise TypeError(f"{name} must be an int or None; got {type(count).__name__}")
            if count is not None and count < 1:
                raise ValueError(f"{name} must be None or at least 1; got {count}")
        if top_k is not None and shared_vocab is not None:
            check_k("top_k", top_k, shared_vocab)
        validation.check_number("hard_label_weight", hard_label_weight)
        if not 0 <= hard_label_weight <= 1:
            raise ValueError(f"hard_label_weight must be between 0 and 1; got {hard_label_weight}")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an int; got {type(ignore_index).__name__}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
        self.kind = kind
        self.top_k = top_k
        self.support = support
        self.temperature = temperature
        self.beta = beta
        self.skew = skew
        self.scale_by_temperature_squared = scale_by_temperature_squared
        self.hard_label_weight = hard_label_weight
        self.ignore_index = ignore_index
        self.shared_vocab = shared_vocab
        self.reduction = reduction
        self.impl = impl

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student_logits: (..., V), float32, bfloat16, float16 or float64; row-strided views are read in place.
            teacher_logits: of the same shape (with ``shared_vocab`` the last dimensions may differ).
            labels: (...), integers: class indices, or ``ignore_index``. They only choose the counted positions while
                ``hard_label_weight`` is 0.
            mask: (...), nonzero = counted.
            num_items: what ``mean`` divides by in place of the number of counted positions, at least 1: the count over
                all micro-batches and processes, so that gradient accumulation and data parallelism give the gradient of
                the whole batch. (DistributedDataParallel averages gradients: multiply the loss by the number of
                processes.)

        Returns:
            float32 (float64 if the logits are): a scalar, or (...) under ``reduction="none"``. No counted position
            gives exactly 0, with a graph and zero gradients.

        Raises:
            TypeError: an argument's type.
            ValueError: shapes or devices differ, no labels although hard labels are weighted, ``num_items`` without
                ``mean``, or a negative number.
        """
        student_logits, teacher_logits = self._shared_columns(student_logits, teacher_logits)
        labels = self._check_labels(labels, student_logits)
        mask = validation.row_mask(mask, "mask", "student_logits", student_logits)
        self._check_num_items(num_items)
        if mask is None and labels is not None:
            mask = labels != self.ignore_index
        per_position = self._per_position(student_logits, teacher_logits, labels, mask)
        if self.reduction == "none":
            return per_position
        if self.reduction == "sum":
            return per_position.sum()
        if mask is None:
            mask = torch.ones_like(per_position, dtype=torch.bool)
        if isinstance(num_items, Tensor):
            num_items = num_items.reshape(()).to(per_position)  # another dtype would be the loss's
        return masked_mean(per_position, mask, num_items)

    def extra_repr(self) -> str:
        """The settings that choose the formula, for ``repr``."""
        return (
            f"{self.kind!r}, top_k={self.top_k}, temperature={self.temperature}, "
            f"hard_label_weight={self.hard_label_weight}, reduction={self.reduction!r}"
        )

    def _shared_columns(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        sides = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        for name, logits in sides.items():
            validation.check_floating(name, logits, None if name == "student_logits" else student_logits)
            if self.shared_vocab is not None and (logits.dim() == 0 or logits.shape[-1] < self.shared_vocab):
                raise ValueError(
                    f"{name} needs shared_vocab={self.shared_vocab} columns at least; got shape {tuple(logits.shape)}"
                )
        if self.shared_vocab is not None:
            student_logits, teacher_logits = (logits[..., : self.shared_vocab] for logits in sides.values())
        elif student_logits.shape[:-1] == teacher_logits.shape[:-1] and student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student_logits and teacher_logits have {student_logits.shape[-1]} and {teacher_logits.shape[-1]} "
                "columns; shared_vocab=n compares the first n"
            )
        validation.check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
        return student_logits, teacher_logits

    def _check_labels(self, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        if labels is None and self.hard_label_weight > 0:
            raise ValueError(f"hard_label_weight={self.hard_label_weight} needs labels; got None")
        return check_labels(labels, "student_logits", logits)

    def _check_num_items(self, num_items: int | float | Tensor | None) -> None:
        if num_items is None:
            return
        if self.reduction != "mean":
            raise ValueError(f"num_items belongs to reduction='mean'; got reduction={self.reduction!r}")
        if not isinstance(num_items, int | float | Tensor):
            raise TypeError(f"num_items must be a number, a one-element tensor or None; got {type(num_items).__name__}")
        if isinstance(num_items, Tensor):
            validation.check_tensor("num_items", num_items)
            if num_items.numel() != 1:
                raise ValueError(f"num_items must have one element; got shape {tuple(num_items.shape)}")
        elif num_items < 0:
            raise ValueError(f"num_items must not be negative; got {num_items}")

    def _per_position(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        weight = self.hard_label_weight
        values = divergences(
            student_logits,
            teacher_logits,
            (self.kind,) if weight < 1 else (),
            top_k=self.top_k,
            support=self.support,
            mask=mask,
            labels=None if labels is None or weight == 0 else self._operation_labels(labels, student_logits.shape[-1]),
            temperature=self.temperature,
            beta=self.beta,
            skew=self.skew,
            impl=self.impl,
        )
        if weight == 1:
            return values[LABEL_KIND]
        scale = self.temperature**2 if self.scale_by_temperature_squared else 1.0
        soft = values[self.kind] * ((1 - weight) * scale)
        return soft if weight == 0 else soft + weight * values[LABEL_KIND]

    def _operation_labels(self, labels: Tensor, size: int) -> Tensor:
        """The operation ignores every negative label; here one alone is meant, and others are out of range."""
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            stray = labels[(labels < 0) & (labels != self.ignore_index)]
            if stray.numel() > 0:
                raise ValueError(f"labels must be class indices or ignore_index={self.ignore_index}; got {stray[0]}")
        return torch.where(labels == self.ignore_index, -1, torch.where(labels < 0, size, labels))
