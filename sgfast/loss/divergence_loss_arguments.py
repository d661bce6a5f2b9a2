"""Checks of the arguments of `DivergenceLoss`."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sgfast.ops import validation
from sgfast.ops.divergence.problem import check_kinds


def check_kind(kind: str | Mapping[str, float]) -> str | dict[str, float]:
    """Check a kind, or kinds and their weights, and return a copy."""
    if isinstance(kind, str):
        check_kinds("kind", (kind,))
        return kind
    if not isinstance(kind, Mapping):
        raise TypeError(f"kind must be a string or a mapping from kinds to weights; got {type(kind).__name__}")
    check_kinds("kind", kind)
    for name, weight in kind.items():
        validation.check_number(f"kind[{name!r}]", weight)
        if not 0 <= weight < math.inf:
            raise ValueError(f"kind[{name!r}] must be a finite weight of at least 0; got {weight}")
    if not any(weight > 0 for weight in kind.values()):
        raise ValueError(f"kind must have a weight above 0; got {dict(kind)}")
    return dict(kind)


def check_weights(weights: Tensor | None, student: Tensor) -> Tensor | None:
    """Check factors of positions, of the row shape of ``student``."""
    if weights is None:
        return None
    validation.check_tensor("weights", weights, "a torch.Tensor or None", student)
    if weights.dtype == torch.bool:
        raise TypeError(f"weights must be real numbers; got {weights.dtype} (a bool tensor is a mask)")
    if weights.shape != student.shape[:-1]:
        raise ValueError(f"weights must have the row shape {tuple(student.shape[:-1])}; got {tuple(weights.shape)}")
    validation.check_device("weights", weights, "student", student)
    if validation.values_are_at_hand(weights):
        wrong = weights[~((weights >= 0) & (weights < math.inf))]
        if wrong.numel() > 0:
            raise ValueError(f"weights must be finite and at least 0; got {wrong[0].item():.6g}")
    return weights


def operation_labels(labels: Tensor, ignore_index: int, size: int) -> Tensor:
    """Translate ``ignore_index`` for `divergences`, which ignores every negative label."""
    if validation.values_are_at_hand(labels):
        stray = labels[(labels < 0) & (labels != ignore_index)]
        if stray.numel() > 0:
            raise ValueError(f"labels must be class indices or ignore_index={ignore_index}; got {stray[0]}")
    return torch.where(labels == ignore_index, -1, torch.where(labels < 0, size, labels))


def check_num_items(num_items: int | float | Tensor | None, reduction: str) -> None:
    """Check the denominator of a mean."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items belongs to reduction='mean'; got reduction={reduction!r}")
    if not isinstance(num_items, int | float | Tensor):
        raise TypeError(f"num_items must be a number, a one-element tensor or None; got {type(num_items).__name__}")
    if isinstance(num_items, Tensor):
        validation.check_tensor("num_items", num_items)
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element; got shape {tuple(num_items.shape)}")
    elif num_items < 0:
        raise ValueError(f"num_items must not be negative; got {num_items}")
