"""Accumulators: the same bits under every split, order, merge and number of processes, and naive float64 values."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sgfast.metrics import PrivacyMetrics, UtilityMetrics
from sgfast.metrics.per_sequence import sequence_utility
from sgfast.ops import divergences
from tests.processes import in_processes

V, D = 23, 6


def sequences(count, length=7, seed=0, dtype=torch.float32):
    """Logits, an attention mask with some empty rows, and tokens."""
    generator = torch.Generator().manual_seed(seed)
    noisy, clean = (3 * torch.randn(count, length, V, generator=generator, dtype=dtype) for _ in range(2))
    lengths = torch.randint(0, length + 1, (count, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return noisy, clean, mask, torch.randint(0, V, (count, length), generator=generator)


def attacked(count, seed=0):
    """Transformed embeddings, tokens, and a mask, of rows; and their table."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(99))
    input_ids = torch.randint(0, V, (count, 5), generator=generator)
    transformed = table[input_ids] + torch.randn(count, 5, D, generator=generator)
    return (transformed, input_ids, torch.rand(count, 5, generator=generator) > 0.4), table


def exactly(result, expected):
    """Equal to the last bit, NaN included."""
    assert result.keys() == expected.keys()
    for name, value in result.items():
        assert value == expected[name] or (math.isnan(value) and math.isnan(expected[name])), name


def naive_utility(noisy, clean, mask, input_ids):
    """The definitions, token by token."""
    p, q = noisy.double().softmax(-1), clean.double().softmax(-1)
    m = (p + q) / 2
    per_token = {
        "next_token_utility/jefferys": ((p - q) * (p.log() - q.log())).sum(-1),
        "next_token_utility/jensen_shannon": ((p * (p / m).log() + q * (q / m).log()) / 2).sum(-1),
        "next_token_utility/total_variation": ((p - q).abs() / 2).sum(-1),
        "next_token_utility/squared_hellinger_distance": ((p.sqrt() - q.sqrt()).square() / 2).sum(-1),
        "next_token_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    rows = [row for row in range(len(mask)) if mask[row].any()]
    result = {
        name: sum(values[row][mask[row]].mean().item() for row in rows) / len(rows)
        for name, values in per_token.items()
    }
    predicted = mask[:, :-1] & mask[:, 1:]
    for name, side in (("clean", q), ("noisy", p)):
        log_p = side.log()[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
        result[f"{name}_perplexity"] = (-log_p[predicted].mean()).exp().item()
    return result | {
        "sequences": len(rows),
        "attended_tokens": int(mask.sum()),
        "predicted_tokens": int(predicted.sum()),
    }


def test_utility_against_the_definitions():
    metrics = UtilityMetrics()
    batch = sequences(12, dtype=torch.float64)
    metrics.update(*batch)
    assert metrics.compute() == pytest.approx(naive_utility(*batch), rel=1e-12)
    metrics = UtilityMetrics()
    metrics.update(*sequences(12))
    assert metrics.compute() == pytest.approx(naive_utility(*sequences(12)), rel=2e-6)


def test_restricted_to_top_k_and_without_tokens():
    noisy, clean, mask, _ = sequences(6, dtype=torch.float64)
    whole, restricted = UtilityMetrics(), UtilityMetrics(top_k=3)
    whole.update(noisy, clean, mask)
    restricted.update(noisy, clean, mask)
    for name, value in restricted.compute().items():
        if name.startswith("next_token_utility"):
            assert 0.3 * whole.compute()[name] < value < whole.compute()[name]
    assert math.isnan(whole.compute()["noisy_perplexity"])
    assert whole.compute()["predicted_tokens"] == 0


def test_any_kinds_under_their_keys():
    """A kind has the same key alone as among the documented ones; truncated KL terms may be negative."""
    noisy, clean, mask, _ = sequences(8, dtype=torch.float64)
    kinds = ("forward_kl", "jeffreys", "skew_reverse_kl")
    keys = ("next_token_utility/forward_kl", "next_token_utility/jefferys", "next_token_utility/skew_reverse_kl")
    for arguments in ({}, {"top_k": 2}, {"top_k": 2, "support": "tail"}):
        metrics = UtilityMetrics(kinds=kinds, **arguments)
        metrics.update(noisy, clean, mask)
        values = divergences(noisy, clean, kinds, **({"support": "truncate"} | arguments))
        found = metrics.compute()
        assert [name for name in found if name.startswith("next_token_utility")] == list(keys)
        for key, kind in zip(keys, kinds, strict=True):
            rows = [row for row in range(8) if mask[row].any()]
            expected = sum(values[kind][row][mask[row]].mean().item() for row in rows) / len(rows)
            assert found[key] == pytest.approx(expected, rel=1e-12), (arguments, kind)
    one = UtilityMetrics(kinds="forward_kl", top_k=1)
    flat, peaked = torch.zeros(1, 1, 4, dtype=torch.float64), torch.tensor([[[3.0, 0, 0, 0]]], dtype=torch.float64)
    one.update(peaked, flat, torch.ones(1, 1))
    assert one.compute()["next_token_utility/forward_kl"] == pytest.approx(
        0.25 * math.log(0.25 / peaked.softmax(-1)[0, 0, 0]), rel=1e-12
    )


def test_vocabularies_that_are_padded_differently():
    noisy, clean, mask, input_ids = sequences(8)
    metrics, padded = UtilityMetrics(top_k=3), UtilityMetrics(top_k=3, shared_vocab=V)
    metrics.update(noisy, clean, mask, input_ids)
    high = torch.full((*mask.shape, 5), 50.0)  # would win every comparison
    padded.update(torch.cat([noisy, high], -1), torch.cat([clean, high[..., :2]], -1), mask, input_ids)
    exactly(padded.compute(), metrics.compute())
    with pytest.raises(ValueError, match="have 28 and 23 columns; shared_vocab=n compares the first n"):
        metrics.update(torch.cat([noisy, high], -1), clean, mask)
    with pytest.raises(ValueError, match="clean_logits needs shared_vocab=24 columns at least"):
        UtilityMetrics(shared_vocab=24).update(torch.cat([noisy, high], -1), clean, mask)
    with pytest.raises(ValueError, match="must have been made with the options"):
        metrics.merge(padded)


@pytest.mark.parametrize("max_chunk_bytes", [None, 1])
def test_hidden_states_with_a_head_each(max_chunk_bytes):
    """Student and teacher of other widths, dtypes and padding."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.nn.Linear(6, V), torch.nn.Linear(9, V + 3, dtype=torch.float64)
    for head in (student, teacher):
        torch.nn.init.normal_(head.weight, generator=generator)
        head.requires_grad_(False)
    _, _, mask, input_ids = sequences(8)
    hidden = torch.randn(8, 7, 6, generator=generator), torch.randn(8, 7, 9, generator=generator, dtype=torch.float64)
    options = {"kinds": ("forward_kl", "total_variation"), "shared_vocab": V, "top_k": 4, "support": "tail"}
    expected, metrics = UtilityMetrics(**options), UtilityMetrics(**options, max_chunk_bytes=max_chunk_bytes)
    expected.update(student(hidden[0]), teacher(hidden[1]), mask, input_ids)
    metrics.update_from_hidden(*hidden, student, mask, input_ids, clean_head=teacher)
    assert metrics.compute() == pytest.approx(expected.compute(), rel=1e-5)
    nothing = metrics.update_from_hidden(*hidden, student, torch.zeros_like(mask), input_ids, clean_head=teacher)
    assert nothing["next_token_utility/forward_kl"].isnan().all()
    assert metrics.compute() == pytest.approx(expected.compute(), rel=1e-5)
    with pytest.raises(ValueError, match="noisy_hidden and clean_hidden must have one shape"):
        metrics.update_from_hidden(*hidden, student, mask)
    with pytest.raises(ValueError, match="have 23 and 26 columns; shared_vocab=n"):
        UtilityMetrics().update_from_hidden(*hidden, student, mask, clean_head=teacher)


def accumulate(make, batches, order, cuts):
    """Update several accumulators with rows in some order, and merge them in another."""
    rows = len(batches[0])
    parts = [make() for _ in range(3)]
    edges = [0, *sorted(cuts), rows]
    for part, (first, last) in zip(itertools.cycle(parts), itertools.pairwise(edges), strict=False):
        picked = torch.tensor(order[first:last], dtype=torch.int64)
        part.update(*(tensor[picked] for tensor in batches))
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    return parts[2].compute()


@settings(max_examples=25)
@given(st.permutations(range(9)), st.lists(st.integers(0, 9), max_size=5))
def test_splits_orders_and_merges_change_no_bit(order, cuts):
    batch = sequences(9)
    per_sequence = sequence_utility(*batch[:3], input_ids=batch[3])

    class OfValues(UtilityMetrics):
        """Adds rows of ``per_sequence``: what an update computes may differ in the last float32 digit."""

        def update(self, rows):
            self.add({name: values[rows] for name, values in per_sequence.items()})

    whole = UtilityMetrics()
    whole.update(*batch)
    exactly(accumulate(OfValues, (torch.arange(9),), order, cuts), whole.compute())
    assert accumulate(UtilityMetrics, batch, order, cuts) == pytest.approx(whole.compute(), rel=1e-6)

    (transformed, input_ids, mask), table = attacked(9)
    whole = PrivacyMetrics(table)
    whole.update(transformed, input_ids, mask)
    exactly(accumulate(lambda: PrivacyMetrics(table), (transformed, input_ids, mask), order, cuts), whole.compute())


def test_the_mean_is_correctly_rounded():
    per_sequence = sequence_utility(*sequences(50)[:3])
    metrics = UtilityMetrics()
    metrics.add(per_sequence)
    for name in ("next_token_utility/jefferys", "next_token_agreement"):
        values = [Fraction(value) for value in per_sequence[name].tolist() if not math.isnan(value)]
        assert metrics.compute()[name] == float(sum(values) / len(values))


def test_padding_is_not_read():
    noisy, clean, mask, input_ids = sequences(8)
    padding = torch.full((8, 3, V), torch.nan)
    per_sequence = sequence_utility(noisy, clean, mask, input_ids=input_ids)
    padded = sequence_utility(
        torch.cat([padding, noisy, padding], dim=1),
        torch.cat([padding, clean, padding], dim=1),
        torch.nn.functional.pad(mask, (3, 3)),
        input_ids=torch.nn.functional.pad(input_ids, (3, 3), value=-1),
    )
    for name, values in per_sequence.items():
        torch.testing.assert_close(padded[name], values, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(padded["attended_tokens"], mask.sum(-1))


def test_privacy_against_the_definitions():
    (transformed, input_ids, mask), table = attacked(20)
    metrics = PrivacyMetrics(table, beta=2, r=3, k=(1, 4))
    ranks = metrics.update(transformed, input_ids, mask)
    distances = (transformed.double()[:, :, None] - table).norm(dim=-1)
    expected_ranks = (distances < distances.gather(-1, input_ids[..., None])).sum(-1)
    assert torch.equal(ranks, torch.where(mask, expected_ranks, -1))
    found = expected_ranks[mask].double()
    expected = {
        "nearest_neighbor_failure_rate": (found >= 2).double().mean().item(),
        "max_rank_failure_rate": (found != V - 3).double().mean().item(),
        "mean_reconstruction_rank": found.mean().item(),
        "transformed_tokens": int(mask.sum()),
    }
    for k in (1, 4):
        expected[f"token_transformation_rate_{k}"] = (found >= k).double().mean().item()
        symmetric = ((found >= k) & (found < V - k)).double().mean().item()
        expected[f"symmetric_token_transformation_rate_{k}"] = symmetric
    assert metrics.compute() == pytest.approx(expected, rel=1e-15)
    assert torch.equal(metrics.rank_counts(), torch.bincount(expected_ranks[mask], minlength=V))
    per_sequence = metrics.per_sequence(ranks)
    weights = per_sequence.pop("transformed_tokens")
    assert torch.equal(weights, mask.sum(-1))
    for name, values in per_sequence.items():
        assert (values.nan_to_num() * weights).sum().item() / expected["transformed_tokens"] == pytest.approx(
            expected[name], rel=1e-12
        )
    assert metrics.per_sequence(torch.full((2, 3), -1))["mean_reconstruction_rank"].isnan().all()
    assert "symmetric_token_transformation_rate_10" in PrivacyMetrics(table).compute()
    assert "token_transformation_rate_100" not in PrivacyMetrics(table).compute()


def test_nothing_gives_nan_and_reset_forgets():
    utility, privacy = UtilityMetrics(), PrivacyMetrics(attacked(1)[1])
    empty = utility.compute() | privacy.compute()
    counts = {"sequences", "attended_tokens", "predicted_tokens", "transformed_tokens"}
    assert all(value == 0 if name in counts else math.isnan(value) for name, value in empty.items())
    utility.update(*sequences(4))
    privacy.update(*attacked(4)[0])
    assert not math.isnan(utility.compute()["next_token_agreement"])
    noisy, clean, mask, input_ids = sequences(4)
    before = utility.compute()
    utility.update(noisy, clean, torch.zeros_like(mask), input_ids)
    utility.update(noisy[:0], clean[:0], mask[:0], input_ids[:0])
    exactly(utility.compute(), before)
    utility.reset()
    privacy.reset()
    exactly(utility.compute() | privacy.compute(), empty)


def test_a_state_goes_on_where_it_was_saved(tmp_path):
    batch, (rows, table) = sequences(6), attacked(6)
    for make, tensors in ((UtilityMetrics, batch), (lambda: PrivacyMetrics(table), rows)):
        whole, first = make(), make()
        whole.update(*tensors)
        first.update(*(tensor[:2] for tensor in tensors))
        torch.save(first.state_dict(), tmp_path / "state")
        first.update(*tensors)  # what was saved is a copy
        resumed = make()
        resumed.load_state_dict(torch.load(tmp_path / "state"))
        resumed.update(*(tensor[2:] for tensor in tensors))
        assert resumed.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_infinite_and_undefined_divergences_are_not_hidden():
    clean = torch.zeros(2, 1, 3)
    noisy = torch.tensor([[[0.0, 0.0, -torch.inf]], [[0.0, 0.0, 0.0]]])
    metrics = UtilityMetrics()
    metrics.update(noisy, clean, torch.ones(2, 1))
    assert metrics.compute()["next_token_utility/jefferys"] == math.inf
    assert metrics.compute()["next_token_utility/total_variation"] == pytest.approx(1 / 6)
    metrics.update(torch.full_like(clean, torch.nan), clean, torch.ones(2, 1))
    assert math.isnan(metrics.compute()["next_token_utility/total_variation"])


def test_errors():
    table = attacked(1)[1]
    with pytest.raises(ValueError, match=r"other must have been made with the options \{'top_k': None\}; it has"):
        UtilityMetrics().merge(UtilityMetrics(top_k=2))
    with pytest.raises(TypeError, match="other must be a UtilityMetrics; got PrivacyMetrics"):
        UtilityMetrics().merge(PrivacyMetrics(table))
    with pytest.raises(ValueError, match="table_size"):
        PrivacyMetrics(table).load_state_dict(PrivacyMetrics(table[:5]).state_dict())
    with pytest.raises(ValueError, match="must have the keys counts and options"):
        PrivacyMetrics(table).load_state_dict({"counts": torch.zeros(V)})
    damaged = PrivacyMetrics(table).state_dict() | {"counts": torch.zeros(V)}
    with pytest.raises(ValueError, match="must be an int64 tensor of shape"):
        PrivacyMetrics(table).load_state_dict(damaged)
    for arguments, message in (({"beta": 0}, "beta"), ({"r": V + 1}, "r must"), ({"k": (V + 1,)}, "k must")):
        with pytest.raises(ValueError, match=message):
            PrivacyMetrics(table, **arguments)
    with pytest.raises(ValueError, match="top_k must be at least 1; got 0"):
        UtilityMetrics(top_k=0)
    with pytest.raises(ValueError, match=r"kinds must be among .* Did you mean 'jeffreys'"):
        UtilityMetrics(kinds=("jefferys",))
    with pytest.raises(ValueError, match="kinds must name at least one kind"):
        UtilityMetrics(kinds=())
    with pytest.raises(ValueError, match="per_sequence needs the values next_token_utility/reverse_kl; got"):
        UtilityMetrics(kinds="reverse_kl").add(sequence_utility(*sequences(2)[:3]))
    with pytest.raises(ValueError, match="metric must be one of"):
        PrivacyMetrics(table, metric="dot")
    noisy, clean, mask, _ = sequences(2)
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        UtilityMetrics().update(noisy, clean, mask[:, :3])
    with pytest.raises(ValueError, match="input_ids must have shape"):
        UtilityMetrics().update(noisy, clean, mask, torch.zeros(2, 3, dtype=torch.int64))


def test_ranks_from_a_gpu_are_added_to_counts_that_began_on_a_cpu():
    with FakeTensorMode():
        metrics = PrivacyMetrics(torch.zeros(V, D))
        metrics.add(torch.zeros(2, 3, dtype=torch.int64, device="cuda"))
        metrics.add(torch.zeros(2, 3, dtype=torch.int64))
        assert metrics.rank_counts().shape == (V,)


def _accumulate_a_shard(rank, processes):
    batch, (rows, table) = sequences(11), attacked(11)
    utility, privacy = UtilityMetrics(), PrivacyMetrics(table)
    own, own_privacy = UtilityMetrics(), PrivacyMetrics(table)
    # The last process has nothing, the others uneven shares, one row at a time.
    shares = torch.tensor([0] * 8 + [1] * 3) if processes == 3 else torch.zeros(11, dtype=torch.int64)
    for row in (shares == rank).nonzero().flatten().tolist():
        utility.update(*(tensor[row : row + 1] for tensor in batch))
        privacy.update(*(tensor[row : row + 1] for tensor in rows))
    for row in range(11):
        own.update(*(tensor[row : row + 1] for tensor in batch))
        own_privacy.update(*(tensor[row : row + 1] for tensor in rows))
    expected, expected_privacy = own.compute(all_processes=False), own_privacy.compute(all_processes=False)
    for _ in range(2):  # computing changes no state
        exactly(utility.compute(), expected)
        exactly(privacy.compute(), expected_privacy)
    assert torch.equal(privacy.rank_counts(), own_privacy.rank_counts(all_processes=False))
    assert utility.compute(all_processes=False)["sequences"] <= expected["sequences"]
    if rank == processes - 1:
        assert utility.compute(all_processes=False)["sequences"] == 0


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_with_uneven_shares(processes):
    in_processes(processes, _accumulate_a_shard, processes)
