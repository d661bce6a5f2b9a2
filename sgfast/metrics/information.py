r"""Bounds on the information that transformed embeddings hold about the text, for Gaussian transforms.

Given the text C, uniform over N candidates, a transform emits X ~ p_C = N(m_C, diag σ_C²). With a distance D between
components, Kolchinsky and Tracey ("Estimating mixture entropy with pairwise distances", Entropy 19, 2017) estimate

    I(X; C)  by  I_D = −(1/N) Σ_i ln (1/N) Σ_j exp(−D(p_i, p_j))

With D = KL(p_i ‖ p_j) the estimate is an upper bound. With a Chernoff distance C_α = −ln ∫ p_i^α p_j^(1−α) it is a
lower bound:

    0 ≤ I_C ≤ I(X; C) ≤ I_KL ≤ min(ln N, mean of all N² KL)

    C_α = ½ Σ_f [ α(1−α) (m_i − m_j)²/v + ln v − (1−α) ln σ_i² − α ln σ_j² ],   v = (1−α) σ_i² + α σ_j²

C_½ is the Bhattacharyya distance. All values are in nats.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sgfast.ops import pairwise_gaussian_kl, rows, validation
from sgfast.ops.gaussian.chunks import feature_chunks

_Real = TypeVar("_Real", float, Tensor)

# Bytes of temporaries for a feature of a Gaussian or of a pair of Gaussians, and the bound on a chunk of them.
_FEATURE_BYTES = 64
_CHUNK_BYTES = 8 * 2**20
# Halvings of an interval of length at most 1 until its ends are neighbouring float64 numbers.
_HALVINGS = 64


class InformationBounds(NamedTuple):
    """Bounds on the mutual information, in nats; scalars."""

    mean_pairwise_kl: Tensor
    kl_upper: Tensor
    bhattacharyya_lower: Tensor
    chernoff_lower: Tensor


@torch.no_grad()
def information_bounds(
    mean: Tensor, std: Tensor, mask: Tensor | None = None, *, alpha: float = 0.5
) -> InformationBounds:
    """Bound the mutual information between X ~ N(mean[C], diag std[C]²) and C, uniform over the N rows.

    The bounds are about these N candidates. ``kl_upper`` near 0 proves that no method can tell the candidates apart
    from one sample of X. ``kl_upper`` at ln N proves nothing: distant components always give ln N.
    ``bhattacharyya_lower`` and ``chernoff_lower`` prove that at least this much is revealed. At ln N one sample
    identifies the candidate. ``mean_pairwise_kl`` is the loosest upper bound. Unlike the others it does not saturate at
    ln N, and the loss ``mutual_information`` uses it for this reason. No bound covers candidates outside the N rows, an
    attacker with better prior knowledge, or several samples of the same text.

    Args:
        mean: (N, T, D), a row for each candidate text, or (N, D), one for each candidate token; in float32, bfloat16,
            float16 or float64.
        std: of ``mean``'s shape, positive.
        mask: of ``mean``'s shape, with or without its last dimension, 1 = used. A candidate with nothing
            selected is left out. Two candidates are compared on the features that both select. If masks differ, the
            four numbers are estimates and not bounds.
        alpha: the order of the Chernoff distance, in [0, 1]. 0.5 gives the Bhattacharyya distance and is the best
            order for equal variances; 0 and 1 give 0.

    Returns:
        ``InformationBounds(mean_pairwise_kl, kl_upper, bhattacharyya_lower, chernoff_lower)``, scalars in float32
        (float64 if an input is), without gradient; NaN if nothing is selected. The lower bounds take time proportional
        to N² T D, elementwise; memory is bounded beyond some (N, N) matrices.

    Raises:
        TypeError: an input is not a floating tensor, ``mask`` no tensor, or ``alpha`` no number.
        ValueError: shapes or devices do not fit, or ``alpha`` lies outside [0, 1].

    Example:
        >>> import torch
        >>> from sgfast.metrics import information_bounds
        >>> mean = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
        >>> bounds = information_bounds(mean, torch.ones(2, 2))
        >>> bounds.kl_upper, bounds.bhattacharyya_lower  # ln 2: one sample tells which it was
        (tensor(0.6931), tensor(0.6931))
    """
    validation.check_pair("mean", mean, "std", std)
    if mean.dim() not in (2, 3) or mean.shape[0] == 0:
        raise ValueError(f"mean must have shape (N, T, D) or (N, D), N at least 1; got {tuple(mean.shape)}")
    validation.check_number("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
    if mask is not None:
        validation.check_tensor("mask", mask, "a torch.Tensor or None")
    if mask is not None and mask.shape not in (mean.shape, mean.shape[:-1]):
        raise ValueError(
            f"mask must have the shape of mean, {tuple(mean.shape)}, or that without its last dimension; "
            f"got {tuple(mask.shape)}"
        )
    if mean.dim() == 2:
        mean, std, mask = mean[:, None], std[:, None], None if mask is None else mask[:, None]
    used = mean.new_ones(mean.shape[:2], dtype=torch.bool) if mask is None else validation.as_bool("mask", mask)
    weights = used.flatten(1).any(1).to(torch.float64)
    weights = weights / weights.sum()

    divergences = pairwise_gaussian_kl(mean, std, mean, std, used, used)[0].to(torch.float64).fill_diagonal_(0)
    both = weights[:, None] * weights
    mean_pairwise_kl = torch.where(both > 0, both * divergences, both).sum()
    bhattacharyya = _information(_chernoff_distances(mean, std, used, 0.5), weights)
    chernoff = bhattacharyya if alpha == 0.5 else _information(_chernoff_distances(mean, std, used, alpha), weights)
    bounds = (mean_pairwise_kl, _information(divergences, weights), bhattacharyya, chernoff)
    return InformationBounds(*(bound.to(rows.compute_dtype(mean, std)) for bound in bounds))


def _information(distances: Tensor, weights: Tensor) -> Tensor:
    """Return I_D = −Σ_i w_i ln Σ_j w_j exp(−D_ij), in [0, −Σ w ln w]."""
    inner = torch.logsumexp(weights.log() - distances, dim=1)
    return (-torch.where(weights > 0, weights * inner, weights).sum()).clamp(min=0)


def _chernoff_distances(mean: Tensor, std: Tensor, used: Tensor, alpha: float) -> Tensor:
    """Return C_α of every pair (i, j), (N, N) in float64."""
    count = mean.shape[0]
    used = used if used.dim() == 3 else used[..., None].expand(mean.shape)
    distances = mean.new_zeros((count, count), dtype=torch.float64)
    for chunk in feature_chunks(mean, count, _FEATURE_BYTES, _CHUNK_BYTES):
        selected = used[:, *chunk].flatten(1)
        center = torch.where(selected, mean[:, *chunk].flatten(1).to(torch.float64), 0)
        variance = torch.where(selected, std[:, *chunk].flatten(1).to(torch.float64), 1).square()
        log_variance = variance.log()
        step = max(1, math.isqrt(_CHUNK_BYTES // (_FEATURE_BYTES * center.shape[1])))
        for some in _slices(count, step):
            for others in _slices(count, step):
                both = selected[some, None] & selected[None, others]
                mixed = (1 - alpha) * variance[some, None] + alpha * variance[None, others]
                terms = alpha * (1 - alpha) * (center[some, None] - center[None, others]).square() / mixed
                terms += mixed.log_()
                terms -= (1 - alpha) * log_variance[some, None] + alpha * log_variance[None, others]
                distances[some, others] += torch.where(both, terms, 0).sum(-1)
    return (distances / 2).clamp(min=0).fill_diagonal_(0)


def _slices(count: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, count, step)]


def fano_error_bound(mutual_information: _Real, num_classes: int) -> _Real:
    """Return Fano's lower bound on the error rate of a guess at C from X: 1 − (I + ln 2) / ln M, or 0.

    C is uniform over M classes. An upper bound on I(X; C) in nats, for example ``kl_upper``, gives a proof. A lower
    bound on I(X; C) proves nothing here. The result holds for one guess at one C by an attacker who knows only that C
    is uniform. ``1 − pac_privacy_success_bound(I, 1 / M)`` is never weaker: it solves Fano's inequality exactly.

    Args:
        mutual_information: in nats, ≥ 0; a number or a tensor.
        num_classes: M, at least 2.

    Returns:
        The bound, in [0, 1]: a float, or a float64 tensor of the given tensor's shape. (A rounded bound would be none.)

    Raises:
        ValueError: fewer than 2 classes, or a negative number.

    Example:
        >>> round(fano_error_bound(1.0, 49152), 4)
        0.8433
    """
    validation.check_number("num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2; got {num_classes}")

    def bound(information: Tensor) -> Tensor:
        return (1 - (information + math.log(2)) / math.log(num_classes)).clamp(0, 1)

    return _in_float64(bound, mutual_information)


def pac_privacy_success_bound(mutual_information: _Real, prior: float) -> _Real:
    """Return an upper bound on the success rate of attackers who succeed with probability ``prior`` without X.

    The bound is the largest p with KL(Bernoulli(p) ‖ Bernoulli(prior)) = p ln(p/prior) + (1−p) ln((1−p)/(1−prior)) ≤ I
    (Xiao and Devadas, "PAC Privacy", 2023). Success may mean anything that the text decides: the right token, a name.
    An upper bound on the mutual information of X and the text, in nats, gives a proof. A lower bound on it proves
    nothing here. The result holds for one sample of X: with n samples of the same text, I may be n times as large.

    Args:
        mutual_information: in nats, ≥ 0; a number or a tensor.
        prior: in (0, 1); 1 / V for guessing a token of V uniformly.

    Returns:
        The bound, in [prior, 1]: a float, or a float64 tensor of the given tensor's shape. (A rounded bound would be
        none.)

    Raises:
        ValueError: a prior outside (0, 1), or a negative number.

    Example:
        >>> round(pac_privacy_success_bound(1.112, 1 / 128256), 4)  # 12.7 %
        0.1269
    """
    validation.check_number("prior", prior)
    if not 0 < prior < 1:
        raise ValueError(f"prior must lie in (0, 1); got {prior}")

    def bound(information: Tensor) -> Tensor:
        low, high = torch.full_like(information, prior), torch.ones_like(information)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            # log1p, because the two terms cancel near the prior.
            gain = middle * torch.log1p((middle - prior) / prior)
            loss = (1 - middle) * torch.log1p((prior - middle) / (1 - prior))
            within = gain + loss <= information
            low, high = torch.where(within, middle, low), torch.where(within, high, middle)
        # The upper end of the last interval, since this is an upper bound. A NaN stays NaN.
        return torch.where(information.isnan(), information, high)

    return _in_float64(bound, mutual_information)


def _in_float64(bound: Callable[[Tensor], Tensor], mutual_information: _Real) -> _Real:
    """Apply a function to a tensor or to a number in float64. A number is checked."""
    if isinstance(mutual_information, Tensor):
        validation.check_tensor("mutual_information", mutual_information)
        return bound(mutual_information.detach().to(torch.float64))
    if mutual_information < 0:
        raise ValueError(f"mutual_information must not be negative; got {mutual_information}")
    return bound(torch.tensor(mutual_information, dtype=torch.float64)).item()
