r"""The log-likelihood of an observed embedding under a candidate's Gaussian, over a layer's suppression and clamp.

For a candidate with embedding e, mean shift µ and deviation σ, the observation x̃ of a feature has

    kept:        log N(x̃; e + µ, σ²/n + ρ²)
    suppressed:  log N(x̃; µ, ρ²), an exact match up to rounding
    clamped:     log Φ((low − e − µ)/σ) at the lower end, log Φ((e + µ − high)/σ) at the upper end

n is the number of draws that x̃ is the mean of. ρ is the rounding of x̃, the same for every candidate: half a unit in
the last place of x̃'s dtype, uniform, and the float32 arithmetic of the layer.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.noise_layer.arguments import ValueRange
from sgfast.noise_layer.next_token import Estimates

# Relative to the size of an embedding: errors of mean shifts that were computed in another order.
_ARITHMETIC = 2.0**-20
_LEAST_ROUNDING = 1e-30
_LOG_2_PI = math.log(2 * math.pi)


class Observation(NamedTuple):
    """Observed embeddings (..., D) in float32 or float64, and the variance ρ² of their rounding, of the same shape."""

    embedding: Tensor
    rounding: Tensor


def observe(transformed: Tensor) -> Observation:
    """Return observations (..., D) for transformed embeddings of any floating dtype."""
    embedding = transformed if transformed.dtype == torch.float64 else transformed.float()
    size = embedding.square().mean(-1, keepdim=True)
    last_place = (torch.finfo(transformed.dtype).eps * embedding).square() / 12
    return Observation(embedding, last_place + size * _ARITHMETIC**2 + _LEAST_ROUNDING)


def log_likelihood(
    observed: Observation, candidates: Tensor, estimates: Estimates, *, draws: int, value_range: ValueRange | None
) -> Tensor:
    """Return log p(observed | candidate), (H, C) in float64, for one observation (D,) and candidates (C, D)."""
    embedding, rounding = observed
    mean, std = estimates.mean.to(embedding.dtype), estimates.std.to(embedding.dtype)
    location, variance = candidates.to(embedding.dtype) + mean, std.square() / draws
    if estimates.suppressed is not None:
        location = torch.where(estimates.suppressed, mean, location)
        variance = variance.masked_fill(estimates.suppressed, 0)
    if value_range is None:
        return _gaussian(embedding, location, variance + rounding).sum(-1, dtype=torch.float64)
    low, high = (-math.inf if value_range[0] is None else value_range[0], value_range[1])
    high = math.inf if high is None else high
    # A suppressed feature is its mean, clamped.
    fixed = torch.zeros_like(location, dtype=torch.bool) if estimates.suppressed is None else estimates.suppressed
    terms = _gaussian(embedding, torch.where(fixed, location.clamp(low, high), location), variance + rounding)
    spread = (variance + rounding).sqrt()
    at_low, at_high = (embedding <= low) & ~fixed, (embedding >= high) & ~fixed
    terms = torch.where(at_low, torch.special.log_ndtr((low - location) / spread), terms)
    terms = torch.where(at_high, torch.special.log_ndtr((location - high) / spread), terms)
    return terms.sum(-1, dtype=torch.float64)


def _gaussian(value: Tensor, location: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((value - location).square() / variance + variance.log() + _LOG_2_PI)
