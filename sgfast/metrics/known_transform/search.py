"""Beam search for the likeliest tokens of one transformed sequence."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.metrics.known_transform.likelihood import Observation, log_likelihood
from sgfast.metrics.known_transform.prior import NextTokenPrior
from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.noise_layer.next_token import NextTokenEstimates, next_token_estimates


class Attacker(NamedTuple):
    """The attacker's knowledge and effort. ``table`` is (V, D); ``max_bytes`` bounds the temporaries of a step."""

    noise_layer: BaseNoiseLayer
    table: Tensor
    language_model: Any
    prior_weight: float
    beam: int
    draws: int
    max_bytes: int


class Reading(NamedTuple):
    """Tokens (T,) int64 and their log-score; for every token the rank of the true one and the lead of the best one.

    The rank (T,) int64 is the number of tokens that score above the true one, V if it was no candidate, and −1 at
    tokens that were not transformed or without ``true``. The lead (T,) float64 is the difference of the best token's
    score and the second's, NaN at tokens that were not transformed.
    """

    tokens: Tensor
    score: float
    ranks: Tensor
    leads: Tensor


def read_sequence(
    attacker: Attacker,
    observed: Observation,
    known: Tensor,
    candidates: Tensor | None,
    true: Tensor | None,
    on_token: Callable[[], None],
) -> Reading:
    """Read one sequence from left to right.

    Args:
        attacker: knowledge and effort.
        observed: (T, D).
        known: (T,) int64, the token where the embedding was not transformed, and −1 elsewhere.
        candidates: (T, K) int64, the tokens to score at each place; None for all.
        true: (T,) int64, the true tokens, for ranks alone.
        on_token: called after every transformed token.
    """
    table = attacker.table
    length, device = len(known), table.device
    estimates = next_token_estimates(attacker.noise_layer, length, table.shape[1])
    prior = _prior(attacker)
    scores = torch.zeros(1, dtype=torch.float64, device=device)
    ranks = torch.full((length,), -1, dtype=torch.int64, device=device)
    leads = torch.full((length,), math.nan, dtype=torch.float64, device=device)
    hidden = (known < 0).nonzero().squeeze(-1).tolist()
    # The known tokens at the beginning are read in one pass. Those at the end tell only hypotheses apart.
    begin = hidden[0] if hidden else length
    end = length if attacker.beam > 1 else hidden[-1] + 1 if hidden else 0
    if 0 < begin < end:
        estimates.begin(table[known[:begin]])
        if prior is not None:
            prior.begin(known[:begin])
    tokens = known[None, :begin]
    for place in range(begin, end):
        token = int(known[place])
        if token >= 0:
            chosen = known[place].expand(len(scores))
            parents = torch.arange(len(scores), device=device)
            if prior is not None and (log_prior := prior.scores()) is not None:
                scores = scores + log_prior[:, token]
        else:
            among = torch.arange(len(table), device=device) if candidates is None else candidates[place]
            here = Observation(observed.embedding[place], observed.rounding[place])
            extended = scores[:, None] + _step(attacker, estimates, here, among)
            if prior is not None and (log_prior := prior.scores()) is not None:
                extended = extended + log_prior[:, among]
            leads[place], rank = _standing(extended.max(0).values, among, None if true is None else true[place])
            ranks[place] = len(table) if rank is None else rank
            if true is None:
                ranks[place] = -1
            scores, places = extended.flatten().topk(min(attacker.beam, extended.numel()))
            parents, chosen = places // len(among), among[places % len(among)]
        tokens = torch.cat([tokens[parents], chosen[:, None]], dim=1)
        if place + 1 < end:
            estimates.extend(parents, table[chosen])
            if prior is not None:
                prior.extend(parents, chosen)
        if token < 0:
            on_token()
    best = int(scores.argmax())
    return Reading(torch.cat([tokens[best], known[max(begin, end) :]]), float(scores[best]), ranks, leads)


def _prior(attacker: Attacker) -> NextTokenPrior | None:
    if attacker.language_model is None:
        return None
    return NextTokenPrior(attacker.language_model, attacker.prior_weight, len(attacker.table))


def _step(attacker: Attacker, estimates: NextTokenEstimates, here: Observation, among: Tensor) -> Tensor:
    """Return the log-likelihood of an observation for each hypothesis and candidate, (H, C)."""
    found = []
    for some in torch.split(among, estimates.most_candidates(attacker.max_bytes)):
        embeddings = attacker.table[some]
        found.append(
            log_likelihood(
                here,
                embeddings,
                estimates.estimate(embeddings),
                draws=attacker.draws,
                value_range=attacker.noise_layer.value_range,
            )
        )
    return torch.cat(found, dim=1)


def _standing(scores: Tensor, among: Tensor, true: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the lead of the best of the scores (C,), and the true token's rank; None where it is no candidate."""
    leading = scores.topk(min(2, len(scores))).values
    lead = leading[0] - leading[1] if len(scores) > 1 else torch.full_like(leading[0], math.inf)
    if true is None or not bool((is_true := among == true).any()):
        return lead, None
    return lead, (scores > scores[is_true][0]).sum()
