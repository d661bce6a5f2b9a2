"""The calls of the operator: values as `sgfast.ops.divergences` returns them, and a loss that makes its gradients."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sgfast.ops import dispatch, validation
from sgfast.ops.divergence.arguments import checked_arguments
from sgfast.ops.divergence.kinds import LABEL_KIND
from sgfast.ops.divergence.problem import Temperature, row_temperatures
from sgfast.ops.linear import products
from sgfast.ops.linear.operator import forward
from sgfast.ops.linear.problem import LinearProblem, Side
from sgfast.ops.precision import full_precision_products
from sgfast.ops.sides import LinearLogits, LogitsOrSide, compute_dtype, tensor_of, tensors_of

# The default bounds of a chunk, by the type of the device. A head is read once or twice for every chunk.
_CPU_CHUNK_BYTES, _GPU_CHUNK_BYTES = 64 * 2**20, 512 * 2**20
# The copies of a head in another dtype, where a caller gives no bound.
_COPY_BYTES = 16 * 2**20


def linear_divergences(
    names: tuple[str, ...], noisy: LogitsOrSide, clean: LogitsOrSide, **checked: Any
) -> dict[str, Tensor]:
    """Compute values per position by kind. `sgfast.ops.divergences` has checked the arguments.

    One kind with frozen heads keeps the gradients of the hidden states. Otherwise backward computes the logits again.
    """
    alone = len(names) == 1 and heads_are_frozen(noisy, clean)
    problem = _problem(names, (1.0,) if alone else (), noisy, clean, "rows" if alone else "none", None, **checked)
    values, loss, *_ = forward(problem)
    return {names[0]: loss} if alone else dict(zip(names, values.unbind(0), strict=True))


def linear_loss(
    noisy: LogitsOrSide,
    clean: LogitsOrSide,
    factors: Mapping[str, float],
    *,
    reduction: Literal["sum", "rows"],
    row_weights: Tensor | None = None,
    temperature: Temperature = 1.0,
    max_chunk_bytes: int | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a weighted sum of kinds, and its gradients in the same pass: no product is made twice.

    Args:
        noisy: the noisy side; one of the sides is a `LinearLogits`.
        clean: the clean side.
        factors: the weight of each kind. With labels ``label_cross_entropy`` is one of the kinds.
        reduction: ``sum`` over all positions; or ``rows`` for a value per position, which needs frozen heads
            (`heads_are_frozen`), because the gradient of a head is a sum over positions.
        row_weights: (...), factors of the positions in the sum, differentiable; none for ``rows``.
        temperature: as in `sgfast.ops.divergences`.
        max_chunk_bytes: as in `sgfast.ops.divergences`.
        options: the other arguments of `sgfast.ops.divergences`.

    Returns:
        The loss, a scalar or (...), differentiable once; and each kind's values (...), without a graph.
    """
    kinds = tuple(kind for kind in factors if kind != LABEL_KIND)
    names, checked = checked_arguments(noisy, clean, kinds, **options)
    checked |= {"temperature": temperature, "max_chunk_bytes": max_chunk_bytes}
    weights = [factors[name] for name in names]
    values, loss, *_ = forward(_problem(names, weights, noisy, clean, reduction, row_weights, **checked))
    return loss, dict(zip(names, values.unbind(0), strict=True))


@torch.no_grad()
def logits_of_rows(side: LinearLogits, hidden: Tensor) -> Tensor:
    """Compute the logits (rows, V) of some hidden states (rows, D) of a side, in the arithmetic's dtype, no graph."""
    dtype, parts = compute_dtype(side), Side(hidden, *head_of(side))
    logits = hidden.new_empty((len(hidden), side.shape[-1]), dtype=dtype)
    with full_precision_products(hidden.device):
        products.write_logits(logits, parts, products.scaled_rows(parts, hidden, dtype), _COPY_BYTES)
    return logits


def heads_are_frozen(*sides: LogitsOrSide) -> bool:
    """Return True if no head of the sides needs a gradient."""
    return not any(any(_wanted(side)[1:]) for side in sides)


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
    tied = _have_onehead_of(noisy, clean)
    noisy_wanted, clean_wanted = _wanted(noisy), _wanted(clean)
    return LinearProblem(
        noisy_input,
        *head_of(noisy)[:2],
        clean_input,
        *((None, None) if tied else head_of(clean)[:2]),
        row_weights=row_weights,
        temperature=noisy_temperature.to(dtype),
        clean_temperature=None if clean_temperature is None else clean_temperature.to(dtype),
        noisy_scale=head_of(noisy)[2],
        noisy_softcap=head_of(noisy)[3],
        clean_scale=head_of(clean)[2],
        clean_softcap=head_of(clean)[3],
        tied=tied,
        kinds=",".join(names),
        factors=tuple(float(factor) for factor in factors),
        reduction=reduction,
        max_chunk_bytes=chunk_bytes(max_chunk_bytes, noisy_input),
        wanted=(*noisy_wanted, clean_wanted[0], *((False, False) if tied else clean_wanted[1:])),
        **checked,
    )


def _have_onehead_of(noisy: LogitsOrSide, clean: LogitsOrSide) -> bool:
    """Return True if both sides have the same weight and bias: their gradients are then added up in one place."""
    both = isinstance(noisy, LinearLogits) and isinstance(clean, LinearLogits)
    return both and noisy.weight is clean.weight and noisy.bias is clean.bias  # type: ignore[union-attr]


def chunk_bytes(max_chunk_bytes: int | None, hidden: Tensor) -> int:
    """Check the bound on all temporaries and fill in the default of the device."""
    if max_chunk_bytes is None:
        return _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else _GPU_CHUNK_BYTES
    return validation.chunk_bytes(max_chunk_bytes)


def head_of(side: LogitsOrSide) -> tuple[Tensor | None, Tensor | None, float, float]:
    """Return weight, bias, scale and soft cap (0 for none) of a side."""
    if not isinstance(side, LinearLogits):
        return None, None, 1.0, 0.0
    return side.weight, side.bias, float(side.scale), float(side.softcap or 0)


def _wanted(side: LogitsOrSide) -> tuple[bool, bool, bool]:
    """Say whether a side's hidden states or logits, weight and bias need a gradient."""
    tensors = (tensor_of(side), *head_of(side)[:2])
    first, second, third = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors
    )
    return first, second, third
