r"""Divergences between the next-token distributions of two sets of logits, one function each.

p = softmax(noisy_logits / temperature) is the distribution of the noisy model or student, and
q = softmax(clean_logits / temperature) the distribution of the clean model or teacher. Every function returns one value
in nats per position, differentiable with respect to both sides, in float32 (float64 for float64 logits) whatever the
inputs' dtype or autocast says. Nothing per logit is kept for backward.

Two names are alike. This module, `sgfast.loss.divergences`, has one function for each divergence. The function
`sgfast.ops.divergences` (also ``sgfast.divergences``) computes several kinds from one read of the logits.
`sgfast.loss.DivergenceLoss` is a loss to train with.

All functions take the same arguments:

``noisy_logits``, ``clean_logits``
    (..., V), float32, bfloat16, float16 or float64; ``-inf`` is legal; row-strided views are read in place. A value of
    `sgfast.sides`, such as hidden states and their head, stands for logits.
``support_mask``
    bool, (..., V) or broadcastable to it, such as `sgfast.metrics.get_top_k_support_mask` returns: restricts the
    divergence to its True entries, S, which are constant for the gradient. A position with no True entry gives 0.
``top_k``
    S is the union of both sides' top-k indices at each position. The numbers equal the numbers with the mask of
    `get_top_k_support_mask(noisy_logits, clean_logits, top_k)`, but no mask as large as the logits exists, and the
    computation is several times faster. Not together with ``support_mask``.
``support``
    meaning of the restriction: ``tail`` adds one atom that holds the rest of the mass, and is a true divergence;
    ``truncate`` sums the full distributions' terms in S (a KL may be negative); ``renormalize`` takes the softmax over
    S on both sides. No effect without a restriction.
``mask``
    (...), bool or numbers equal to 0 or 1, 1 = selected. Other positions are not read, give 0 and get zero gradient.
``temperature``
    a positive number or a tensor of shape (...), or a pair of them, (noisy, clean), one for each side. There is no
    factor T².
``impl``
    see `sgfast.ops.dispatch`; a ``support_mask`` runs in PyTorch only.

The functions raise the errors of `sgfast.ops.divergences`, and ValueError for ``support_mask`` together with ``top_k``.
"""

import sys
import types
from typing import Any, NoReturn

from torch import Tensor

from sgfast.ops.dispatch import Implementation
from sgfast.ops.divergence import divergences, masked_divergence
from sgfast.ops.divergence.problem import Support, Temperature
from sgfast.ops.sides import CleanSide, LogitsOrSide


def jeffreys_divergence(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    support_mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    support: Support = "tail",
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    impl: Implementation | None = None,
) -> Tensor:
    """KL(p‖q) + KL(q‖p) = Σ (p − q)(log p − log q): the sum of both directions, not their mean.

    Example:
        >>> import torch
        >>> noisy, clean = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log1p()
        >>> jeffreys_divergence(noisy, clean)
        tensor([0.4159])
    """
    return _divergence(
        "jeffreys",
        noisy_logits,
        clean_logits,
        support_mask,
        top_k,
        support=support,
        mask=mask,
        temperature=temperature,
        impl=impl,
    )


jefferys_divergence = jeffreys_divergence  # the documented spelling


def jensen_shannon_divergence(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    support_mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    support: Support = "tail",
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    beta: float | None = None,
    impl: Implementation | None = None,
) -> Tensor:
    """beta·KL(q‖m) + (1−beta)·KL(p‖m) with m = beta·q + (1−beta)·p; symmetric and at most ln 2 at beta = 0.5.

    With 0 < beta < 1 (None: 0.5) it is the generalised Jensen–Shannon divergence of GKD (Agarwal et al. 2024). The ends
    0 and 1 are a ValueError here. GKD's losses at the ends are `kl_divergence`: forward at 0, reverse at 1.
    """
    return _divergence(
        "jensen_shannon",
        noisy_logits,
        clean_logits,
        support_mask,
        top_k,
        support=support,
        mask=mask,
        temperature=temperature,
        beta=beta,
        impl=impl,
    )


def total_variation(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    support_mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    support: Support = "tail",
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    impl: Implementation | None = None,
) -> Tensor:
    """½ Σ |p − q|, between 0 and 1; where p = q the subgradient is 0."""
    return _divergence(
        "total_variation",
        noisy_logits,
        clean_logits,
        support_mask,
        top_k,
        support=support,
        mask=mask,
        temperature=temperature,
        impl=impl,
    )


def squared_hellinger_distance(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    support_mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    support: Support = "tail",
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    impl: Implementation | None = None,
) -> Tensor:
    """½ Σ (√p − √q)² = 1 − Σ √(pq) over the whole vocabulary, between 0 and 1."""
    return _divergence(
        "squared_hellinger",
        noisy_logits,
        clean_logits,
        support_mask,
        top_k,
        support=support,
        mask=mask,
        temperature=temperature,
        impl=impl,
    )


def kl_divergence(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    support_mask: Tensor | None = None,
    *,
    reverse: bool = False,
    top_k: int | None = None,
    support: Support = "tail",
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    impl: Implementation | None = None,
) -> Tensor:
    """KL(q‖p) = Σ q (log q − log p), of clean from noisy: the forward KL of distillation.

    The value equals ``F.kl_div(p.log(), q, reduction="none").sum(-1)``. ``reverse=True`` gives KL(p‖q). Under
    ``truncate`` it may be negative; ``tail`` is a true divergence.
    """
    return _divergence(
        "reverse_kl" if reverse else "forward_kl",
        noisy_logits,
        clean_logits,
        support_mask,
        top_k,
        support=support,
        mask=mask,
        temperature=temperature,
        impl=impl,
    )


def cross_entropy(
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    support_mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    support: Support = "tail",
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    impl: Implementation | None = None,
) -> Tensor:
    """− Σ q log p = KL(q‖p) + H(q), with the clean distribution as soft labels. At equal logits the value is H(q)."""
    return _divergence(
        "cross_entropy",
        noisy_logits,
        clean_logits,
        support_mask,
        top_k,
        support=support,
        mask=mask,
        temperature=temperature,
        impl=impl,
    )


def _divergence(
    kind: str,
    noisy_logits: LogitsOrSide,
    clean_logits: CleanSide,
    support_mask: Tensor | None,
    top_k: int | None,
    **options: Any,
) -> Tensor:
    if support_mask is None:
        return divergences(noisy_logits, clean_logits, kind, top_k=top_k, **options)[kind]
    if top_k is not None:
        raise ValueError(f"support_mask and top_k both choose the support: give one of them; got top_k={top_k}")
    return masked_divergence(noisy_logits, clean_logits, support_mask, kind, **options)


class _CalledModule(types.ModuleType):
    """Type of this module. A call of the module is answered with the name of the function."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "sgfast.loss.divergences is a module with one function for each divergence. To compute divergences by the "
            "names of their kinds, call sgfast.ops.divergences (also sgfast.divergences)"
        )


sys.modules[__name__].__class__ = _CalledModule
