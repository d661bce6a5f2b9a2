r"""A shortlist of candidate tokens for every observed embedding, without knowledge of the tokens before it.

The mean shift µ_c of a token c depends far more on c than on the tokens before. The shortlist therefore takes the µ_c
and σ_c of every token in one context, the tokens before the first transformed one, which everybody can read. The
candidates of an observation x̃ are the tokens of largest

    Σ_f log N(x̃_f; e_cf + µ_cf, σ_cf² + δ_f²)

δ_f² is the variance of the change of µ_f and σ_f with the context, measured on a few tokens in a longer context. One
pass over the vocabulary serves all observations.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.metrics.known_transform.likelihood import Observation
from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.noise_layer.next_token import Estimates, NextTokenEstimates, next_token_estimates
from sgfast.ops.precision import full_precision_products

# Tokens, evenly spaced in the table, that make the longer context, and tokens whose change is measured in it.
_CONTEXT, _MEASURED = 16, 64


class _Gaussians(NamedTuple):
    """Locations and variances (C, D) of the observations that candidates would give, in one context."""

    location: Tensor
    variance: Tensor


def shortlist(
    noise_layer: BaseNoiseLayer,
    table: Tensor,
    prefix: Tensor,
    observed: Observation,
    count: int,
    *,
    draws: int,
    length: int,
    max_bytes: int,
) -> Tensor:
    """Return the ``count`` likeliest tokens for each observation (N, D), int64 (N, count).

    Args:
        noise_layer: causal, in evaluation mode.
        table: (V, D), the embedding table.
        prefix: (P,) the tokens before the first transformed one.
        observed: (N, D) of the same sequences.
        count: at most V.
        draws: number of draws that each observation is the mean of.
        length: of the longest sequence.
        max_bytes: bound on temporaries.
    """
    estimates = next_token_estimates(noise_layer, length, table.shape[1])
    if len(prefix):
        estimates.begin(table[prefix])
    spread = observed.rounding.float().mean(0) + _change_with_context(noise_layer, table, prefix, estimates, length)
    best = observed.embedding.new_full((len(observed.embedding), 0), 0.0)
    tokens = torch.empty(len(observed.embedding), 0, dtype=torch.int64, device=table.device)
    for first, embeddings in candidate_chunks(table, estimates.most_candidates(max_bytes // 2)):
        found = _gaussians(embeddings, estimates.estimate(embeddings), draws)
        scores = _scores(observed, _Gaussians(found.location, found.variance + spread), max_bytes // 2)
        own = torch.arange(first, first + len(embeddings), device=table.device).expand_as(scores)
        scores, tokens = torch.cat([best, scores], 1), torch.cat([tokens, own], 1)
        best, places = scores.topk(min(count, scores.shape[1]), dim=1)
        tokens = tokens.gather(1, places)
    return tokens


def candidate_chunks(table: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first token and the embeddings of runs of at most ``count`` tokens."""
    for first in range(0, len(table), count):
        yield first, table[first : first + count]


def _gaussians(embeddings: Tensor, estimates: Estimates, draws: int) -> _Gaussians:
    mean, std = estimates.mean[0].float(), estimates.std[0].float()
    location, variance = embeddings.float() + mean, std.square() / draws
    if estimates.suppressed is None:
        return _Gaussians(location, variance)
    suppressed = estimates.suppressed[0]
    return _Gaussians(torch.where(suppressed, mean, location), variance.masked_fill(suppressed, 0))


def _change_with_context(
    noise_layer: BaseNoiseLayer, table: Tensor, prefix: Tensor, before: NextTokenEstimates, length: int
) -> Tensor:
    """Return δ² (D,): the mean squared change of the locations of a few tokens in a longer context."""
    room = min(_CONTEXT, length - len(prefix) - 1)
    spaced = torch.linspace(0, len(table) - 1, min(_MEASURED, len(table)), device=table.device).long()
    after = next_token_estimates(noise_layer, length, table.shape[1])
    longer = torch.cat([prefix, spaced[:: max(1, len(spaced) // _CONTEXT)][: max(room, 0)]])
    if len(longer):
        after.begin(table[longer])
    one, other = (_gaussians(table[spaced], part.estimate(table[spaced]), 1) for part in (before, after))
    return (one.location - other.location).square().mean(0)


def _scores(observed: Observation, gaussians: _Gaussians, max_bytes: int) -> Tensor:
    """Return the log-likelihoods (N, C) without their constant, by matrix products, centred to keep digits."""
    center = gaussians.location.mean(0)
    location, precision = gaussians.location - center, 1 / gaussians.variance
    weighted = location * precision
    constant = (location * weighted - precision.log()).sum(-1)
    rows = max(1, max_bytes // (8 * location.shape[1]))
    scores = []
    with full_precision_products(location.device):
        for embedding in torch.split(observed.embedding.float(), rows):
            value = embedding - center
            scores.append(value @ weighted.T - 0.5 * (value.square() @ precision.T + constant))
    return torch.cat(scores)
