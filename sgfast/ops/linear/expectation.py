"""A teacher as the expectation of the head's rows: cross-entropy with two products, and the making of the expectation.

With x = scale · (hidden @ weight.T + bias) and the teacher's distribution q,

    − Σ q log p = log Σ e^x − scale · (hidden · E_q[weight] + E_q[bias]),

and the gradient of the hidden states is scale · (E_p[weight] − E_q[weight]). Forward makes E_p[weight]; backward forms
the difference in float32 and rounds once.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows
from sgfast.ops.divergence.kinds import LABEL_KIND
from sgfast.ops.divergence.problem import Temperature, check_label_values
from sgfast.ops.double_backward import once_differentiable
from sgfast.ops.linear import products
from sgfast.ops.linear.operation import chunk_bytes, head_of
from sgfast.ops.linear.operator import NO_DOUBLE_BACKWARD
from sgfast.ops.linear.problem import Side
from sgfast.ops.operator import define, keep, kept
from sgfast.ops.precision import full_precision_products
from sgfast.ops.sides import ONLY_TORCH, HeadExpectation, LinearLogits, compute_dtype

#: The kinds that the expectation is enough for.
EXPECTATION_KINDS = ("cross_entropy", "forward_kl")
_SCRATCH = 1 / 6


class ExpectationProblem(NamedTuple):
    """The arguments of the operator ``sgfast::head_expectation``."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D), as is the bias without a gradient
    bias: Tensor | None
    vector: Tensor  # (..., D)
    expected_bias: Tensor | None  # (...)
    labels: Tensor | None
    mask: Tensor | None
    scale: float
    max_chunk_bytes: int
    impl: str | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return rows.compute_dtype(self.hidden, self.weight, self.vector)


def expectation_divergences(
    names: tuple[str, ...],
    noisy: LinearLogits,
    clean: HeadExpectation,
    *,
    temperature: Temperature,
    max_chunk_bytes: int | None,
    **checked: Any,
) -> dict[str, Tensor]:
    """Compute values per position by kind. `sgfast.ops.divergences` has checked the other arguments."""
    _check(names, noisy, clean, temperature, checked)
    dispatch.refuse_forward_mode("divergences", noisy.hidden, noisy.weight)
    weight, bias, scale, _ = head_of(noisy)
    assert weight is not None
    soft, hard, _ = forward(
        ExpectationProblem(
            noisy.hidden,
            weight.detach(),
            None if bias is None else bias.detach(),
            clean.vector.detach(),
            None if clean.expected_bias is None else clean.expected_bias.detach(),
            checked["labels"],
            checked["mask"],
            scale,
            chunk_bytes(max_chunk_bytes, noisy.hidden),
            checked["impl"],
        )
    )
    entropy = clean.entropy.detach().to(soft.dtype)
    entropy = entropy if checked["mask"] is None else torch.where(checked["mask"], entropy, 0)
    found = {"cross_entropy": soft, "forward_kl": (soft - entropy).clamp(min=0), LABEL_KIND: hard}
    return {name: found[name] for name in names}


def _check(
    names: tuple[str, ...],
    noisy: LinearLogits,
    clean: HeadExpectation,
    temperature: Temperature,
    checked: dict[str, Any],
) -> None:
    """Refuse what the expectation does not know."""
    others = [name for name in names if name not in (*EXPECTATION_KINDS, LABEL_KIND)]
    if others:
        raise ValueError(f"kinds with a HeadExpectation are {' and '.join(EXPECTATION_KINDS)}; got {', '.join(others)}")
    if checked["top_k"] or checked["support_mask"] is not None:
        raise ValueError("top_k and support_mask need the teacher's logits; the clean side is a HeadExpectation")
    if checked["label_smoothing"] > 0:
        raise ValueError(f"label_smoothing must be 0 with a HeadExpectation; got {checked['label_smoothing']}")
    both = temperature if isinstance(temperature, tuple) else (temperature,)
    if any(isinstance(one, Tensor) or one != 1 for one in both):
        raise ValueError(f"temperature must be the number 1 with a HeadExpectation; got {temperature}")
    if noisy.softcap is not None:
        raise ValueError(f"softcap must be None with a HeadExpectation; got {noisy.softcap}")
    if noisy.weight.requires_grad or (noisy.bias is not None and noisy.bias.requires_grad):
        raise ValueError(
            "weight and bias must not require a gradient with a HeadExpectation: it belongs to a fixed head"
        )
    if (noisy.bias is None) != (clean.expected_bias is None):
        raise ValueError(
            "bias must be that of the head that the HeadExpectation was made with; "
            f"got {'none' if noisy.bias is None else 'a bias'} beside "
            f"expected_bias={'None' if clean.expected_bias is None else tuple(clean.expected_bias.shape)}"
        )


@define("head_expectation", ExpectationProblem)
def forward(problem: ExpectationProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cross-entropies with the teacher and with labels, (...), and E_p[weight], (..., D); 0 where masked."""
    dispatch.select(problem.impl, ONLY_TORCH)
    if problem.labels is not None:
        check_label_values(problem.labels, problem.mask, len(problem.weight))
    soft, hard, expectation = _outputs(problem)
    width = problem.hidden.shape[-1]

    def write(place: Tensor | slice, hidden: Tensor, logits: Tensor, scratch: int) -> None:
        labels = None if problem.labels is None else rows.read_scalars(problem.labels, place)
        at_label = None if labels is None else logits.gather(-1, labels.clamp(0, logits.shape[1] - 1))
        normalizer, weights = _normalized(logits)
        of_teacher = (hidden * rows.read_rows(problem.vector, place).to(hidden.dtype)).sum(-1)
        if problem.expected_bias is not None:
            of_teacher += problem.scale * rows.read_scalars(problem.expected_bias, place)[:, 0].to(hidden.dtype)
        soft.view(-1)[place] = normalizer - of_teacher
        if labels is not None and at_label is not None:
            hard.view(-1)[place] = torch.where(labels < 0, 0, normalizer[:, None] - at_label)[:, 0]
        side = Side(problem.hidden, problem.weight, problem.bias, 1.0, 0.0)
        expectation.view(-1, width)[place] = products.hidden_gradient(side, weights, hidden, scratch)

    _walk(problem, write)
    return soft, hard, expectation


@forward.register_fake
def _(problem: ExpectationProblem) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(problem)


def _outputs(problem: ExpectationProblem) -> tuple[Tensor, Tensor, Tensor]:
    expectation = problem.hidden.new_zeros(problem.hidden.shape, dtype=problem.dtype)
    soft = expectation.new_zeros(problem.hidden.shape[:-1])
    return soft, soft.new_zeros(soft.shape if problem.labels is not None else 0), expectation


def _normalized(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log Σ e^x, (rows,), and the probabilities, written where the logits were."""
    maximum = logits.amax(-1, keepdim=True)
    weights = logits.sub_(maximum).exp_()
    total = weights.sum(-1, keepdim=True)
    return (maximum + total.log())[:, 0], weights.div_(total)


def _walk(problem: ExpectationProblem, visit: Any) -> None:
    """Call ``visit(place, scaled hidden states, logits, scratch)`` for chunks of the selected rows."""
    size, dtype = len(problem.weight), problem.dtype
    side = Side(problem.hidden, problem.weight, problem.bias, problem.scale, 0.0)
    selected = None if problem.mask is None else problem.mask.reshape(-1).nonzero().squeeze(-1)
    count = math.prod(problem.hidden.shape[:-1]) if selected is None else len(selected)
    scratch = int(problem.max_chunk_bytes * _SCRATCH)
    row_bytes = dtype.itemsize * (size + 6 * problem.hidden.shape[-1])
    height = max(1, min(count, (problem.max_chunk_bytes - scratch) // row_bytes))
    buffer = problem.hidden.new_empty((height, size), dtype=dtype)
    with full_precision_products(problem.hidden.device):
        for start in range(0, count, height):
            place: Tensor | slice = slice(start, min(start + height, count))
            place = place if selected is None else selected[place]
            hidden = products.scaled_rows(side, rows.read_rows(problem.hidden, place), dtype)
            logits = buffer[: len(hidden)]
            products.write_logits(logits, side, hidden, scratch)
            visit(place, hidden, logits, scratch)


def _setup(ctx: Any, problem: ExpectationProblem, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    keep(ctx, problem._replace(bias=None, expected_bias=None), output[2])


def _gradients(ctx: Any, to_soft: Tensor | None, to_hard: Tensor | None, _: Tensor | None) -> dict[str, Any]:
    problem, expectation = kept(ctx)
    dtype, total = expectation.dtype, torch.zeros_like(expectation)
    if to_soft is not None:
        total = total + to_soft[..., None] * (expectation - problem.vector.to(dtype))
    if to_hard is not None and problem.labels is not None:
        at_label = problem.weight[problem.labels.clamp(min=0)].to(dtype)
        total = total + torch.where(problem.labels < 0, 0, to_hard)[..., None] * (expectation - at_label)
    if problem.mask is not None:
        total = torch.where(problem.mask[..., None], total, 0)
    return once_differentiable({"hidden": (total * problem.scale).to(problem.hidden.dtype)}, NO_DOUBLE_BACKWARD)


forward.register_gradients(_setup, _gradients)


@torch.no_grad()
def expectation_of(side: LinearLogits, max_chunk_bytes: int | None) -> HeadExpectation:
    """Make the `HeadExpectation` of a side's distribution, and its entropy."""
    dtype, (weight, bias, scale, _) = compute_dtype(side), head_of(side)
    assert weight is not None
    vector = side.hidden.new_empty(side.hidden.shape, dtype=dtype)
    entropy = vector.new_empty(side.hidden.shape[:-1])
    expected_bias = None if bias is None else torch.empty_like(entropy)
    problem = ExpectationProblem(
        side.hidden, weight, bias, vector, None, None, None, scale, chunk_bytes(max_chunk_bytes, side.hidden), None
    )
    of_head = Side(side.hidden, weight, bias, 1.0, 0.0)

    def write(place: Tensor | slice, hidden: Tensor, logits: Tensor, scratch: int) -> None:
        # The entropy of the part of the logits that the products made: x = hidden · row + scale · bias.
        normalizer, weights = _normalized(logits)
        of_rows = products.hidden_gradient(of_head, weights, hidden, scratch)
        vector.view(-1, vector.shape[-1])[place] = of_rows
        mean_logit = (of_rows * hidden).sum(-1)
        if bias is not None and expected_bias is not None:
            mean_bias = torch.where(weights > 0, weights * bias.to(dtype), 0).sum(-1)
            expected_bias.view(-1)[place] = mean_bias
            mean_logit += scale * mean_bias
        entropy.view(-1)[place] = (normalizer - mean_logit).clamp_(min=0)

    _walk(problem, write)
    return HeadExpectation(vector, entropy, expected_bias)
