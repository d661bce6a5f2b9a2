"""Rates of a reading against counts by hand."""

import math

import torch

from sgfast.metrics.known_transform.rates import reading_rates

TRUE = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
READ = torch.tensor([[1, 2, 0, 4, 5], [6, 7, 8, 9, 10]])
COUNTED = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
RANKS = torch.tensor([[-1, 0, 12, 0, 0], [-1, -1, 0, 0, 0]])
LEADS = torch.tensor([[math.nan, 1.0, 9.0, 2.0, 3.0], [math.nan, math.nan, 4.0, 5.0, 6.0]])


def test_by_hand():
    canaries = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 1, 1]]).bool()
    rates = reading_rates(READ, RANKS, LEADS, TRUE, COUNTED, canaries)
    assert rates.failure_rate.item() == torch.tensor(1 / 7).item()
    assert rates.top_10_failure_rate.item() == torch.tensor(1 / 7).item()
    assert rates.worst_decile_failure_rate == 1  # the one token of the largest lead is the wrong one
    assert rates.exact_sequence_rate == 0.5
    assert rates.canary_recall == 1


def test_a_canary_with_one_wrong_token_is_not_recalled():
    canaries = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 0, 0]]).bool()
    rates = reading_rates(READ, RANKS, LEADS, TRUE, COUNTED, canaries)
    # Runs: tokens 1 and 2 (wrong), token 4 of row 0, tokens 0 and 2 of row 1: a row's end ends a run.
    assert rates.canary_recall.item() == 0.75


def test_the_surest_tenth_holds_a_tenth_of_the_tokens():
    true = torch.zeros(1, 40, dtype=torch.int64)
    read = true.clone()
    read[0, :2] = 1
    leads = torch.arange(40, 0, -1.0)[None]
    every = torch.ones(1, 40, dtype=torch.bool)
    rates = reading_rates(read, torch.zeros_like(true), leads, true, every)
    assert rates.worst_decile_failure_rate == 0.5  # two of the four surest
    assert rates.canary_recall is None


def test_nothing_to_count_is_nan():
    nothing = torch.zeros_like(COUNTED)
    rates = reading_rates(READ, RANKS, LEADS, TRUE, nothing, nothing)
    assert all(math.isnan(rate) for rate in rates)
