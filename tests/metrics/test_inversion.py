"""The learned inversion attack on transforms whose secrets are known, and its guards against leaks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgfast.metrics import LearnedInversionAttack
from sgfast.metrics.inversion import _groups_of_equal_sequences, _held_out

V, D = 40, 12


def texts(count=120, length=20, seed=0):
    """A table and token ids of uneven frequencies."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    input_ids = torch.multinomial(frequencies.expand(count, V), length, replacement=True, generator=generator)
    return torch.randn(V, D, generator=generator), input_ids, generator


def test_a_rotation_and_a_shift_are_undone():
    table, input_ids, generator = texts()
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    transformed = table[input_ids] @ rotation + 5
    transformed += 0.1 * torch.randn(transformed.shape, generator=generator)
    result = LearnedInversionAttack(table).evaluate(transformed, input_ids)
    assert result.nearest_neighbor_failure_rate > 0.7
    assert result.failure_rate < 0.02
    # The same numbers in other units, and with scores a few tokens at a time.
    attack = LearnedInversionAttack(1000 * table, max_chunk_bytes=50_000)
    scaled = attack.evaluate(1000 * transformed, input_ids)
    assert scaled.failure_rate == pytest.approx(result.failure_rate, abs=0.005)
    assert (attack.predict(1000 * transformed) != input_ids).float().mean() < 0.02


def test_the_best_guess_under_gaussian_noise():
    table, input_ids, generator = texts(300)
    std = 1.5
    transformed = table[input_ids] + std * torch.randn(*input_ids.shape, D, generator=generator)
    result = LearnedInversionAttack(table).evaluate(transformed, input_ids)
    # Bayes: nearest embeddings, weighted by the true frequencies.
    frequencies = 1 / torch.arange(1, V + 1)
    scores = -torch.cdist(transformed, table).square() / (2 * std**2) + (frequencies / frequencies.sum()).log()
    optimum = (scores.argmax(-1) != input_ids).double().mean().item()
    error = (0.25 / result.held_out_tokens) ** 0.5
    assert result.nearest_neighbor_failure_rate > optimum + 4 * error
    assert result.failure_rate == pytest.approx(optimum, abs=3 * error)


def test_training_goes_beyond_the_closed_form():
    table, input_ids, generator = texts(300)
    clean = table[input_ids]
    # Half of the space is turned around: no linear map undoes it.
    transformed = torch.where(clean[..., :1] > 0, -clean, clean) + 4 * (clean[..., :1] > 0)
    transformed += 0.05 * torch.randn(transformed.shape, generator=generator)
    start, trained = (
        LearnedInversionAttack(table, epochs=epochs, learning_rate=3e-3).evaluate(transformed, input_ids)
        for epochs in (0, 15)
    )
    assert start.failure_rate > 0.05
    assert trained.failure_rate < 0.3 * start.failure_rate


def test_embeddings_that_say_nothing_are_read_as_well_as_without_them():
    table, input_ids, generator = texts(300)
    transformed = torch.randn(*input_ids.shape, D, generator=generator)
    result = LearnedInversionAttack(table).evaluate(transformed, input_ids)
    error = (0.25 / result.held_out_tokens) ** 0.5
    most_frequent = input_ids.flatten().bincount().argmax()
    assert result.unigram_failure_rate == pytest.approx(
        (input_ids != most_frequent).double().mean().item(), abs=3 * error
    )
    assert result.failure_rate > result.unigram_failure_rate - 3 * error
    assert result.shuffled_failure_rate > result.unigram_failure_rate - 3 * error


def test_shuffled_pairs_of_a_readable_text_are_not_read():
    table, input_ids, _ = texts()
    result = LearnedInversionAttack(table).evaluate(table[input_ids], input_ids)
    assert result.failure_rate == 0
    error = (0.25 / result.held_out_tokens) ** 0.5
    assert result.shuffled_failure_rate > result.unigram_failure_rate - 3 * error


def test_equal_texts_stay_on_one_side():
    # Every text is there eight times, and its embeddings say which text it is and nothing of any other.
    table, input_ids, generator = texts(30)
    fingerprints = 3 * torch.randn(*input_ids.shape, D, generator=generator)
    repeated_ids = input_ids.repeat(8, 1)
    transformed = fingerprints.repeat(8, 1, 1)
    attack = LearnedInversionAttack(table, hidden_size=256, epochs=30, learning_rate=1e-2)
    honest = attack.evaluate(transformed, repeated_ids)
    assert honest.failure_rate > honest.unigram_failure_rate - 0.1
    leaking = attack.evaluate(transformed, repeated_ids, groups=torch.arange(240))
    assert leaking.failure_rate < honest.failure_rate - 0.3


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 9), st.integers(2, 3)
)
def test_groups_are_never_split(group, fraction, seed, least):
    generator = torch.Generator().manual_seed(seed)
    if len(set(group)) < least:
        with pytest.raises(ValueError, match=f"at least {least} different sequences"):
            _held_out(torch.tensor(group), fraction, generator, least)
        return
    held_out = _held_out(torch.tensor(group), fraction, generator, least)
    sides = [{g for g, out in zip(group, held_out.tolist(), strict=True) if out == side} for side in (False, True)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) >= least - 1
    assert sides[1]


def test_equal_sequences_are_told_by_their_selected_tokens():
    input_ids = torch.tensor([[1, 2, 0, 0], [0, 0, 1, 2], [2, 1, 0, 0], [1, 2, 3, 0]])
    selected = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]) != 0
    assert _groups_of_equal_sequences(input_ids, selected).tolist() == [0, 0, 1, 2]


@torch.inference_mode()
def test_unselected_tokens_do_not_count_and_runs_repeat():
    table, input_ids, generator = texts(40)
    mask = torch.rand(input_ids.shape, generator=generator) > 0.3
    transformed = table[input_ids] + torch.randn(*input_ids.shape, D, generator=generator)
    attack = LearnedInversionAttack(table, epochs=2)
    result = attack.evaluate(transformed, input_ids, mask)
    assert result.training_tokens + result.held_out_tokens == mask.sum()
    assert result.held_out_tokens == pytest.approx(0.2 * mask.sum().item(), rel=0.15)
    assert result.held_out_sequences in (8, 9)
    transformed[~mask], input_ids[~mask] = torch.nan, -100
    assert LearnedInversionAttack(table, epochs=2).evaluate(transformed, input_ids, mask) == result
    attack.fit(transformed.bfloat16(), input_ids, mask)
    assert attack.predict(table[:3]).shape == (3,)
    assert attack.predict(table[5]).shape == ()


def test_errors():
    table, input_ids, _ = texts(4)
    attack = LearnedInversionAttack(table)
    with pytest.raises(RuntimeError, match="must be trained"):
        attack.predict(table)
    with pytest.raises(ValueError, match=r"must have shape \(\.\.\., 12\), the width of table; got \(40, 11\)"):
        attack.predict(table[:, 1:])
    with pytest.raises(ValueError, match="transformed must have shape"):
        attack.evaluate(table[input_ids[0]], input_ids[0])
    with pytest.raises(ValueError, match=r"selected input_ids must lie in \[0, 40\)"):
        attack.evaluate(table[input_ids], input_ids + V)
    with pytest.raises(ValueError, match="at least 3 different sequences with a selected token are needed; got 2"):
        attack.evaluate(table[input_ids[:2]], input_ids[:2])
    with pytest.raises(ValueError, match=r"groups must have shape \(4,\); got \(3,\)"):
        attack.evaluate(table[input_ids], input_ids, groups=torch.arange(3))
    for arguments in ({"epochs": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"held_out_fraction": 1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            LearnedInversionAttack(table, **arguments)
