"""The arguments of the operator ``sgfast::linear_divergences``, and how one chunk of its rows is a smaller problem."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.ops import rows
from sgfast.ops.divergence.problem import Problem

# The arguments that have a gradient, in the order of the gradients.
DIFFERENTIABLE = ("noisy", "noisy_weight", "noisy_bias", "clean", "clean_weight", "clean_bias")


class Side(NamedTuple):
    """One side: hidden states (..., D) and their head, or logits (..., V) if there is no weight."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: float
    softcap: float  # 0: none


class LinearProblem(NamedTuple):
    """The arguments of the operator ``sgfast::linear_divergences``; backward's has them too."""

    noisy: Tensor  # hidden states, or logits if there is no weight
    noisy_weight: Tensor | None
    noisy_bias: Tensor | None
    clean: Tensor
    clean_weight: Tensor | None
    clean_bias: Tensor | None
    labels: Tensor | None
    support_mask: Tensor | None
    mask: Tensor | None
    row_weights: Tensor | None  # of the row shape: factors of the values in the sum
    temperature: Tensor  # of the row shape
    clean_temperature: Tensor | None
    noisy_scale: float
    noisy_softcap: float
    clean_scale: float
    clean_softcap: float
    tied: bool  # the clean side has the noisy side's weight and bias, which are given once
    kinds: str  # joined by commas; that of hard labels is the last
    factors: Sequence[float]  # of the kinds in the loss
    reduction: str  # of the loss: "sum", "rows", or "none" if there is no loss, only values
    top_k: int
    top_k_of: str
    support: str
    beta: float
    skew: float
    label_smoothing: float
    max_chunk_bytes: int
    impl: str | None
    wanted: Sequence[bool]  # the arguments of DIFFERENTIABLE whose gradient is asked for

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both sides: noisy, clean."""
        clean_weight, clean_bias = self.clean_weight, self.clean_bias
        if self.tied:
            clean_weight, clean_bias = self.noisy_weight, self.noisy_bias
        return (
            Side(self.noisy, self.noisy_weight, self.noisy_bias, self.noisy_scale, self.noisy_softcap),
            Side(self.clean, clean_weight, clean_bias, self.clean_scale, self.clean_softcap),
        )

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The names of the kinds; the kind of hard labels is the last."""
        return tuple(self.kinds.split(","))

    @property
    def row_shape(self) -> torch.Size:
        """The shape of a value."""
        return self.noisy.shape[:-1]

    @property
    def width(self) -> int:
        """The size of the vocabulary."""
        side = self.sides[0]
        return (side.input if side.weight is None else side.weight.mT).shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return rows.compute_dtype(*(one for side in self.sides for one in side[:3] if one is not None))

    @property
    def differentiable(self) -> list[Tensor | None]:
        """The arguments that have a gradient."""
        return [getattr(self, name) for name in DIFFERENTIABLE]

    @property
    def sides_wanted(self) -> tuple[bool, bool]:
        """The sides whose logits need a gradient: noisy, clean."""
        return any(self.wanted[:3]), any(self.wanted[3:]) or (self.tied and any(self.wanted[1:3]))

    def chunk(self, place: Tensor | slice, noisy: Tensor, clean: Tensor, max_chunk_bytes: int) -> Problem:
        """Return the divergences of some rows, whose logits are ``noisy`` and ``clean``, (rows, V)."""

        def scalars(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else rows.read_scalars(tensor, place)[:, 0]

        temperature = scalars(self.temperature)
        assert temperature is not None
        noisy_wanted, clean_wanted = self.sides_wanted
        return Problem(
            noisy,
            clean,
            labels=scalars(self.labels),
            support_mask=None if self.support_mask is None else rows.read_rows(self.support_mask, place),
            mask=None,
            temperature=temperature,
            clean_temperature=scalars(self.clean_temperature),
            kinds=self.kinds,
            top_k=self.top_k,
            top_k_of=self.top_k_of,
            support=self.support,
            beta=self.beta,
            skew=self.skew,
            label_smoothing=self.label_smoothing,
            max_chunk_bytes=max_chunk_bytes,
            impl=self.impl,
            noisy_wanted=noisy_wanted,
            clean_wanted=clean_wanted,
        )


def share_a_head(noisy: Side, clean: Side) -> bool:
    """Return True if the difference of the logits is the product of the difference of the hidden states.

    Heads are compared by their places in memory, so that ``weight.detach()`` is the same head.
    """
    if noisy.weight is None or clean.weight is None or noisy.softcap or clean.softcap or noisy.scale != clean.scale:
        return False
    return _is_same(noisy.weight, clean.weight) and _is_same(noisy.bias, clean.bias)


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
