"""Distillation with a Hugging Face ``Trainer``: a ``compute_loss_func`` that knows a teacher."""

import re
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgfast.huggingface.forward_calls import ForwardCalls
from sgfast.huggingface.headless import StudentPasses, TeacherPasses, keep_logits
from sgfast.huggingface.teacher_call import (
    check_separate,
    evaluating,
    is_encoder_decoder,
    teacher_inputs,
    transformers_model,
)
from sgfast.loss.divergence_loss import DivergenceLoss
from sgfast.model.head_weights import HeadWeights
from sgfast.ops.validation import check_bool
from sgfast.sides import LinearLogits

# Class names in transformers of models whose labels belong to their own position or to the whole sequence.
_ALIGNED_MODELS = re.compile(r"For(MaskedLM|\w*Classification)$")


class ComputeLoss(Protocol):
    """Type of the function that ``Trainer(compute_loss_func=…)`` calls."""

    def explain(self) -> str:
        """Say for both models whether their training passes make logits, and why."""
        ...

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute the loss of one micro-batch."""
        ...


def distillation_compute_loss(
    student: nn.Module,
    teacher: Callable[..., Any],
    loss: DivergenceLoss,
    *,
    shift_labels: bool = True,
    from_hidden: bool = True,
) -> ComputeLoss:
    """Make a ``compute_loss_func`` for ``transformers.Trainer`` that trains a student on a teacher.

    The Trainer passes the student's outputs and the labels to such a function, but not the inputs. A forward hook on
    the student therefore remembers the inputs of each forward pass. The teacher is called under ``torch.no_grad()``
    with the inputs of the forward pass that made ``outputs``. The loss equals

        loss(student_logits[:, :-1], teacher_logits[:, :-1], labels=labels[:, 1:], num_items=num_items_in_batch)

    The implementation pads the labels instead of slicing the logits: a slice would cost a second gradient as large as
    the logits.

    Where the student's and the teacher's logits are one product of hidden states and head (checked once against the
    model's own forward), no logits are made: in training steps both models return hidden states in their output's
    ``logits``, and the loss makes logits for a few rows at a time (`sgfast.sides.LinearLogits`). This holds under PEFT
    (also for adapters on the head, without dropout), DistributedDataParallel, fully_shard, mixed precision, gradient
    checkpointing and torch.compile. Evaluation, generation and passes with labels return logits as before.
    ``compute_loss.explain()`` says for both models whether logits are made, and why.

    ``num_items_in_batch`` is the Trainer's count of labels over the accumulation window (with
    ``average_tokens_across_devices``, also over the processes). So 4 micro-batches of 2 examples give the gradient of
    one batch of 8, however the tokens are distributed over them. transformers before 5 also counts the first label of
    each sequence, although no logits predict that label. The loss is the same under every version if the collator sets
    the first label to −100.

    The teacher gets the same tokens, masks and packed sequences (``transformers.DataCollatorWithFlattening``) as the
    student, without a cache: with a cache, transformers would let packed sequences attend to each other. (The Trainer
    switches off the student's cache; before transformers 5, set ``student.config.use_cache = False``.) All modules of
    the teacher are in eval mode during each call, and get their modes back after the call. If the teacher is a
    function, the same holds for the student and for the modules that the function uses (in its closure, globals,
    defaults and attributes).

    A UserWarning appears once if the first training step or the first evaluation has no label that counts.

    Args:
        student: the model that the Trainer trains, before the Trainer wraps it. The hook is removed when the returned
            function is deleted.
        teacher: a module or a function. The call passes the student's arguments without ``labels``, and
            ``use_cache=False`` if the teacher accepts that argument. The result has ``logits`` (an attribute or an
            entry; in a tuple, the first tensor with at least two dimensions). A module must be on the student's device.
            It may share frozen parameters with the student, but no parameters that the student trains. If the teacher
            is the student's own base model, write a function:
            ``def teacher(**inputs): with student.disable_adapter(): return student(**inputs)``.
        loss: a loss with ``reduction="mean"``.
        shift_labels: True for causal language models, whose logits at t predict the label at t + 1. False if labels
            and logits are aligned (classification, masked language models, encoder-decoders).

    Returns:
        ``compute_loss(outputs, labels, num_items_in_batch=None)``. Labels are −100 at positions that do not count.
        The function raises RuntimeError if no known forward pass, or more than one, made ``outputs``; TypeError if
        ``outputs`` has no logits; and ValueError if there are no labels, if ``shift_labels=True`` and labels have no
        sequence dimension, if the student was called with a cache, or if the teacher now has parameters that the
        student trains.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``loss`` has another reduction, the teacher has parameters that the student trains, or
            ``shift_labels=True`` for a model class whose labels are aligned with its logits.

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
    check_bool("from_hidden", from_hidden)
    student_passes = StudentPasses(student) if from_hidden else None
    teacher_passes = TeacherPasses(teacher, student_passes) if student_passes is not None else None
    calls, steps = ForwardCalls((lambda: None) if student_passes is None else student_passes.take), _FirstSteps()
    handle = student.register_forward_hook(calls, with_kwargs=True)

    def compute_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("distillation needs labels, -100 where a position does not count; got None")
        if not calls.has_any():
            raise RuntimeError("compute_loss needs a forward pass of the student since its last call; there was none")
        student_logits = _logits(outputs, "student")
        call = calls.of(student_logits)
        # Checked at each call: adapters may have been injected, or parameters unfrozen, since the last one.
        check_separate(student, teacher)
        arguments, keywords = teacher_inputs(call, student, teacher, student_logits)
        with torch.no_grad(), calls.paused(), evaluating(student, teacher):
            if teacher_passes is None:
                outputs_of_teacher, teacher_head = teacher(*arguments, **keywords), None
            else:
                outputs_of_teacher, teacher_head = teacher_passes.call(teacher, arguments, keywords)
            teacher_logits = _logits(outputs_of_teacher, "teacher")
        if shift_labels:
            labels = _shifted(labels, loss.ignore_index)
        steps.check(labels, num_items_in_batch, loss.ignore_index)
        student_head = None if call.head is None or student_passes is None else student_passes.passes.usable(call.head)
        sides = _side(student_logits, student_head), _side(teacher_logits, teacher_head)
        result: Tensor = loss(*sides, labels=labels, num_items=num_items_in_batch)
        return result

    def explain() -> str:
        """Say for both models whether their training passes make logits, and why."""
        return f"student: {_explained(student_passes)}; teacher: {_explained(teacher_passes)}"

    compute_loss.explain = explain  # type: ignore[attr-defined]
    if student_passes is not None and teacher_passes is not None:
        student_passes.close_after(student)
        weakref.finalize(compute_loss, teacher_passes.remove)
        weakref.finalize(compute_loss, student_passes.remove)
    else:
        weakref.finalize(compute_loss, keep_logits(student))
    weakref.finalize(compute_loss, handle.remove)
    return compute_loss  # type: ignore[return-value]


def _side(output: Tensor, head: HeadWeights | None) -> Tensor | LinearLogits:
    """Return a side of the loss: logits, or the hidden states of a headless pass with the head."""
    return output if head is None else LinearLogits(output, head.weight, head.bias)


def _explained(passes: StudentPasses | TeacherPasses | None) -> str:
    if passes is None:
        return "logits (from_hidden=False)"
    return "hidden states and head" if passes.refusal is None else f"logits, because {passes.refusal}"


def _check_shifted(student: nn.Module) -> None:
    """Raise ValueError for a model whose labels are aligned with its logits."""
    name = type(transformers_model(student)).__name__
    if is_encoder_decoder(student):
        name = f"the encoder-decoder {name}"
    elif not _ALIGNED_MODELS.search(name):
        return
    raise ValueError(f"labels of {name} are not shifted: pass shift_labels=False")


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the next label at each position.

    Labels are shifted instead of logits: the backward pass of sliced logits would make a second gradient of their size.
    """
    if labels.dim() < 2:
        raise ValueError(
            f"labels must have a sequence dimension for shift_labels=True; got the shape {tuple(labels.shape)}. If "
            "labels and logits are aligned, pass shift_labels=False to distillation_compute_loss"
        )
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _logits(outputs: Any, model: str) -> Tensor:
    """Return the logits of a ModelOutput, of a dict, or of the tuple of a model with ``return_dict=False``."""
    if isinstance(outputs, tuple):  # the first entry is a loss if the model was called with labels
        found = next((part for part in outputs if isinstance(part, Tensor) and part.dim() > 1), None)
    else:
        found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"the {model}'s output must have logits; got {type(outputs).__name__}")
    return found


class _FirstSteps:
    """Check that warns once if no label counts: the training would otherwise go on silently with a loss of 0."""

    def __init__(self) -> None:
        self._seen: set[bool] = set()
        self._warned = False

    def check(self, labels: Tensor, num_items: Tensor | int | None, ignore_index: int) -> None:
        """Check the first training step and the first evaluation only: each check synchronises a GPU once."""
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
                "Either all tokens belong to a prompt, or the collator leaves out the labels.",
                stacklevel=3,
            )
