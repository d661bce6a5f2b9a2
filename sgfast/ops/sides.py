"""Sides of a divergence that are not logits: small immutable values, checked when they are made.

`sgfast.sides` exports them. The operations read a side through the functions below, which take logits too.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from sgfast.ops import rows, validation


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits that are not computed yet: hidden states and the head that turns them into logits.

    z = scale · (hidden @ weight.T + bias), then softcap · tanh(z / softcap) where there is a soft cap. The operations
    that take a side compute the logits of a few rows at a time, in float32 (float64 if a tensor is float64). All
    logits never exist at once. Nothing per logit is kept for backward.

    Gradients reach ``hidden``, ``weight`` and ``bias``, each if it requires a gradient. A teacher whose head is the
    student's own trained weight gets ``weight.detach()``. A head on which an adapter adds a delta gets the merged
    weight.

    If both sides have the same ``weight``, ``bias`` and ``scale``, and no soft cap, the difference of the logits is
    the product of the difference of the hidden states. Nearly equal sides then keep their digits.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64: the input of the head (after the final norm).
        weight: (V, D), one of these dtypes.
        bias: (V,), one of these dtypes; None for none. ``-inf`` leaves a column out.
        scale: a finite factor of all logits, not 0, such as Cohere's ``logit_scale``.
        softcap: the positive and finite bound of Gemma's logits; None for none.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes or devices do not fit, or a number is out of range.

    Example:
        >>> import torch
        >>> from sgfast import LinearLogits, divergences
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> student = LinearLogits(torch.tensor([[0.0, 0.0]]), weight)
        >>> teacher = LinearLogits(torch.tensor([[1.0, 2.0]]), weight)
        >>> divergences(student, teacher, "forward_kl")
        {'forward_kl': tensor([0.2662])}
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        validation.check_floating("hidden", self.hidden)
        if self.hidden.dim() == 0 or self.hidden.shape[-1] == 0:
            raise ValueError(f"hidden must have shape (..., D), D at least 1; got {tuple(self.hidden.shape)}")
        validation.check_table("weight", self.weight)
        if self.weight.shape[1] != self.hidden.shape[-1]:
            raise ValueError(
                f"weight must be as wide as hidden, (V, {self.hidden.shape[-1]}); got {tuple(self.weight.shape)}"
            )
        validation.check_device("weight", self.weight, "hidden", self.hidden)
        if self.bias is not None:
            validation.check_floating("bias", self.bias, self.hidden)
            if self.bias.shape != self.weight.shape[:1]:
                raise ValueError(f"bias must have shape ({self.weight.shape[0]},); got {tuple(self.bias.shape)}")
            validation.check_device("bias", self.bias, "hidden", self.hidden)
        validation.check_number("scale", self.scale)
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite and not 0; got {self.scale}")
        if self.softcap is not None:
            validation.check_number("softcap", self.softcap)
            if not 0 < self.softcap < math.inf:
                raise ValueError(f"softcap must be None, or positive and finite; got {self.softcap}")

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits, (..., V)."""
        return self.hidden.shape[:-1] + self.weight.shape[:1]

    def __repr__(self) -> str:
        hidden, weight = tuple(self.hidden.shape), tuple(self.weight.shape)
        options = "".join(
            f", {name}={value}"
            for name, value in (("scale", self.scale), ("softcap", self.softcap))
            if value != (1.0 if name == "scale" else None)
        )
        bias = "" if self.bias is None else f", bias={tuple(self.bias.shape)}"
        return f"LinearLogits(hidden={hidden}, weight={weight}{bias}{options})"


@dataclass(frozen=True, eq=False)
class HeadExpectation:
    """A teacher in D + 1 numbers a position, for a student with the teacher's frozen head.

    A student's cross-entropy − Σ q log p reads the teacher's distribution q through E_q[weight] = Σ q_v weight_v alone,
    because the logits are linear in the hidden states. `sgfast.sides.summarize_teacher` makes the value.

    The value stands for the clean side of ``cross_entropy`` and ``forward_kl``, beside a `LinearLogits` with the same
    weight and bias, both without a gradient, at temperature 1 and without a soft cap. The caller sees to it that the
    weight is the teacher's.

    Args:
        vector: E_q[weight], (..., D), float32, bfloat16, float16 or float64.
        entropy: − Σ q log q in nats, (...).
        expected_bias: E_q[bias], (...), if the head has a bias; else None.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes or devices do not fit.
    """

    vector: Tensor
    entropy: Tensor
    expected_bias: Tensor | None = None

    def __post_init__(self) -> None:
        validation.check_floating("vector", self.vector)
        if self.vector.dim() == 0 or self.vector.shape[-1] == 0:
            raise ValueError(f"vector must have shape (..., D), D at least 1; got {tuple(self.vector.shape)}")
        numbers = {"entropy": self.entropy}
        if self.expected_bias is not None:
            numbers["expected_bias"] = self.expected_bias
        for name, tensor in numbers.items():
            validation.check_floating(name, tensor, self.vector)
            if tensor.shape != self.vector.shape[:-1]:
                raise ValueError(
                    f"{name} must have the row shape {tuple(self.vector.shape[:-1])}; got {tuple(tensor.shape)}"
                )
            validation.check_device(name, tensor, "vector", self.vector)

    def __repr__(self) -> str:
        bias = "" if self.expected_bias is None else f", expected_bias={tuple(self.expected_bias.shape)}"
        return f"HeadExpectation(vector={tuple(self.vector.shape)}, entropy={tuple(self.entropy.shape)}{bias})"


#: The reason why no kernel runs for a `HeadExpectation`.
ONLY_TORCH = "a HeadExpectation runs in PyTorch"
#: A side of a divergence: logits (..., V), or a value that stands for them.
LogitsOrSide = Tensor | LinearLogits
#: A clean side, which may be a summary too.
CleanSide = Tensor | LinearLogits | HeadExpectation


def is_linear(*sides: Any) -> bool:
    """Return True if one of the sides is a `LinearLogits`."""
    return any(isinstance(side, LinearLogits) for side in sides)


def tensor_of(side: CleanSide) -> Tensor:
    """Return the tensor that has a side's rows and device: logits (..., V), hidden states or expectations (..., D)."""
    if isinstance(side, LinearLogits):
        return side.hidden
    return side.vector if isinstance(side, HeadExpectation) else side


def tensors_of(side: CleanSide) -> list[Tensor]:
    """Return a side's tensors."""
    if isinstance(side, HeadExpectation):
        return [side.vector, side.entropy]
    if not isinstance(side, LinearLogits):
        return [side]
    return [one for one in (side.hidden, side.weight, side.bias) if one is not None]


def compute_dtype(*sides: LogitsOrSide) -> torch.dtype:
    """Return float64 if a tensor of a side is float64, else float32."""
    return rows.compute_dtype(*(tensor for side in sides for tensor in tensors_of(side)))


def stand_in(side: LogitsOrSide) -> Tensor:
    """Return logits, or for a `LinearLogits` no rows of logits, with the width, dtype and device of a chunk's."""
    if not isinstance(side, LinearLogits):
        return side
    return side.hidden.new_empty((0, side.shape[-1]), dtype=compute_dtype(side))


def check_sides(first_name: str, first: Any, second_name: str, second: Any) -> None:
    """Check two sides of one shape (..., V), V at least 1, on one device.

    Raises:
        TypeError: a side is neither floating logits nor a `LinearLogits`.
        ValueError: the shapes or the devices differ.
    """
    if isinstance(first, HeadExpectation):
        raise TypeError(f"{first_name} must be logits or a LinearLogits; a HeadExpectation is a clean side")
    if isinstance(second, HeadExpectation):
        return _check_expectation(first_name, first, second_name, second)
    if not is_linear(first, second):
        return validation.check_pair(first_name, first, second_name, second)
    for name, side in ((first_name, first), (second_name, second)):
        if not isinstance(side, LinearLogits):
            validation.check_floating(name, side)
            if side.dim() == 0 or side.shape[-1] == 0:
                raise ValueError(f"{name} needs a last dimension of at least 1; got shape {tuple(side.shape)}")
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have logits of one shape; "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    validation.check_device(second_name, tensor_of(second), first_name, tensor_of(first))
    return None


def _check_expectation(first_name: str, first: Any, second_name: str, second: HeadExpectation) -> None:
    """Check a `HeadExpectation` beside the noisy side."""
    if not isinstance(first, LinearLogits):
        raise TypeError(f"{first_name} must be a LinearLogits beside a HeadExpectation; got {type(first).__name__}")
    if first.hidden.shape != second.vector.shape:
        raise ValueError(
            f"{second_name} must have a vector of the shape of {first_name}'s hidden, {tuple(first.hidden.shape)}; "
            f"got {tuple(second.vector.shape)}"
        )
    validation.check_device(second_name, second.vector, first_name, first.hidden)


def first_columns(first: LogitsOrSide, second: LogitsOrSide, size: int) -> tuple[LogitsOrSide, LogitsOrSide]:
    """Return two sides with their first ``size`` columns. One head of both sides stays one head."""
    found: dict[int, Tensor] = {}

    def cut(tensor: Tensor) -> Tensor:
        return found.setdefault(id(tensor), tensor[:size] if len(tensor) > size else tensor)

    def columns(side: LogitsOrSide) -> LogitsOrSide:
        if not isinstance(side, LinearLogits):
            return side[..., :size]
        bias = None if side.bias is None else cut(side.bias)
        return LinearLogits(side.hidden, cut(side.weight), bias, scale=side.scale, softcap=side.softcap)

    return columns(first), columns(second)
