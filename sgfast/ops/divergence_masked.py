r"""Divergences restricted to a support that the caller gives as a dense boolean mask.

The formulas and the meaning of ``truncate``, ``renormalize`` and ``tail`` are those of `divergence`, with S the True
entries of the mask at each position in place of the union of top-k indices. A position without any True entry has no
atoms: its value and gradients are 0.

A mask becomes padded indices as wide as the vocabulary, one chunk of rows at a time, and goes the way of top-k indices
from there. That costs gathers and scatters over V atoms, about four times the work of the whole vocabulary; supports
that are top-k unions are far cheaper as ``divergences(..., top_k=k)``, where S has at most 2k atoms.
"""

from typing import Any

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows, validation
from sgfast.ops.autograd import double_backward
from sgfast.ops.divergence_options import Support, check_options, row_temperature
from sgfast.ops.divergence_reference import reference
from sgfast.ops.divergence_rows import Settings, backward_rows, finish_values, forward_rows

_TRITON_REFUSAL = "a support_mask runs in PyTorch"
# Temporaries alive at once, as a multiple of a row: tests/loss/test_divergences.py counts.
_TEMPORARIES = 27


def _indices(support_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padded indices (rows, V) and which are valid. Padding repeats a valid index; an empty row selects everything."""
    valid = support_mask | ~support_mask.any(-1, keepdim=True)
    positions = torch.arange(valid.shape[-1], device=valid.device).expand(valid.shape)
    last_valid = positions.masked_fill(~valid, -1).amax(-1, keepdim=True)
    return torch.where(valid, positions, last_valid), valid


@torch.library.custom_op("sgfast::masked_divergences", mutates_args=())
def _forward(
    noisy: Tensor,
    clean: Tensor,
    support_mask: Tensor,
    kinds: str,
    support: str,
    mask: Tensor | None,
    temperature: Tensor,
    beta: float,
    skew: float,
    max_chunk_bytes: int,
    impl: str | None,
) -> Tensor:
    """Values (kinds, ...)."""
    body = dispatch.implementation_of(forward_rows, dispatch.select(impl, _TRITON_REFUSAL).implementation)
    dtype = rows.compute_dtype(noisy, clean)
    settings = Settings(tuple(kinds.split(",")), support, beta, skew)
    found = noisy.new_zeros((noisy.shape[:-1].numel(), 3 * len(settings.kinds) + 4), dtype=dtype)
    for chunk in rows.row_chunks(noisy.shape[:-1], mask, _row_bytes(noisy, dtype), max_chunk_bytes):
        chunk_found = body(
            rows.read_rows(noisy, chunk),
            rows.read_rows(clean, chunk),
            1 / rows.read_scalars(temperature, chunk),
            settings,
            *_indices(rows.read_rows(support_mask, chunk)),
        )
        found[chunk] = rows.zero_masked(chunk_found, mask, chunk)
    values, _ = finish_values(found, settings)
    return torch.where(support_mask.any(-1), values.view(len(values), *noisy.shape[:-1]), 0)


@_forward.register_fake
def _(
    noisy: Tensor,
    clean: Tensor,
    support_mask: Tensor,
    kinds: str,
    support: str,
    mask: Tensor | None,
    temperature: Tensor,
    beta: float,
    skew: float,
    max_chunk_bytes: int,
    impl: str | None,
) -> Tensor:
    return noisy.new_empty((len(kinds.split(",")), *noisy.shape[:-1]), dtype=rows.compute_dtype(noisy, clean))


@torch.library.custom_op("sgfast::masked_divergences_backward", mutates_args=())
def _backward(
    noisy: Tensor,
    clean: Tensor,
    upstream: Tensor,
    support_mask: Tensor,
    kinds: str,
    support: str,
    mask: Tensor | None,
    temperature: Tensor,
    beta: float,
    skew: float,
    max_chunk_bytes: int,
    impl: str | None,
    noisy_wanted: bool,
    clean_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to the sides wanted; an unwanted one comes back empty."""
    body = dispatch.implementation_of(backward_rows, dispatch.select(impl, _TRITON_REFUSAL).implementation)
    dtype = rows.compute_dtype(noisy, clean)
    settings = Settings(tuple(kinds.split(",")), support, beta, skew)
    gradients = rows.empty_gradients(noisy, clean, (noisy_wanted, clean_wanted))
    if mask is not None:
        for gradient in gradients:
            gradient.zero_()
    flat_upstream = upstream.reshape(len(settings.kinds), -1)
    for chunk in rows.row_chunks(noisy.shape[:-1], mask, _row_bytes(noisy, dtype), max_chunk_bytes):
        support_rows = rows.read_rows(support_mask, chunk)
        chunk_gradients = body(
            rows.read_rows(noisy, chunk),
            rows.read_rows(clean, chunk),
            1 / rows.read_scalars(temperature, chunk),
            settings,
            *_indices(support_rows),
            flat_upstream[:, chunk],
            (noisy_wanted, clean_wanted),
        )
        for gradient, chunk_gradient in zip(gradients, chunk_gradients, strict=True):
            if chunk_gradient is not None:
                selected = torch.where(support_rows.any(-1, keepdim=True), chunk_gradient, 0)
                selected = rows.zero_masked(selected, mask, chunk)
                gradient.view(-1, gradient.shape[-1])[chunk] = selected.to(gradient.dtype)
    return gradients


@_backward.register_fake
def _(
    noisy: Tensor,
    clean: Tensor,
    upstream: Tensor,
    support_mask: Tensor,
    kinds: str,
    support: str,
    mask: Tensor | None,
    temperature: Tensor,
    beta: float,
    skew: float,
    max_chunk_bytes: int,
    impl: str | None,
    noisy_wanted: bool,
    clean_wanted: bool,
) -> tuple[Tensor, Tensor]:
    return rows.empty_gradients(noisy, clean, (noisy_wanted, clean_wanted))


def _row_bytes(logits: Tensor, dtype: torch.dtype) -> int:
    return logits.shape[-1] * dtype.itemsize * _TEMPORARIES


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    noisy, clean, support_mask, ctx.kinds, ctx.support, mask, temperature, *ctx.options, impl = inputs
    ctx.impl = dispatch.pinned(impl)
    ctx.save_for_backward(noisy, clean, support_mask, mask, temperature)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    noisy, clean, support_mask, mask, temperature = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    support = (support_mask, ctx.kinds, ctx.support)
    gradients = _backward(noisy, clean, upstream, *support, mask, temperature, *ctx.options, ctx.impl, *wanted)
    asked = (gradient if side else None for gradient, side in zip(gradients, wanted, strict=True))
    return *asked, *(None,) * 9


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    noisy, clean, upstream, support_mask, ctx.kinds, ctx.support, mask, temperature, ctx.beta, ctx.skew = inputs[:10]
    _, ctx.impl, *ctx.wanted = inputs[10:]
    ctx.save_for_backward(noisy, clean, upstream, support_mask, mask, temperature)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    noisy, clean, upstream, support_mask, mask, temperature = ctx.saved_tensors
    settings = Settings(tuple(ctx.kinds.split(",")), ctx.support, ctx.beta, ctx.skew)

    def masked_reference(noisy: Tensor, clean: Tensor) -> Tensor:
        dtype = rows.compute_dtype(noisy, clean)
        selected = support_mask.any(-1) if mask is None else support_mask.any(-1) & mask
        # Rows that do not count are replaced before the arithmetic, so that a NaN there cannot reach a gradient.
        noisy, clean = (torch.where(selected[..., None], side, 0).to(dtype) for side in (noisy, clean))
        return torch.where(selected, reference(noisy, clean, settings, *_indices(support_mask), temperature), 0)

    gradients = double_backward(
        "divergences",
        ctx.impl,
        _TRITON_REFUSAL,
        masked_reference,
        (noisy, clean),
        upstream,
        [outer if side_wanted else None for outer, side_wanted in zip(upstream_of_gradients, ctx.wanted, strict=True)],
    )
    return *gradients, *(None,) * 11


_forward.register_autograd(_gradients, setup_context=_setup_context)
_backward.register_autograd(_second_gradients, setup_context=_setup_second_context)


def masked_divergence(
    noisy_logits: Tensor,
    clean_logits: Tensor,
    support_mask: Tensor,
    kind: str,
    *,
    support: Support = "tail",
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    beta: float | None = None,
    skew: float | None = None,
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> Tensor:
    """One divergence per position over the support that ``support_mask`` selects: behind `sgfast.loss.divergences`.

    Args:
        noisy_logits: (..., V), as in `sgfast.ops.divergences`.
        clean_logits: of the same shape.
        support_mask: bool, (..., V) or broadcastable to it: True = in S. It is read as it lies, also when broadcast.
        kind: one of `sgfast.ops.divergences`' kinds.
        support: ``tail``, ``truncate`` or ``renormalize``.
        mask: (...), bool or numbers equal to 0 or 1, 1 = selected.
        temperature: divides both logits; a number or a tensor of shape (...).
        beta: weight of q in the mixture of ``jensen_shannon``; None: 0.5.
        skew: weight of the first argument in the skew kinds' mixture; None: 0.1.
        max_chunk_bytes: bound on temporaries beyond outputs and gradients (at least one row); default 8 MiB.
        impl: ``"triton"`` is refused: there is no kernel.

    Raises:
        TypeError: ``support_mask`` is not a boolean tensor; as `sgfast.ops.divergences`.
        ValueError: its shape or device does not fit; as `sgfast.ops.divergences`.
    """
    validation.check_pair("noisy_logits", noisy_logits, "clean_logits", clean_logits)
    mask = validation.row_mask(mask, "mask", "noisy_logits", noisy_logits)
    _check_support_mask(support_mask, noisy_logits)
    _, beta, skew = check_options(kind, support, beta, skew, impl)
    dispatch.refuse_forward_mode("divergences", noisy_logits, clean_logits)
    values: Tensor = _forward(
        noisy_logits,
        clean_logits,
        support_mask.expand(noisy_logits.shape),
        kind,
        support,
        mask,
        row_temperature(temperature, noisy_logits, clean_logits),
        beta,
        skew,
        validation.chunk_bytes(max_chunk_bytes),
        impl,
    )
    return values.squeeze(0)


def _check_support_mask(support_mask: Tensor, logits: Tensor) -> None:
    if not isinstance(support_mask, Tensor):
        raise TypeError(f"support_mask must be a boolean torch.Tensor or None; got {type(support_mask).__name__}")
    if support_mask.dtype != torch.bool:
        raise TypeError(f"support_mask must be boolean; got {support_mask.dtype}")
    trailing = logits.shape[logits.dim() - support_mask.dim() :]
    if support_mask.dim() > logits.dim() or any(
        size not in (1, full) for size, full in zip(support_mask.shape, trailing, strict=True)
    ):
        raise ValueError(
            f"support_mask must have the logits' shape {tuple(logits.shape)} or broadcast to it; "
            f"got {tuple(support_mask.shape)}"
        )
    validation.check_device("support_mask", support_mask, "noisy_logits", logits)
