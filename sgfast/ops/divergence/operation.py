"""Divergences between two sets of logits at every position, any number of kinds from the same reads.

`divergences` has the formulas. The call checks its arguments and makes a `problem` of them. The registered `operator`
computes the problem. In PyTorch, `chunks` of rows go through three modules. `atoms` turns logits into probabilities and
the differences of their logarithms. `terms` has each kind's formula in a form that keeps its digits. `rows` has the
sums, and turns partial derivatives into gradients of the logits. On a GPU the Triton `kernels` run instead.
`definitions` has the plain formulas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.ops import dispatch, validation
from sgfast.ops.divergence import kernels
from sgfast.ops.divergence.arguments import checked_arguments
from sgfast.ops.divergence.operator import forward
from sgfast.ops.divergence.problem import (
    Problem,
    Support,
    Temperature,
    TopKOf,
    check_options,
    check_support_mask,
    row_temperatures,
)
from sgfast.ops.linear.expectation import expectation_divergences
from sgfast.ops.linear.operation import linear_divergences
from sgfast.ops.sides import CleanSide, HeadExpectation, LinearLogits, LogitsOrSide, check_sides, tensor_of


@dispatch.describe_triton(kernels.refusal)
def divergences(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    kinds: str | Sequence[str],
    *,
    top_k: int | None = None,
    top_k_of: TopKOf = "both",
    support: Support = "tail",
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    temperature: Temperature = 1.0,
    beta: float | None = None,
    skew: float | None = None,
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> dict[str, Tensor]:
    r"""Divergences between the distributions of two sets of logits, per position, in nats.

    This function is also ``sgfast.divergences``. The module `sgfast.loss.divergences` has one function for each kind.

    For logits x (noisy, student) and y (clean, teacher) of shape (..., V) and temperature T, with p = softmax(x/T) and
    q = softmax(y/T):

    ==================== =============================================================================
    kind                 value
    ==================== =============================================================================
    forward_kl           KL(q‖p) = Σ q (log q − log p)
    reverse_kl           KL(p‖q)
    jeffreys             KL(p‖q) + KL(q‖p)
    jensen_shannon       beta·KL(q‖m) + (1−beta)·KL(p‖m), m = beta·q + (1−beta)·p
    total_variation      ½ Σ |p − q|
    squared_hellinger    ½ Σ (√p − √q)²
    cross_entropy        − Σ q log p
    skew_forward_kl      KL(q‖skew·q + (1−skew)·p)         (Ko et al. 2024, DistiLLM)
    skew_reverse_kl      KL(p‖skew·p + (1−skew)·q)
    label_cross_entropy  − Σ w log softmax(x), w = (1−ε)·onehot(label) + ε/V, ε = ``label_smoothing``:
                         always over the whole vocabulary and at temperature 1
    ==================== =============================================================================

    ``top_k`` restricts the sums to a support S, the union of both sides' top-k indices or one side's (constant for the
    gradient):

    =========== =======================================================
    support     sums over
    =========== =======================================================
    truncate    the terms in S of the full-vocabulary p and q
    renormalize softmax over S on both sides
    tail        S and one more atom with the rest of the mass
    =========== =======================================================

    Gradients: with A_i and B_i the partial derivatives with respect to log p_i and log q_i,
    ∂/∂x_i = (A_i − p_i Σ A) / T and ∂/∂y_i = (B_i − q_i Σ B) / T; that of ``label_cross_entropy`` is softmax(x) − w.
    Nothing per logit is kept for backward: backward reads the logits again.

    Values are within 1e-5 relative + 5e-7 of the exact ones and never negative, also when the sides are nearly equal,
    or lie apart by a constant of up to 1e4; rows of gradients are within one rounding of the inputs' dtype plus
    (5e-7 + 3e-7·value) / T. ``-inf`` logits are legal on either side. A KL may then be ``inf``. Its gradient is 0 on
    the side where the gradient would be infinite.

    Args:
        noisy_logits: (..., V), float32, bfloat16, float16 or float64: the student, p. Row-strided views such as
            ``logits[:, :-1]`` are read in place. Inputs are never written to. A `sgfast.sides.LinearLogits` gives
            hidden states and their head instead: the logits of a few rows exist at a time.
        clean_logits: of the same shape: the teacher, q; or a `sgfast.sides.LinearLogits`, or a
            `sgfast.sides.HeadExpectation`.
        kinds: one or more of ``forward_kl``, ``reverse_kl``, ``jeffreys``, ``jensen_shannon``, ``total_variation``,
            ``squared_hellinger``, ``cross_entropy``, ``skew_forward_kl``, ``skew_reverse_kl``. May be empty where
            there are ``labels``.
        top_k: restrict to S, the top-k indices (ties: the lower index); None for the whole vocabulary.
        top_k_of: the side whose top-k indices make S: ``noisy``, ``clean``, or ``both`` for the union.
        support: what the restriction means: ``tail`` (S and one atom for the rest of the mass: a true divergence, at
            most the full one), ``truncate`` (a lower bound that grows with k for the non-KL kinds; the KL and skew
            kinds may be negative, are not clamped, and have a gradient at equal logits) or ``renormalize``. No effect
            without ``top_k``.
        mask: (...), bool or numbers equal to 0 or 1, 1 = selected. Masked rows are not read; they give 0 and zero
            gradient. On a GPU every number but 0 selects, because a look at the values would stop the queue.
        labels: (...), integers < V; negative = ignored. Adds ``label_cross_entropy``, the noisy side's cross-entropy
            with these hard labels at temperature 1 over the whole vocabulary, from the same pass; 0 where ignored. On
            a GPU a label ≥ V gives NaN.
        label_smoothing: ε between 0 and 1: the part of the labels' weight that is spread evenly over the vocabulary,
            as in ``torch.nn.CrossEntropyLoss``. Above 0 it needs ``labels`` and runs in PyTorch.
        temperature: divides both logits; a positive number or a tensor of shape (...). A pair of them, (noisy, clean),
            gives each side its own, in PyTorch. A constant: no gradient.
        beta: weight of q in the mixture of ``jensen_shannon``, 0 < beta < 1; None: 0.5.
        skew: weight of the first argument in the skew kinds' mixture, 0 ≤ skew < 1; None: 0.1.
        max_chunk_bytes: bound on the PyTorch implementation's temporaries beyond outputs and gradients (at least one
            row); default 8 MiB. With a `LinearLogits` the bound on all temporaries; default 64 MiB on a CPU, 512 MiB
            on a GPU.
        impl: see ``sgfast.ops.dispatch``. With a `LinearLogits` the choice is that of the arithmetic on the logits of
            some rows; the matrix products are the library's.

    Returns:
        For each kind (and for ``label_cross_entropy`` with ``labels``), values of shape (...) in float32 (float64 if
        an input is), differentiable with respect to both sides; gradients are in the inputs' dtypes. Kept for
        backward beyond the inputs: 4 float32 scalars and 2 per kind a row; with ``top_k`` at most 2k int32 indices a
        row, and those scalars and 4 more where Triton runs. With a `LinearLogits` backward computes the logits again;
        a single kind with frozen heads keeps the gradient of the hidden states instead.

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
    names, checked = checked_arguments(
        noisy_logits,
        clean_logits,
        kinds,
        top_k=top_k,
        top_k_of=top_k_of,
        support=support,
        mask=mask,
        labels=labels,
        label_smoothing=label_smoothing,
        beta=beta,
        skew=skew,
        impl=impl,
    )
    return _compute(
        names, noisy_logits, clean_logits, temperature=temperature, max_chunk_bytes=max_chunk_bytes, **checked
    )


def masked_divergence(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    support_mask: Tensor,
    kind: str,
    *,
    support: Support = "tail",
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    beta: float | None = None,
    skew: float | None = None,
    max_chunk_bytes: int | None = None,
    impl: dispatch.Implementation | None = None,
) -> Tensor:
    """Compute one divergence per position over the support that ``support_mask`` selects.

    A row of the mask without any True entry has no atoms: its value and gradients are 0. The functions of
    `sgfast.loss.divergences` call this function. The computation gathers and scatters with padded indices as wide as
    the vocabulary. This is about four times the work of the whole vocabulary. For a union of top-k indices
    ``divergences(..., top_k=k)`` is far cheaper, because it has at most 2k atoms.

    Args:
        noisy_logits: (..., V), as in `divergences`.
        clean_logits: of the same shape.
        support_mask: bool, (..., V) or broadcastable to it: True = in S. The mask is read without a copy, even if it is
            broadcast.
        kind: one of `divergences`' kinds.
        support: ``tail``, ``truncate`` or ``renormalize``.
        mask: (...), bool or numbers equal to 0 or 1, 1 = selected.
        temperature: as in `divergences`.
        beta: weight of q in the mixture of ``jensen_shannon``; None: 0.5.
        skew: weight of the first argument in the skew kinds' mixture; None: 0.1.
        max_chunk_bytes: bound on temporaries beyond outputs and gradients (at least one row); default 8 MiB.
        impl: ``"triton"`` is refused: there is no kernel.

    Raises:
        TypeError: ``support_mask`` is not a boolean tensor; as `divergences`.
        ValueError: its shape or device does not fit; as `divergences`.
    """
    check_sides("noisy_logits", noisy_logits, "clean_logits", clean_logits)
    mask = validation.row_mask(mask, "mask", "noisy_logits", tensor_of(noisy_logits))
    check_support_mask(support_mask, noisy_logits.shape, tensor_of(noisy_logits))
    names, beta, skew = check_options(kind, support, beta, skew, impl)
    support_mask = support_mask.expand(noisy_logits.shape)
    has_atoms = support_mask.any(-1)
    values = _compute(
        names,
        noisy_logits,
        clean_logits,
        labels=None,
        support_mask=support_mask,
        mask=has_atoms if mask is None else mask & has_atoms,
        temperature=temperature,
        top_k=0,
        top_k_of="both",
        support=support,
        beta=beta,
        skew=skew,
        label_smoothing=0.0,
        max_chunk_bytes=max_chunk_bytes,
        impl=impl,
    )
    return values[kind]


def _compute(
    names: tuple[str, ...],
    noisy: LogitsOrSide,
    clean: CleanSide,
    *,
    temperature: Temperature,
    max_chunk_bytes: int | None,
    **checked: Any,
) -> dict[str, Tensor]:
    """Check the temperatures and the bound, and run the operator. The caller has checked the other arguments."""
    if isinstance(clean, HeadExpectation):
        assert isinstance(noisy, LinearLogits)
        return expectation_divergences(
            names, noisy, clean, temperature=temperature, max_chunk_bytes=max_chunk_bytes, **checked
        )
    if isinstance(noisy, LinearLogits) or isinstance(clean, LinearLogits):
        return linear_divergences(
            names, noisy, clean, temperature=temperature, max_chunk_bytes=max_chunk_bytes, **checked
        )
    dispatch.refuse_forward_mode("divergences", noisy, clean)
    noisy_temperature, clean_temperature = row_temperatures(temperature, noisy, clean)
    noisy_wanted, clean_wanted = (torch.is_grad_enabled() and side.requires_grad for side in (noisy, clean))
    problem = Problem(
        noisy,
        clean,
        temperature=noisy_temperature,
        clean_temperature=clean_temperature,
        kinds=",".join(names),
        max_chunk_bytes=validation.chunk_bytes(max_chunk_bytes),
        noisy_wanted=noisy_wanted,
        clean_wanted=clean_wanted,
        **checked,
    )
    values, *_ = forward(problem)
    return dict(zip(names, values.unbind(0), strict=True))
