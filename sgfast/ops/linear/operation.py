"""The calls of the operator: values as `sgfast.ops.divergences` returns them, and a loss that makes its gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.ops import dispatch, validation
from sgfast.ops.divergence.problem import Temperature, row_temperatures
from sgfast.ops.linear.operator import forward
from sgfast.ops.linear.problem import LinearProblem
from sgfast.ops.sides import LinearLogits, LogitsOrSide, compute_dtype, tensor_of, tensors_of

# The default bounds of a chunk, by the type of the device. A head is read once or twice for every chunk.
_CPU_CHUNK_BYTES, _GPU_CHUNK_BYTES = 64 * 2**20, 512 * 2**20


def linear_divergences(
    names: tuple[str, ...], noisy: LogitsOrSide, clean: LogitsOrSide, **checked: Any
) -> dict[str, Tensor]:
    """Compute values per position by kind. `sgfast.ops.divergences` has checked the arguments.

    One kind with frozen heads keeps the gradients of the hidden states. Otherwise backward computes the logits again.
    """
    if len(names) == 1 and not any(_wanted(side)[index] for side in (noisy, clean) for index in (1, 2)):
        values, _ = linear_loss(names, (1.0,), noisy, clean, reduction="rows", **checked)
        return {names[0]: values}
    values, *_ = forward(_problem(names, (), noisy, clean, "none", None, **checked))
    return dict(zip(names, values.unbind(0), strict=True))


def linear_loss(
    names: tuple[str, ...],
    factors: Sequence[float],
    noisy: LogitsOrSide,
    clean: LogitsOrSide,
    *,
    reduction: str,
    row_weights: Tensor | None = None,
    **checked: Any,
) -> tuple[Tensor, Tensor]:
    """Compute a weighted sum of kinds with its gradients, and the values of each kind.

    Args:
        names: the kinds; that of hard labels is the last.
        factors: the weight of each kind.
        noisy: the noisy side.
        clean: the clean side.
        reduction: ``sum`` over all positions; or ``rows`` for a sum per position, which needs frozen heads, because
            the gradient of a head is a sum over positions.
        row_weights: (...), factors of the positions in the sum, differentiable.
        checked: the other arguments of `sgfast.ops.divergences`, checked.

    Returns:
        The loss, a scalar or (...), differentiable once; and the values (kinds, ...), without a graph.
    """
    values, loss, *_ = forward(_problem(names, factors, noisy, clean, reduction, row_weights, **checked))
    return loss, values


def _problem(
    names: tuple[str, ...],
    factors: Sequence[float],
    noisy: LogitsOrSide,
    clean: LogitsOrSide,
    reduction: str,
    row_weights: Tensor | None,
    *,
    temperature: Temperature,
    max_chunk_bytes: int | None,
    **checked: Any,
) -> LinearProblem:
    dispatch.refuse_forward_mode("divergences", *tensors_of(noisy), *tensors_of(clean))
    noisy_input, clean_input = tensor_of(noisy), tensor_of(clean)
    noisy_temperature, clean_temperature = row_temperatures(temperature, noisy_input, clean_input)
    dtype = compute_dtype(noisy, clean)
    tied = _have_one_head(noisy, clean)
    noisy_wanted, clean_wanted = _wanted(noisy), _wanted(clean)
    if max_chunk_bytes is None:
        max_chunk_bytes = _CPU_CHUNK_BYTES if noisy_input.device.type == "cpu" else _GPU_CHUNK_BYTES
    return LinearProblem(
        noisy_input,
        *_head(noisy)[:2],
        clean_input,
        *((None, None) if tied else _head(clean)[:2]),
        row_weights=row_weights,
        temperature=noisy_temperature.to(dtype),
        clean_temperature=None if clean_temperature is None else clean_temperature.to(dtype),
        noisy_scale=_head(noisy)[2],
        noisy_softcap=_head(noisy)[3],
        clean_scale=_head(clean)[2],
        clean_softcap=_head(clean)[3],
        tied=tied,
        kinds=",".join(names),
        factors=tuple(float(factor) for factor in factors),
        reduction=reduction,
        max_chunk_bytes=validation.chunk_bytes(max_chunk_bytes),
        wanted=(*noisy_wanted, clean_wanted[0], *((False, False) if tied else clean_wanted[1:])),
        **checked,
    )


def _have_one_head(noisy: LogitsOrSide, clean: LogitsOrSide) -> bool:
    """Return True if both sides have the same weight and bias: their gradients are then added up in one place."""
    both = isinstance(noisy, LinearLogits) and isinstance(clean, LinearLogits)
    return both and noisy.weight is clean.weight and noisy.bias is clean.bias  # type: ignore[union-attr]


def _head(side: LogitsOrSide) -> tuple[Tensor | None, Tensor | None, float, float]:
    """Return weight, bias, scale and soft cap (0 for none) of a side."""
    if not isinstance(side, LinearLogits):
        return None, None, 1.0, 0.0
    return side.weight, side.bias, float(side.scale), float(side.softcap or 0)


def _wanted(side: LogitsOrSide) -> tuple[bool, bool, bool]:
    """Say whether a side's hidden states or logits, weight and bias need a gradient."""
    tensors = (tensor_of(side), *_head(side)[:2])
    first, second, third = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors
    )
    return first, second, third
