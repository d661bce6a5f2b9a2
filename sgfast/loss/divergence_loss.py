"""A divergence between student and teacher logits, as a module for a training loop."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sgfast.loss.divergence_loss_arguments import check_kind, check_num_items, check_weights, operation_labels
from sgfast.ops import validation
from sgfast.ops.dispatch import Implementation
from sgfast.ops.divergence import divergences
from sgfast.ops.divergence.kinds import LABEL_KIND
from sgfast.ops.divergence.problem import (
    BETA_KINDS,
    DEFAULT_BETA,
    DEFAULT_SKEW,
    SKEW_KINDS,
    Support,
    check_label_smoothing,
    check_labels,
    check_options,
    check_pair_length,
    check_temperature,
    mixture_weight,
)
from sgfast.ops.linear.operation import heads_are_frozen, linear_loss
from sgfast.ops.sides import (
    CleanSide,
    HeadExpectation,
    LinearLogits,
    LogitsOrSide,
    check_sides,
    first_columns,
    is_linear,
    tensor_of,
)
from sgfast.ops.topk.selection import check_k

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")
TopKOf = Literal["both", "student", "teacher"]
# The operation's names of the sides.
_TOP_K_OF = {"both": "both", "student": "noisy", "teacher": "clean"}
# At an end of beta the mixture is one of the two sides. GKD, TRL and Liger give the ends these meanings.
_ENDS = {0.0: "forward_kl", 1.0: "reverse_kl"}


class DivergenceLoss(nn.Module):
    r"""Distillation loss: a divergence between the next-token distributions of student and teacher, and hard labels.

    The loss of every counted position, in nats, is

        loss = (1 − w)·D(student, teacher)·(T² if asked for) + w·CE(student, label)

    D is one of `sgfast.ops.divergences` at temperature T, or a weighted sum of them. p is the student's distribution
    and q the teacher's. CE is the cross-entropy at temperature 1; it is 0 where the label is ``ignore_index``. w is
    ``hard_label_weight``. Both come from the same pass over the logits. The pass keeps nothing per logit for backward
    and never copies the logits.

    With ``mask`` a position counts if its mask is 1. Without ``mask`` it counts if its label is not ``ignore_index``.
    Without labels every position counts. ``weights`` multiply the counted positions; a position of weight 0 does not
    count. Positions that do not count are not read: NaN there reaches neither the loss nor a gradient.

    A side may be a `sgfast.LinearLogits`, hidden states and their head, instead of logits. The logits then never exist
    as a whole. ``mean`` and ``sum`` make all gradients in the forward; ``none`` does so for frozen heads.

    Labels are not shifted. A causal language model's logits at position t predict token t + 1:

        loss(student_logits[:, :-1], teacher_logits[:, :-1], labels=labels[:, 1:])
        loss(student_logits, teacher_logits, labels=F.pad(labels, (0, 1), value=-100)[:, 1:])  # the same

    The slices are read in place, but PyTorch's backward of a slice makes a second gradient as large as the logits. The
    second line shifts the labels alone and saves this gradient.

    Losses of other papers and libraries:

    ================================  =======================================================================
    Hinton et al. 2015                ``"forward_kl", temperature=T, scale_by_temperature_squared=True``
    MiniLLM (Gu et al. 2024)          ``"reverse_kl"`` (its single-step, exact part)
    GKD (Agarwal et al. 2024), TRL    ``"jensen_shannon", beta=β``; β = 0 is ``"forward_kl"``, 1 ``"reverse_kl"``
    DistiLLM (Ko et al. 2024)         ``"skew_forward_kl"``, ``"skew_reverse_kl"`` with ``skew=λ``
    both directions                   ``{"forward_kl": 0.7, "reverse_kl": 0.3}``
    soft labels                       ``"cross_entropy"``
    ================================  =======================================================================

    After a call ``components`` holds the parts of the loss: ``soft``, D·(T² if asked for), and ``hard``, CE. Each part
    is without its factor 1 − w or w, reduced like the loss, and detached, so that ``loss = (1 − w)·soft + w·hard``. A
    part that the loss does not have has no entry. Copies and pickles of the module have no components. A module under
    ``torch.export`` has none either.

    Args:
        kind: one of `sgfast.ops.divergences`' kinds, or a mapping from kinds to finite weights ≥ 0, at least one
            above 0: D is the weighted sum, from one pass. A kind of weight 0 is not computed.
        top_k: restrict D to S, the top-k logits; None for the whole vocabulary.
        top_k_of: the side whose top-k logits make S: ``student``, ``teacher``, or ``both`` for the union.
        support: meaning of the restriction: ``tail`` (one more atom for the rest: a true divergence), ``truncate`` or
            ``renormalize``. No effect without ``top_k``.
        temperature: T > 0, divides both sides' logits in D. A pair (student, teacher) gives each side its own.
        beta: weight of the teacher in the mixture of ``jensen_shannon``, 0 ≤ beta ≤ 1; None: 0.5. At 0 the loss is
            ``forward_kl``, at 1 ``reverse_kl``.
        skew: weight of the first argument in the skew kinds' mixture, 0 ≤ skew < 1; None: 0.1.
        scale_by_temperature_squared: multiply D by T², which keeps the size of its gradient when T changes; for a pair
            of temperatures T is the student's.
        hard_label_weight: w, between 0 and 1. Above 0 every call needs labels. At 1 the loss has no D.
        label_smoothing: the part of a label's weight in CE that is spread evenly over the vocabulary, as in
            ``torch.nn.CrossEntropyLoss``; above 0 it needs ``hard_label_weight`` above 0, and runs in PyTorch.
        ignore_index: the label of positions without a label.
        shared_vocab: n: compare the first n columns only, in D and in CE, when the two sides pad one vocabulary
            differently. Labels must be below n.
        reduction: ``mean``: the sum over counted positions / max(their number, 1), with ``weights`` / the sum of the
            counted positions' weights (0 if that sum is 0); ``sum``; ``none``: a value per position, 0 at positions
            that do not count.
        max_chunk_bytes: as in `sgfast.ops.divergences`, the defaults too.
        impl: see `sgfast.ops.dispatch`.

    Raises:
        TypeError: an argument's type.
        ValueError: an unknown name, a number out of range, ``beta`` or ``skew`` that no kind uses.

    The module has no parameters and no state besides ``components``. The teacher's side is not detached: compute the
    teacher's logits under ``torch.no_grad()`` unless the teacher is trained too.

    Example:
        >>> import torch
        >>> loss = DivergenceLoss("forward_kl", temperature=2.0, scale_by_temperature_squared=True)
        >>> student, teacher = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 4.0], [2.0, 2.0, 2.0]])
        >>> loss(student, teacher)
        tensor(0.8661)
        >>> loss(student, teacher, labels=torch.tensor([2, -100]))
        tensor(1.7322)
        >>> loss(student, teacher, weights=torch.tensor([1.0, 3.0]))
        tensor(0.4330)
        >>> loss
        DivergenceLoss('forward_kl', temperature=2.0, scale_by_temperature_squared=True)
    """

    components: dict[str, Tensor]

    def __init__(
        self,
        kind: str | Mapping[str, float],
        *,
        top_k: int | None = None,
        top_k_of: TopKOf = "both",
        support: Support = "tail",
        temperature: float | tuple[float, float] = 1.0,
        beta: float | None = None,
        skew: float | None = None,
        scale_by_temperature_squared: bool = False,
        hard_label_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        shared_vocab: int | None = None,
        reduction: Reduction = "mean",
        max_chunk_bytes: int | None = None,
        impl: Implementation | None = None,
    ) -> None:
        super().__init__()
        self.kind = check_kind(kind)
        kinds = (self.kind,) if isinstance(self.kind, str) else tuple(self.kind)
        self.beta = mixture_weight("beta", beta, DEFAULT_BETA, BETA_KINDS, kinds)
        self.skew = mixture_weight("skew", skew, DEFAULT_SKEW, SKEW_KINDS, kinds)
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be between 0 and 1; got {beta}")
        self.support: Support = support
        self.impl: Implementation | None = impl
        check_options(tuple(self._kind_weights()), support, impl=impl, **self._used_mixtures())
        validation.check_choice("top_k_of", top_k_of, _TOP_K_OF)
        temperatures = temperature if isinstance(temperature, tuple) else (temperature, temperature)
        check_pair_length(temperatures)
        for one in temperatures:
            check_temperature(one)
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
        check_label_smoothing(label_smoothing)
        if label_smoothing > 0 and hard_label_weight == 0:
            raise ValueError(
                f"label_smoothing={label_smoothing} has no use without hard labels; hard_label_weight must be above 0"
            )
        validation.check_integer("ignore_index", ignore_index)
        validation.check_choice("reduction", reduction, REDUCTIONS)
        validation.chunk_bytes(max_chunk_bytes)
        self.top_k = top_k
        self.top_k_of = top_k_of
        self.temperature = temperature
        self.scale_by_temperature_squared = scale_by_temperature_squared
        self.hard_label_weight = hard_label_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.shared_vocab = shared_vocab
        self.reduction = reduction
        self.max_chunk_bytes = max_chunk_bytes
        self.components = {}

    def forward(
        self,
        student: LogitsOrSide,
        teacher: CleanSide,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: logits (..., V), float32, bfloat16, float16 or float64; row-strided views are read in place. A
                `sgfast.LinearLogits` gives hidden states and their head instead.
            teacher: logits of the same shape (with ``shared_vocab`` the last dimensions may differ), or a
                `sgfast.LinearLogits`, or a `sgfast.sides.HeadExpectation`.
            labels: (...), integers: class indices, or ``ignore_index``. They only choose the counted positions while
                ``hard_label_weight`` is 0.
            mask: (...), bool or numbers equal to 0 or 1, 1 = counted.
            weights: (...), numbers ≥ 0 and finite, differentiable factors of the counted positions.
            num_items: the denominator of ``mean``, at least 1. It replaces the number of counted positions or, with
                ``weights``, the sum of the weights. Give the number over all micro-batches and processes, so that
                gradient accumulation and data parallelism give the gradient of the whole batch.
                (DistributedDataParallel averages gradients: multiply the loss by the number of processes.)

        Returns:
            float32 (float64 if the logits are): a scalar, or (...) under ``reduction="none"``. Without any counted
            position the loss is exactly 0, with a graph and zero gradients.

        Raises:
            TypeError: an argument's type; bool ``weights``, which would be a mask.
            ValueError: shapes or devices differ, no labels although hard labels are weighted, ``num_items`` without
                ``mean``, or a negative number; on a CPU also a mask with other numbers than 0 and 1, and weights that
                are negative, infinite or NaN. On a GPU such weights take part in the loss, because a check of their
                values would stop the queue.
        """
        if isinstance(teacher, HeadExpectation):
            if self.shared_vocab is not None:
                raise ValueError(f"shared_vocab must be None with a HeadExpectation; got {self.shared_vocab}")
            check_sides("student", student, "teacher", teacher)
        else:
            student, teacher = self._shared_columns(student, teacher)
        rows = tensor_of(student)
        labels = self._check_labels(labels, rows)
        mask = validation.row_mask(mask, "mask", "student", rows)
        weights = check_weights(weights, rows)
        check_num_items(num_items, self.reduction)
        if mask is None and labels is not None:
            mask = labels != self.ignore_index
        if weights is not None:
            # Positions that do not count have weight 0, and positions of weight 0 are not read.
            weights = weights if mask is None else torch.where(mask, weights, 0)
            mask = weights != 0
        options = self._options(labels, mask, student.shape[-1])
        if not isinstance(teacher, HeadExpectation) and self._takes_one_pass(student, teacher):
            loss, parts = self._in_one_pass(student, teacher, mask, weights, num_items, options)
        else:
            parts = self._parts(divergences(student, teacher, tuple(self._soft_factors()), **options))
            soft, hard = parts.get("soft"), parts.get("hard")
            if soft is None or hard is None:
                per_position = soft if hard is None else hard
                assert per_position is not None
            else:
                per_position = (1 - self.hard_label_weight) * soft + self.hard_label_weight * hard
            loss = self._reduce(per_position, mask, weights, num_items)
        if not torch.compiler.is_exporting():  # an exported program has no attributes to set
            self.components = {
                name: (loss if len(parts) == 1 else self._reduce(part, mask, weights, num_items)).detach()
                for name, part in parts.items()
            }
        return loss

    def extra_repr(self) -> str:
        """Return the kind and every setting that is not at its default, for ``repr``."""
        defaults = {name: one.default for name, one in inspect.signature(DivergenceLoss).parameters.items()}
        defaults |= {"kind": self.kind, "beta": DEFAULT_BETA, "skew": DEFAULT_SKEW}
        settings = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join((repr(self.kind), *(f"{name}={value!r}" for name, value in settings.items())))

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings for copies and pickles, without the tensors of the last call."""
        return self.__dict__ | {"components": {}}

    def _kind_weights(self) -> dict[str, float]:
        """Return the kinds of D with their weights, without kinds of weight 0. An end of beta has its kind's name."""
        kinds = {self.kind: 1.0} if isinstance(self.kind, str) else self.kind
        found: dict[str, float] = {}
        for kind, weight in kinds.items():
            name = _ENDS.get(self.beta, kind) if kind in BETA_KINDS else kind
            if weight > 0:
                found[name] = found.get(name, 0.0) + weight
        return found

    def _used_mixtures(self) -> dict[str, Any]:
        """Beta and skew, None where no kind that is computed takes them."""
        kinds = self._kind_weights()
        return {
            "beta": self.beta if any(kind in kinds for kind in BETA_KINDS) else None,
            "skew": self.skew if any(kind in kinds for kind in SKEW_KINDS) else None,
        }

    def _shared_columns(self, student: LogitsOrSide, teacher: LogitsOrSide) -> tuple[LogitsOrSide, LogitsOrSide]:
        for name, side in (("student", student), ("teacher", teacher)):
            if not isinstance(side, LinearLogits):
                validation.check_floating(name, side, None if name == "student" else tensor_of(student))
            if self.shared_vocab is not None and (len(side.shape) == 0 or side.shape[-1] < self.shared_vocab):
                raise ValueError(
                    f"{name} needs shared_vocab={self.shared_vocab} columns at least; got shape {tuple(side.shape)}"
                )
        if self.shared_vocab is not None:
            student, teacher = first_columns(student, teacher, self.shared_vocab)
        elif student.shape[:-1] == teacher.shape[:-1] and student.shape != teacher.shape:
            raise ValueError(
                f"student and teacher have {student.shape[-1]} and {teacher.shape[-1]} "
                "columns; shared_vocab=n compares the first n"
            )
        check_sides("student", student, "teacher", teacher)
        return student, teacher

    def _check_labels(self, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        if labels is None and self.hard_label_weight > 0:
            raise ValueError(f"hard_label_weight={self.hard_label_weight} needs labels; got None")
        return check_labels(labels, "student", logits)

    def _takes_one_pass(self, student: LogitsOrSide, teacher: LogitsOrSide) -> bool:
        """Return True if the gradients can be made in the forward: of a sum, or of values per position alone."""
        return is_linear(student, teacher) and (self.reduction != "none" or heads_are_frozen(student, teacher))

    def _soft_factors(self) -> dict[str, float]:
        """Return the kinds of D with their factors in the soft part. There are none if only hard labels count."""
        if self.hard_label_weight == 1:
            return {}
        temperature = self.temperature[0] if isinstance(self.temperature, tuple) else self.temperature
        scale = temperature**2 if self.scale_by_temperature_squared else 1.0
        return {kind: weight * scale for kind, weight in self._kind_weights().items()}

    def _options(self, labels: Tensor | None, mask: Tensor | None, size: int) -> dict[str, Any]:
        """Return the arguments of `divergences` beside the sides and the kinds."""
        mixtures = self._used_mixtures() if self.hard_label_weight < 1 else {"beta": None, "skew": None}
        return mixtures | {
            "top_k": self.top_k,
            "top_k_of": _TOP_K_OF[self.top_k_of],
            "support": self.support,
            "mask": mask,
            "labels": None
            if labels is None or self.hard_label_weight == 0
            else operation_labels(labels, self.ignore_index, size),
            "label_smoothing": self.label_smoothing,
            "temperature": self.temperature,
            "max_chunk_bytes": self.max_chunk_bytes,
            "impl": self.impl,
        }

    def _parts(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of the loss per position, ``soft``, ``hard`` or both, without their factors."""
        parts = {}
        terms = [values[kind] * factor for kind, factor in self._soft_factors().items()]
        if terms:
            parts["soft"] = terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)
        if self.hard_label_weight > 0:
            parts["hard"] = values[LABEL_KIND]
        return parts

    def _in_one_pass(
        self,
        student: LogitsOrSide,
        teacher: LogitsOrSide,
        mask: Tensor | None,
        weights: Tensor | None,
        num_items: int | float | Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss from linear sides, with its gradients in the same pass, and its parts per position."""
        share = 1 - self.hard_label_weight
        factors = {kind: share * factor for kind, factor in self._soft_factors().items()}
        if self.hard_label_weight > 0:
            factors[LABEL_KIND] = self.hard_label_weight
        if self.reduction == "none":
            per_position, values = linear_loss(student, teacher, factors, reduction="rows", **options)
            return self._reduce(per_position, mask, weights, num_items), self._parts(values)
        total, values = linear_loss(student, teacher, factors, reduction="sum", row_weights=weights, **options)
        parts = self._parts(values)
        positions = next(iter(parts.values())).numel()
        return self._divide(total, positions, mask, weights, num_items), parts

    def _reduce(
        self, values: Tensor, mask: Tensor | None, weights: Tensor | None, num_items: int | float | Tensor | None
    ) -> Tensor:
        """Weigh and reduce values per position. Positions that do not count have the value 0."""
        if weights is not None:
            weights = weights.to(values.dtype)
            values = values * weights
        if self.reduction == "none":
            return values
        return self._divide(values.sum(), values.numel(), mask, weights, num_items)

    def _divide(
        self,
        total: Tensor,
        positions: int,
        mask: Tensor | None,
        weights: Tensor | None,
        num_items: int | float | Tensor | None,
    ) -> Tensor:
        """Turn the weighted sum over positions into the loss."""
        if self.reduction == "sum":
            return total
        if isinstance(num_items, Tensor):
            num_items = num_items.reshape(()).to(total)  # another dtype would be the loss's
        if weights is not None:
            divisor = weights.to(total.dtype).sum() if num_items is None else num_items
            return total / (torch.where(divisor == 0, 1, divisor) if isinstance(divisor, Tensor) else divisor or 1)
        count = num_items if num_items is not None else positions if mask is None else mask.sum()
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
