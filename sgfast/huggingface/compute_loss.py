"""Distillation with a Hugging Face ``Trainer``: a ``compute_loss_func`` that knows a teacher."""

import re
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgfast.huggingface.forward_calls import ForwardCalls
from sgfast.huggingface.teacher_call import (
    check_separate,
    evaluating,
    is_encoder_decoder,
    teacher_inputs,
    transformers_model,
)
from sgfast.loss.divergence_loss import DivergenceLoss
from sgfast.ops.validation import check_bool

# transformers' names of models whose labels belong to the position they stand at, or to the whole sequence.
_ALIGNED_MODELS = re.compile(r"For(MaskedLM|\w*Classification)$")


class ComputeLoss(Protocol):
    """What ``Trainer(compute_loss_func=…)`` calls."""

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of one micro-batch."""
        ...


def distillation_compute_loss(
    student: nn.Module, teacher: Callable[..., Any], loss: DivergenceLoss, *, shift_labels: bool = True
) -> ComputeLoss:
    """Make a ``compute_loss_func`` for ``transformers.Trainer`` that trains a student on a teacher's logits.

    The Trainer shows such a function the student's outputs and the labels, not the inputs. A forward hook on the
    student remembers the inputs of each forward, and the teacher is called with those of the forward that made
    ``outputs``, under ``torch.no_grad()``:

        loss(student_logits[:, :-1], teacher_logits[:, :-1], labels=labels[:, 1:], num_items=num_items_in_batch)

    (with the labels padded rather than the logits sliced, which costs a gradient less).
    ``num_items_in_batch`` is the Trainer's count of labels over the accumulation window (and the processes, with
    ``average_tokens_across_devices``), so 4 × 2 examples give the gradient of 8 however their tokens are spread.
    transformers before 5 counts the first label of each sequence too, which predicts nothing; collators that leave it
    at −100 give the same loss under every version.

    The teacher sees what the student sees: the same tokens, masks and packed sequences
    (``transformers.DataCollatorWithFlattening``), without a cache, under which transformers would let packed sequences
    attend to each other. (The student's own cache is switched off by the Trainer, in transformers before 5 by
    ``student.config.use_cache = False``.) At every call all modules of the teacher are in eval mode; their modes are
    given back after it. A function is treated likewise: the student and the modules that the function uses (its
    closure, globals, defaults, attributes) are in eval mode while it runs.

    A UserWarning says so, once, when the first training step or the first evaluation has no label that counts.

    Args:
        student: the model that the Trainer trains (before the Trainer wraps it). The hook goes when the returned
            function does.
        teacher: called with the student's arguments, without ``labels`` and, where it takes the argument, with
            ``use_cache=False``; its result has ``logits`` (an attribute or an entry; in a tuple the first tensor of two
            dimensions or more). A module belongs on the student's device. It may share frozen parameters with the
            student, but none that the student trains. For the student's own base model write a function:
            ``def teacher(**inputs): with student.disable_adapter(): return student(**inputs)``.
        loss: with ``reduction="mean"``.
        shift_labels: True for causal language models, whose logits at t predict the label at t + 1; False where labels
            and logits are aligned (classification, masked language models, encoder-decoders).

    Returns:
        ``compute_loss(outputs, labels, num_items_in_batch=None)``. It raises RuntimeError where no forward of the
        student is known that made ``outputs``, or several are; TypeError for outputs without logits; ValueError without
        labels (−100 where a position does not count), for labels without a sequence dimension under
        ``shift_labels=True``, for a student that was called with a cache, for a teacher that meanwhile has parameters
        that the student trains.

    Raises:
        TypeError: an argument's type.
        ValueError: another reduction, a teacher with parameters that the student trains, ``shift_labels=True`` for a
            model whose class says that its labels are aligned.

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
    if check_bool("shift_labels", shift_labels):
        _check_shifted(student)
    check_separate(student, teacher)
    calls, steps = ForwardCalls(), _FirstSteps()
    handle = student.register_forward_hook(calls, with_kwargs=True)

    def compute_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("distillation needs labels, -100 where a position does not count; got None")
        if not calls.has_any():
            raise RuntimeError("compute_loss needs a forward pass of the student since its last call; there was none")
        student_logits = _logits(outputs, "student")
        call = calls.of(student_logits)
        # Adapters can have been injected, and parameters unfrozen, since the last call.
        check_separate(student, teacher)
        arguments, keywords = teacher_inputs(call, student, teacher, student_logits)
        with torch.no_grad(), calls.paused(), evaluating(student, teacher):
            teacher_logits = _logits(teacher(*arguments, **keywords), "teacher")
        if shift_labels:
            labels = _shifted(labels, loss.ignore_index)
        steps.check(labels, num_items_in_batch, loss.ignore_index)
        result: Tensor = loss(student_logits, teacher_logits, labels=labels, num_items=num_items_in_batch)
        return result

    weakref.finalize(compute_loss, handle.remove)
    return compute_loss


def _check_shifted(student: nn.Module) -> None:
    """Refuse to shift labels for a model whose labels are aligned with its logits."""
    name = type(transformers_model(student)).__name__
    if is_encoder_decoder(student):
        name = f"the encoder-decoder {name}"
    elif not _ALIGNED_MODELS.search(name):
        return
    raise ValueError(f"labels of {name} are not shifted: pass shift_labels=False")


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """The next label at each position.

    The labels alone are shifted: the backward of sliced logits would make a second gradient of their size.
    """
    if labels.dim() < 2:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} have no sequence dimension along which logits could predict the "
            "next label; pass shift_labels=False to distillation_compute_loss"
        )
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _logits(outputs: Any, model: str) -> Tensor:
    """Logits of a ModelOutput, a dict, or a tuple as models return with ``return_dict=False``."""
    if isinstance(outputs, tuple):  # a loss comes first where the model was given labels
        found = next((part for part in outputs if isinstance(part, Tensor) and part.dim() > 1), None)
    else:
        found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"the {model}'s output must have logits; got {type(outputs).__name__}")
    return found


class _FirstSteps:
    """Says once that nothing counts: the loss would be 0, and the training would go on without a word."""

    def __init__(self) -> None:
        self._seen: set[bool] = set()
        self._warned = False

    def check(self, labels: Tensor, num_items: Tensor | int | None, ignore_index: int) -> None:
        """Look at the first training step and at the first evaluation: on a GPU each costs one synchronisation."""
        training = torch.is_grad_enabled()
        if self._warned or training in self._seen:
            return
        self._seen.add(training)
        counted = bool((labels != ignore_index).any()) or (num_items is not None and int(num_items) > 0)
        if not counted:
            self._warned = True
            where = "training step" if training else "evaluation"
            warnings.warn(
                f"distillation over nothing: every label of the first {where} is {ignore_index}, so the loss is 0. "
                "Are all tokens a prompt, or did the collator leave the labels out?",
                stacklevel=3,
            )
