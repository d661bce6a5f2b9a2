r"""Divergences between two sets of logits at every position, any number of kinds from the same reads.

For logits x (noisy, student) and y (clean, teacher) of shape (..., V) and temperature T:

    p = softmax(x/T), q = softmax(y/T)
    forward_kl         KL(q‖p) = Σ q (log q − log p)                                       nats
    reverse_kl         KL(p‖q)
    jeffreys           KL(p‖q) + KL(q‖p)
    jensen_shannon     beta·KL(q‖m) + (1−beta)·KL(p‖m), m = beta·q + (1−beta)·p
    total_variation    ½ Σ |p − q|
    squared_hellinger  ½ Σ (√p − √q)²
    cross_entropy      − Σ q log p
    skew_forward_kl    KL(q‖skew·q + (1−skew)·p)         (Ko et al. 2024, DistiLLM)
    skew_reverse_kl    KL(p‖skew·p + (1−skew)·q)

With hard labels one more, always over the whole vocabulary and at temperature 1:

    label_cross_entropy  − Σ w log softmax(x), gradient softmax(x) − w, w = (1 − ε)·onehot(label) + ε/V

``top_k`` restricts the sums to S, the union of both sides' top-k indices or one side's (constant for the gradient):

    truncate     the terms in S of the full-vocabulary p and q
    renormalize  softmax over S on both sides
    tail         S and one more atom with the rest of the mass

Gradients: with A_i, B_i the partial derivatives with respect to log p_i and log q_i,
∂/∂x_i = (A_i − p_i Σ A) / T and ∂/∂y_i = (B_i − q_i Σ B) / T. Nothing per logit is kept for backward: it reads the
logits again; sums over a row are kept. `divergence_rows` goes from logits to atoms and back; `divergence_terms` has the
terms and partials in forms that keep their digits. The Triton kernels, of ``sgfast_kernels``, are ``lse``,
``divergence`` and ``divergence_backward``; with ``top_k``, ``topk``, ``divergence_topk`` and
``divergence_topk_backward``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.ops import dispatch, divergence_triton, rows, topk, validation
from sgfast.ops.autograd import double_backward
from sgfast.ops.divergence_chunks import forward_of, make_settings, no_support, read_labels, read_logits, row_chunks
from sgfast.ops.divergence_options import (
    TOP_K_OF,
    Support,
    TopKOf,
    check_label_smoothing,
    check_label_values,
    check_labels,
    check_options,
    row_temperature,
)
from sgfast.ops.divergence_reference import reference
from sgfast.ops.divergence_rows import LABEL_KIND, Settings, finish_values, write_gradients


def _triton_refusal(
    noisy: Tensor, clean: Tensor, mask: Tensor | None, top_k: int, label_smoothing: float
) -> str | None:
    return divergence_triton.refusal(noisy, clean, top_k=top_k, mask=mask, label_smoothing=label_smoothing)


@torch.library.custom_op("sgfast::divergences", mutates_args=())
def _forward(
    noisy: Tensor,
    clean: Tensor,
    labels: Tensor | None,
    kinds: str,
    top_k: int,
    top_k_of: str,
    support: str,
    mask: Tensor | None,
    temperature: Tensor,
    beta: float,
    skew: float,
    label_smoothing: float,
    max_chunk_bytes: int,
    impl: str | None,
    noisy_wanted: bool = True,
    clean_wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (kinds, ...), the support's int32 indices (..., min(2k, V) or k), −1 where invalid, and row scalars.

    The row scalars (4 + 2·kinds, ...), 8 + 2·kinds with top_k, are for the backward of the implementation that ran,
    towards the sides wanted. PyTorch has none with top_k: zeros.
    """
    choice = dispatch.select(impl, _triton_refusal(noisy, clean, mask, top_k, label_smoothing))
    if choice.implementation == "triton":
        problem = divergence_triton.Problem(
            noisy, clean, mask, temperature, kinds.split(","), top_k, top_k_of, support, beta, skew
        )
        return divergence_triton.forward(problem, labels)
    if labels is not None:
        check_label_values(labels, mask, noisy.shape[-1])
    body = forward_of(choice.implementation)
    find_support = topk.union_finder(choice.implementation, noisy.device)
    dtype = rows.compute_dtype(noisy, clean)
    shape, size = noisy.shape[:-1], noisy.shape[-1]
    settings = make_settings(kinds, top_k, support, beta, skew, labels, label_smoothing, temperature)
    width = topk.support_width(top_k, top_k_of, size)
    kept_indices = noisy.new_full((*shape, width), -1, dtype=torch.int32)
    found = noisy.new_zeros((shape.numel(), 3 * len(settings.kinds) + 4), dtype=dtype)
    inverse_temperature, whole_vocabulary = 1 / temperature, no_support(noisy)
    for chunk in row_chunks((noisy, clean), mask, dtype, choice, settings, top_k, width, max_chunk_bytes):
        noisy_rows, clean_rows = (read_logits(side, chunk, choice) for side in (noisy, clean))
        indices, valid = find_support(noisy_rows, clean_rows, top_k, top_k_of) if top_k else whole_vocabulary
        scale = rows.read_scalars(inverse_temperature, chunk)
        wanted = (noisy_wanted, clean_wanted)
        chunk_found = body(noisy_rows, clean_rows, scale, settings, indices, valid, read_labels(labels, chunk), wanted)
        found[chunk] = rows.zero_masked(chunk_found, mask, chunk)
        if top_k:
            kept_indices.view(-1, kept_indices.shape[-1])[chunk] = indices.masked_fill(~valid, -1).int()
    values, row_scalars = (one.view(len(one), *shape) for one in finish_values(found, settings))
    if top_k:
        row_scalars = values.new_zeros(_row_scalars_shape(noisy, kinds, top_k))
    return values, kept_indices, row_scalars


@_forward.register_fake
def _(
    noisy: Tensor,
    clean: Tensor,
    labels: Tensor | None,
    kinds: str,
    top_k: int,
    top_k_of: str,
    support: str,
    mask: Tensor | None,
    temperature: Tensor,
    beta: float,
    skew: float,
    label_smoothing: float,
    max_chunk_bytes: int,
    impl: str | None,
    noisy_wanted: bool = True,
    clean_wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, size = noisy.shape[:-1], noisy.shape[-1]
    values = noisy.new_empty((len(kinds.split(",")), *shape), dtype=rows.compute_dtype(noisy, clean))
    kept_indices = noisy.new_empty((*shape, topk.support_width(top_k, top_k_of, size)), dtype=torch.int32)
    return values, kept_indices, values.new_empty(_row_scalars_shape(noisy, kinds, top_k))


def _row_scalars_shape(noisy: Tensor, kinds: str, top_k: int) -> tuple[int, ...]:
    return (divergence_triton.row_scalar_count(kinds.split(","), top_k), *noisy.shape[:-1])


@torch.library.custom_op("sgfast::divergences_backward", mutates_args=())
def _backward(
    noisy: Tensor,
    clean: Tensor,
    labels: Tensor | None,
    upstream: Tensor,
    kept_indices: Tensor,
    row_scalars: Tensor | None,
    kinds: str,
    top_k: int,
    top_k_of: str,
    support: str,
    mask: Tensor | None,
    temperature: Tensor,
    beta: float,
    skew: float,
    label_smoothing: float,
    max_chunk_bytes: int,
    impl: str | None,
    noisy_wanted: bool,
    clean_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to the sides wanted; an unwanted one comes back empty."""
    choice = dispatch.select(impl, _triton_refusal(noisy, clean, mask, top_k, label_smoothing))
    wanted = (noisy_wanted, clean_wanted)
    if choice.implementation == "triton":
        problem = divergence_triton.Problem(
            noisy, clean, mask, temperature, kinds.split(","), top_k, top_k_of, support, beta, skew
        )
        found = divergence_triton.backward(problem, labels, upstream, kept_indices, row_scalars, wanted)
        noisy_gradient, clean_gradient = (noisy.new_empty(0) if one is None else one for one in found)
        return noisy_gradient, clean_gradient
    body = dispatch.implementation_of(write_gradients, choice.implementation, one_loop=True)
    dtype = rows.compute_dtype(noisy, clean)
    size = noisy.shape[-1]
    settings = make_settings(kinds, top_k, support, beta, skew, labels, label_smoothing, temperature)
    gradients = rows.empty_gradients(noisy, clean, wanted)
    if mask is not None:
        for gradient in gradients:
            gradient.zero_()
    flat_upstream = upstream.reshape(len(settings.kinds), -1)
    flat_scalars = None if row_scalars is None or top_k else row_scalars.view(row_scalars.shape[0], -1)
    flat_gradients = [gradient.view(gradient.numel() // size, size) for gradient in gradients]
    inverse_temperature = 1 / temperature
    for chunk in row_chunks(
        (noisy, clean), mask, dtype, choice, settings, top_k, kept_indices.shape[-1], max_chunk_bytes
    ):
        indices, valid = topk.unpack_union(rows.read_rows(kept_indices, chunk)) if top_k else no_support(noisy)
        noisy_rows, clean_rows = (read_logits(side, chunk, choice) for side in (noisy, clean))
        # Without a mask a chunk is a slice of the gradient, which is written where it lies.
        targets = [
            (gradient[chunk] if mask is None else gradient.new_empty(noisy_rows.shape)) if side_wanted else None
            for gradient, side_wanted in zip(flat_gradients, wanted, strict=True)
        ]
        body(
            noisy_rows,
            clean_rows,
            rows.read_scalars(inverse_temperature, chunk),
            settings,
            indices,
            valid,
            flat_upstream[:, chunk],
            targets,
            read_labels(labels, chunk),
            None if flat_scalars is None else flat_scalars[:, chunk],
        )
        for gradient, target in zip(flat_gradients, targets, strict=True):
            if mask is not None and target is not None:
                gradient[chunk] = rows.zero_masked(target, mask, chunk)
    return gradients


@_backward.register_fake
def _(
    noisy: Tensor,
    clean: Tensor,
    labels: Tensor | None,
    upstream: Tensor,
    kept_indices: Tensor,
    row_scalars: Tensor | None,
    kinds: str,
    top_k: int,
    top_k_of: str,
    support: str,
    mask: Tensor | None,
    temperature: Tensor,
    beta: float,
    skew: float,
    label_smoothing: float,
    max_chunk_bytes: int,
    impl: str | None,
    noisy_wanted: bool,
    clean_wanted: bool,
) -> tuple[Tensor, Tensor]:
    return rows.empty_gradients(noisy, clean, (noisy_wanted, clean_wanted))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    noisy, clean, labels, *ctx.options, mask, temperature, _, _, _, _, impl = inputs[:14]
    ctx.weights, ctx.impl, ctx.sides_expected = inputs[9:13], dispatch.pinned(impl), inputs[14:]
    _, kept_indices, row_scalars = output
    ctx.mark_non_differentiable(kept_indices, row_scalars)
    ctx.set_materialize_grads(False)  # of those two they would be as large
    choice = dispatch.select(impl, _triton_refusal(noisy, clean, mask, ctx.options[1], ctx.weights[2]))
    # PyTorch's are of use to the same implementation only: not where backward's may be another than forward's.
    useful = choice.implementation == "triton" or (ctx.impl is not None and not ctx.options[1])
    kept_scalars = row_scalars if useful else None
    ctx.save_for_backward(noisy, clean, labels, kept_indices, kept_scalars, mask, temperature)


def _gradients(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 16
    noisy, clean, labels, kept_indices, row_scalars, mask, temperature = ctx.saved_tensors
    noisy_wanted, clean_wanted = ctx.needs_input_grad[:2]
    if (noisy_wanted and not ctx.sides_expected[0]) or (clean_wanted and not ctx.sides_expected[1]):
        row_scalars = None
    noisy_gradient, clean_gradient = _backward(
        noisy,
        clean,
        labels,
        upstream,
        kept_indices,
        row_scalars,
        *ctx.options,
        mask,
        temperature,
        *ctx.weights,
        ctx.impl,
        noisy_wanted,
        clean_wanted,
    )
    constants = (None,) * 14
    return noisy_gradient if noisy_wanted else None, clean_gradient if clean_wanted else None, *constants


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    noisy, clean, labels, upstream, kept_indices, _, *ctx.options, mask, temperature = inputs[:12]
    *ctx.weights, _, ctx.impl, ctx.wanted = *inputs[12:17], inputs[17:]
    ctx.save_for_backward(noisy, clean, labels, upstream, kept_indices, mask, temperature)


def _second_gradients(ctx: Any, *upstream_of_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    noisy, clean, labels, upstream, kept_indices, mask, temperature = ctx.saved_tensors
    kinds, top_k, _, support = ctx.options
    beta, skew, label_smoothing = ctx.weights
    kind_names = tuple(kinds.split(","))
    settings = Settings(kind_names, support if top_k else "full", beta, skew, label_smoothing=label_smoothing)

    def masked_reference(noisy: Tensor, clean: Tensor) -> Tensor:
        dtype = rows.compute_dtype(noisy, clean)
        support_indices = topk.unpack_union(kept_indices) if top_k else no_support(noisy)
        if mask is None:
            return reference(noisy.to(dtype), clean.to(dtype), settings, *support_indices, temperature, labels)
        # Masked rows are replaced before the arithmetic, so that a NaN there cannot reach a gradient.
        noisy, clean = (torch.where(mask[..., None], side, 0).to(dtype) for side in (noisy, clean))
        indices, valid = support_indices
        values = reference(noisy, clean, settings, indices.clamp(min=0), valid | ~mask[..., None], temperature, labels)
        return torch.where(mask, values, 0)

    gradients = double_backward(
        "divergences",
        ctx.impl,
        _triton_refusal(noisy, clean, mask, top_k, label_smoothing),
        masked_reference,
        (noisy, clean),
        upstream,
        [outer if side_wanted else None for outer, side_wanted in zip(upstream_of_gradients, ctx.wanted, strict=True)],
    )
    to_noisy, to_clean, to_upstream = gradients
    return to_noisy, to_clean, None, to_upstream, *(None,) * 15


_forward.register_autograd(_gradients, setup_context=_setup_context)
_backward.register_autograd(_second_gradients, setup_context=_setup_second_context)


@dispatch.describe_triton(divergence_triton.refusal)
def divergences(
    noisy_logits: Tensor,
    clean_logits: Tensor,
    kinds: str | Sequence[str],
    *,
    top_k: int | None = None,
    top_k_of: TopKOf = "both",
    support: Support = "tail",
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    temperature: float | Tensor = 1.0,
    beta: float | None = None,
    skew: float | None = None,
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> dict[str, Tensor]:
    """Divergences between the distributions of two sets of logits, per position, in nats.

    The formulas are at the top of this module. Values are within 1e-5 relative + 5e-7 of the exact ones and never
    negative, also when the sides are nearly equal; ``-inf`` logits are legal on either side (a KL may then be ``inf``;
    its gradient is 0 on the side where it would be infinite).

    Args:
        noisy_logits: (..., V), float32, bfloat16, float16 or float64: the student, p. Row-strided views such as
            ``logits[:, :-1]`` are read in place. Inputs are never written to.
        clean_logits: of the same shape: the teacher, q.
        kinds: one or more of ``forward_kl``, ``reverse_kl``, ``jeffreys``, ``jensen_shannon``, ``total_variation``,
            ``squared_hellinger``, ``cross_entropy``, ``skew_forward_kl``, ``skew_reverse_kl``. May be empty where
            there are ``labels``.
        top_k: restrict to S, the top-k indices (ties: the lower index); None for the whole vocabulary.
        top_k_of: whose top-k make S: the union of ``both`` sides', or those of ``noisy`` or ``clean`` alone.
        support: what the restriction means: ``tail`` (S and one atom for the rest of the mass: a true divergence, at
            most the full one), ``truncate`` (a lower bound that grows with k for the non-KL kinds; the KL and skew
            kinds may be negative, are not clamped, and have a gradient at equal logits) or ``renormalize``. No effect
            without ``top_k``.
        mask: (...), bool or numbers equal to 0 or 1, 1 = selected. Masked rows are not read; they give 0 and zero
            gradient. On a GPU, where looking would stop the queue, any number but 0 selects.
        labels: (...), integers < V; negative = ignored. Adds ``label_cross_entropy``, the noisy side's cross-entropy
            with these hard labels at temperature 1 over the whole vocabulary, from the same pass; 0 where ignored. On
            a GPU a label ≥ V gives NaN.
        label_smoothing: ε between 0 and 1: the part of the labels' weight that is spread evenly over the vocabulary,
            as in ``torch.nn.CrossEntropyLoss``. Above 0 it needs ``labels`` and runs in PyTorch.
        temperature: divides both logits; a positive number or a tensor of shape (...). A constant: no gradient.
        beta: weight of q in the mixture of ``jensen_shannon``, 0 < beta < 1; None: 0.5.
        skew: weight of the first argument in the skew kinds' mixture, 0 ≤ skew < 1; None: 0.1.
        max_chunk_bytes: bound on the PyTorch implementation's temporaries beyond outputs and gradients (at least one
            row); default 8 MiB.
        impl: see ``sgfast.ops.dispatch``.

    Returns:
        For each kind (and for ``label_cross_entropy`` with ``labels``), values of shape (...) in float32 (float64 if
        an input is), differentiable with respect to both sides; gradients are in the inputs' dtypes. Kept for
        backward beyond the inputs: 4 float32 scalars and 2 per kind a row; with ``top_k`` at most 2k int32 indices a
        row, and those scalars and 4 more where Triton runs.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes, devices, an unknown name, a number out of range; ``beta`` or ``skew`` where no kind takes
            it, ``label_smoothing`` without ``labels``; on a CPU also a label ≥ V, and a mask with other numbers than
            0 and 1.

    Example:
        >>> import torch
        >>> from sgfast.ops import divergences
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log1p()
        >>> divergences(student, teacher, ["total_variation", "forward_kl"])
        {'total_variation': tensor([0.3000]), 'forward_kl': tensor([0.1927])}
    """
    validation.check_pair("noisy_logits", noisy_logits, "clean_logits", clean_logits)
    mask = validation.row_mask(mask, "mask", "noisy_logits", noisy_logits)
    labels = check_labels(labels, "noisy_logits", noisy_logits)
    names, beta, skew = check_options(kinds, support, beta, skew, impl, with_labels=labels is not None)
    validation.check_choice("top_k_of", top_k_of, TOP_K_OF)
    check_label_smoothing(label_smoothing)
    if label_smoothing > 0 and labels is None:
        raise ValueError(f"label_smoothing={label_smoothing} needs labels; got None")
    if top_k is not None:
        topk.check_k("top_k", top_k, noisy_logits.shape[-1])
    if labels is not None and names == (LABEL_KIND,):  # nothing to compute where it is ignored
        mask = labels >= 0 if mask is None else mask & (labels >= 0)
        top_k = None
    dispatch.refuse_forward_mode("divergences", noisy_logits, clean_logits)
    sides_wanted = (torch.is_grad_enabled() and side.requires_grad for side in (noisy_logits, clean_logits))
    values, *_ = _forward(
        noisy_logits,
        clean_logits,
        labels,
        ",".join(names),
        top_k or 0,
        top_k_of,
        support,
        mask,
        row_temperature(temperature, noisy_logits, clean_logits),
        beta,
        skew,
        float(label_smoothing),
        validation.chunk_bytes(max_chunk_bytes),
        impl,
        *sides_wanted,
    )
    return dict(zip(names, values.unbind(0), strict=True))
