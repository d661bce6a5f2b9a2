"""The losses of the heads of logits in adaptor dictionaries: masks, labels, probability shift, temperature."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sgfast.loss.presets import registry
from sgfast.loss.presets.config import DistillationConfig, is_none
from sgfast.ops import validation


class Head(NamedTuple):
    """The logits of one head, and the rows to compare."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None  # bool, of both sides' row shape
    labels: Tensor | None


class HeadLoss:
    """The kd loss of a configuration for one head."""

    def __init__(self, config: DistillationConfig) -> None:
        validation.check_choice("kd_loss_type", config.kd_loss_type, registry.KD_LOSS_MAP)
        self.loss = registry.KD_LOSS_MAP[config.kd_loss_type]
        self.temperature, self.min_temperature = config.temperature, config.min_temperature
        self.scheduler: Callable[..., Any] | None = None
        if not is_none(config.temperature_scheduler):
            self.scheduler = registry.TEMPERATURE_SCHEDULER[config.temperature_scheduler]
        # A user's function knows (logits_S, logits_T, ...) alone and is given the selected rows.
        self.functions_take_masks = all(
            _takes_mask(function) for function in (self.loss, self.scheduler) if function is not None
        )

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
        """The scalar loss of one head."""
        if mask is not None and not self.functions_take_masks:
            student, teacher = student[mask], teacher[mask]
            mask, labels = None, None if labels is None else labels[mask]
        if labels is not None:
            teacher = shift_probability(teacher, labels)
        masked = {} if mask is None else {"mask": mask}
        temperature: Any = self.temperature
        if self.scheduler is not None:
            temperature = self.scheduler(student, teacher, self.temperature, **masked)
            if self.min_temperature is not None:
                floor = self.min_temperature
                is_tensor = isinstance(temperature, Tensor)
                temperature = temperature.clamp(min=floor) if is_tensor else max(temperature, floor)
        return cast(Tensor, self.loss(student, teacher, temperature, **masked))


def _takes_mask(function: Callable[..., Any]) -> bool:
    return "mask" in inspect.signature(function).parameters


def as_list(values: Any) -> list[Any]:
    """Return a list or tuple as a list, and any other value as a list of one."""
    return list(values) if isinstance(values, list | tuple) else [values]


def pair_heads(
    student_outputs: Mapping[str, Any], teacher_outputs: Mapping[str, Any], probability_shift: bool
) -> list[Head]:
    """Bring the two sides' lists of logits, masks and labels together, head by head.

    Raises:
        ValueError: the lists have different lengths, or shapes do not fit.
    """
    students, teachers = as_list(student_outputs["logits"]), as_list(teacher_outputs["logits"])
    if len(students) != len(teachers):
        raise ValueError(f"the student has {len(students)} heads of logits, the teacher {len(teachers)}")
    student_masks, teacher_masks = (_masks(outputs, len(students)) for outputs in (student_outputs, teacher_outputs))
    labels: list[Tensor | None] = [None] * len(students)
    if probability_shift:
        if "labels" not in student_outputs:
            raise ValueError("probability_shift needs 'labels' in the student's outputs")
        labels = as_list(student_outputs["labels"])
        if len(labels) != len(students):
            raise ValueError(f"probability_shift needs labels for each of {len(students)} heads; got {len(labels)}")
    return [_align(*head) for head in zip(students, teachers, student_masks, teacher_masks, labels, strict=True)]


def _masks(outputs: Mapping[str, Any], heads: int) -> list[Tensor | None]:
    masks = as_list(outputs.get("logits_mask"))
    if len(masks) not in (1, heads):
        raise ValueError(f"logits_mask must be one mask or one for each of {heads} heads; got {len(masks)}")
    return masks if len(masks) == heads else masks * heads


def _align(
    student: Tensor, teacher: Tensor, student_mask: Tensor | None, teacher_mask: Tensor | None, labels: Tensor | None
) -> Head:
    """Return one mask of both sides' rows or, if the sides' masks differ, the rows that each side's mask selects."""
    if labels is not None and labels.shape != student.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(student.shape[:-1])}; got {tuple(labels.shape)}")
    one_mask = student_mask is teacher_mask or student_mask is None or teacher_mask is None
    student_mask, teacher_mask = _applicable(student_mask, student), _applicable(teacher_mask, teacher)
    if student.shape[:-1] == teacher.shape[:-1] and one_mask:
        return Head(student, teacher, teacher_mask if student_mask is None else student_mask, labels)
    if student_mask is not None:
        student = student[student_mask]
        labels = None if labels is None else labels[student_mask]
    if teacher_mask is not None:
        teacher = teacher[teacher_mask]
    return Head(student, teacher, None, labels)


def _applicable(mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """Return the mask of (B, L, V) logits, and None for logits of one row per sample, which have no positions."""
    if mask is None or logits.dim() != 3:
        return None
    if mask.shape != logits.shape[:-1]:
        raise ValueError(f"logits_mask must have shape {tuple(logits.shape[:-1])}; got {tuple(mask.shape)}")
    return validation.as_bool("logits_mask", mask)


def shift_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Exchange, in every row, the logit of the label and the largest one, in a copy.

    Args:
        logits: (..., V).
        labels: (...), below 0 = leave the row as it is.

    Example:
        >>> import torch
        >>> shift_probability(torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0]]), torch.tensor([2, -100]))
        tensor([[1., 2., 5.],
                [1., 5., 2.]])
    """
    largest = logits.argmax(-1, keepdim=True)
    labelled = torch.where(labels[..., None] < 0, largest, labels[..., None])
    swapped = logits.scatter(-1, largest, logits.gather(-1, labelled))
    return swapped.scatter(-1, labelled, logits.gather(-1, largest))
