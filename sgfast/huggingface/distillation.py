"""Distillation with a Hugging Face ``Trainer``: a ``compute_loss_func`` that knows a teacher."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgfast.loss.divergence_loss import DivergenceLoss


class ComputeLoss(Protocol):
    """What ``Trainer(compute_loss_func=…)`` calls."""

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of one micro-batch."""
        ...


def distillation_compute_loss(
    student: nn.Module, teacher: Callable[..., Any], loss: DivergenceLoss, *, shift_labels: bool = True
) -> ComputeLoss:
    """Make a ``compute_loss_func`` for ``transformers.Trainer`` that trains a student on a teacher's logits.

    The Trainer shows such a function the student's outputs and the labels, not the inputs. A pre-forward hook on the
    student remembers them, and the teacher is called with the same under ``torch.no_grad()``:

        loss(student_logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], num_items=num_items_in_batch)

    (with the labels padded rather than the logits sliced, which costs a gradient less).
    ``num_items_in_batch`` is the Trainer's count of labels over the accumulation window (and the processes, with
    ``average_tokens_across_devices``), so 4 × 2 examples give the gradient of 8 however their tokens are spread.
    transformers before 5 counts the first label of each sequence too, which predicts nothing; collators that leave it
    at −100 give the same loss under every version.

    Args:
        student: the model that the Trainer trains (before the Trainer wraps it). The hook goes when the returned
            function does.
        teacher: called with the student's arguments, without ``labels``; its result has ``logits``
            (an attribute or an entry; in a tuple the first tensor of two dimensions or more). A module is put
            into eval mode and belongs on the student's device. For the student's own base model write a function:
            ``def teacher(**inputs): with student.disable_adapter(): return student(**inputs)``.
        loss: with ``reduction="mean"``.
        shift_labels: True for causal language models, whose logits at t predict the label at t + 1; False where labels
            and logits are aligned (classification, encoder-decoders).

    Returns:
        ``compute_loss(outputs, labels, num_items_in_batch=None)``. It raises RuntimeError without a forward of the
        student since its last call, TypeError for outputs without logits, ValueError without labels (−100 where a
        position does not count).

    Raises:
        TypeError: an argument's type.
        ValueError: another reduction.

    Example:
        >>> def train(student, teacher, arguments, dataset):
        ...     loss = DivergenceLoss("forward_kl", temperature=2.0, scale_by_temperature_squared=True)
        ...     compute_loss = distillation_compute_loss(student, teacher, loss)
        ...     return transformers.Trainer(student, arguments, train_dataset=dataset, compute_loss_func=compute_loss)
    """
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module; got {type(student).__name__}")
    if not callable(teacher):
        raise TypeError(f"teacher must be a module or a function; got {type(teacher).__name__}")
    if not isinstance(loss, DivergenceLoss):
        raise TypeError(f"loss must be a DivergenceLoss; got {type(loss).__name__}")
    if loss.reduction != "mean":
        raise ValueError(f"loss must have reduction='mean'; got {loss.reduction!r}")
    if isinstance(teacher, nn.Module) and teacher is not student:
        teacher.eval()
    inputs = _LastInputs()
    handle = student.register_forward_pre_hook(inputs, with_kwargs=True)

    def compute_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("distillation needs labels, -100 where a position does not count; got None")
        arguments, keywords = inputs.take()
        with torch.no_grad():
            teacher_logits = _logits(teacher(*arguments, **keywords), "teacher")
        inputs.clear()  # a teacher that is the student has filled them again
        if shift_labels:  # the labels alone: the backward of sliced logits would make a second gradient of their size
            labels = nn.functional.pad(labels, (0, 1), value=loss.ignore_index)[..., 1:]
        student_logits = _logits(outputs, "student")
        result: Tensor = loss(student_logits, teacher_logits, labels=labels, num_items=num_items_in_batch)
        return result

    weakref.finalize(compute_loss, handle.remove)
    return compute_loss


def _logits(outputs: Any, model: str) -> Tensor:
    """Logits of a ModelOutput, a dict, or a tuple as models return with ``return_dict=False``."""
    if isinstance(outputs, tuple):  # a loss comes first where the model was given labels
        found = next((part for part in outputs if isinstance(part, Tensor) and part.dim() > 1), None)
    else:
        found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"the {model}'s output must have logits; got {type(outputs).__name__}")
    return found


class _LastInputs:
    """What a module was last called with, as its pre-forward hook saw it."""

    # What the teacher must not see, and a cache that must not be kept alive.
    _DROPPED = ("labels", "num_items_in_batch", "past_key_values")

    def __init__(self) -> None:
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._inputs = arguments, {name: value for name, value in keywords.items() if name not in self._DROPPED}

    def __getstate__(self) -> dict[str, Any]:
        return {"_inputs": None}  # a copied student must not carry a batch

    def take(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._inputs is None:
            raise RuntimeError("compute_loss needs a forward pass of the student since its last call")
        taken = self._inputs
        self.clear()
        return taken

    def clear(self) -> None:
        self._inputs = None
