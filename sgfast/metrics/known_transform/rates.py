"""Rates of an attack that reads tokens: of tokens, of the surest tokens, of whole sequences and of canaries."""

from typing import NamedTuple

import torch
from torch import Tensor

_SHORT_LIST = 10
_DECILE = 0.1


class ReadingRates(NamedTuple):
    """Scalars, float32; NaN where there is nothing to count. ``canary_recall`` is None without canaries."""

    failure_rate: Tensor
    top_10_failure_rate: Tensor
    worst_decile_failure_rate: Tensor
    exact_sequence_rate: Tensor
    canary_recall: Tensor | None


def reading_rates(
    tokens: Tensor, ranks: Tensor, leads: Tensor, input_ids: Tensor, counted: Tensor, canaries: Tensor | None = None
) -> ReadingRates:
    """Compute the rates of a reading.

    Args:
        tokens: (B, T) int64, the tokens that were read.
        ranks: (B, T) int64, the rank of the true token among the candidates at its place.
        leads: (B, T) floating, the attacker's confidence in a token.
        input_ids: (B, T), the true tokens.
        counted: (B, T) bool, the transformed tokens.
        canaries: (B, T) bool; adjacent tokens make one canary.

    Returns:
        ``failure_rate``: the fraction of the counted tokens that were read wrong.
        ``top_10_failure_rate``: the fraction whose true token has a rank of 10 or more.
        ``worst_decile_failure_rate``: the failure rate of the tenth of the counted tokens (one at least) of which the
        attacker is surest.
        ``exact_sequence_rate``: the fraction of the sequences with a counted token in which each of them was read.
        ``canary_recall``: the fraction of the canaries that were read whole.
    """
    wrong = tokens != input_ids
    missed = wrong[counted]
    surest = leads[counted].topk(min(len(missed), max(1, int(_DECILE * len(missed))))).indices
    some = counted.any(-1)
    exact = ~(wrong & counted).any(-1)
    return ReadingRates(
        failure_rate=_mean(missed),
        top_10_failure_rate=_mean(ranks[counted] >= _SHORT_LIST),
        worst_decile_failure_rate=_mean(missed[surest]),
        exact_sequence_rate=_mean(exact[some]),
        canary_recall=None if canaries is None else _recall(~wrong, canaries),
    )


def _mean(events: Tensor) -> Tensor:
    return events.double().mean().float()


def _recall(read: Tensor, canaries: Tensor) -> Tensor:
    """Return the fraction of runs of canary tokens of which every token was read."""
    before = torch.nn.functional.pad(canaries, (1, 0))[:, :-1]
    # A number for every run, counted over the rows one after another; 0 outside.
    runs = (canaries & ~before).flatten().cumsum(0)
    members = runs[canaries.flatten()]
    count = int(runs[-1]) if runs.numel() else 0
    missed = torch.zeros(count + 1, device=read.device).index_add(0, members, (~read)[canaries].float())
    return _mean(missed[1:] == 0)
