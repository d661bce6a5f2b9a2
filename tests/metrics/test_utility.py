"""Utility metrics against a naive float64 computation, under every split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgfast.metrics import get_top_k_support_mask, get_utility_metrics_factory
from sgfast.metrics.per_sequence import sequence_utility, sequence_utility_from_hidden
from sgfast.metrics.utility import mean_over_sequences, token_divergences
from sgfast.model.decoder import backbone_of
from sgfast.model.head import language_model_head
from tests.live_bytes import LiveBytes
from tests.tiny_models import tiny_causal_lm


def naive(output, attention_mask, num_logits=None):
    """The definitions in float64, token by token."""
    clean, noisy = (
        logits.double() for logits in (output.base_model_output.clean_logits, output.base_model_output.noisy_logits)
    )
    p, q = noisy.softmax(-1), clean.softmax(-1)
    m = (p + q) / 2
    terms = {
        "next_token_utility/jefferys": (p - q) * (p.log() - q.log()),
        "next_token_utility/jensen_shannon": (p * (p / m).log() + q * (q / m).log()) / 2,
        "next_token_utility/total_variation": (p - q).abs() / 2,
        "next_token_utility/squared_hellinger_distance": (p.sqrt() - q.sqrt()).square() / 2,
    }
    support = torch.ones_like(p, dtype=torch.bool)
    if num_logits is not None:
        support = torch.zeros_like(support)
        for side in (noisy, clean):
            support.scatter_(-1, side.sort(dim=-1, descending=True, stable=True).indices[..., :num_logits], True)
    weights = attention_mask.double()
    return {
        name: ((term * support).sum(-1) * weights).sum(-1).div(weights.sum(-1)).mean().item()
        for name, term in terms.items()
    }


@pytest.mark.parametrize("sizes", [(None, None), (1, None), (2, 4), (None, 1), (100, 100)])
@pytest.mark.parametrize("num_logits", [None, 7])
def test_utility_metrics(num_logits, sizes, make_noisy_model, tokens):
    noisy_model = make_noisy_model().eval()
    get_utility_metrics = get_utility_metrics_factory(noisy_model, num_logits, *sizes)
    output = noisy_model(**tokens)
    metrics = get_utility_metrics()
    expected = naive(output, tokens["attention_mask"], num_logits)
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name
    with pytest.raises(RuntimeError, match="needs a forward pass"):
        get_utility_metrics()


def test_metrics_force_full_depth_and_read_the_latest_forward(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    get_utility_metrics = get_utility_metrics_factory(noisy_model)
    with noisy_model.noise_disabled():
        noisy_model(**tokens)
    noisy_model(**tokens)
    assert get_utility_metrics()["next_token_utility/jefferys"] > 1e-4
    with noisy_model.noise_disabled():
        noisy_model(**tokens)
    assert all(value == 0 for value in get_utility_metrics().values())


@settings(max_examples=25)
@given(st.data())
def test_splitting_never_changes_the_result(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    size = st.none() | st.integers(1, 7)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    noisy, clean = (torch.randn(batch, length, 11, generator=generator) for _ in range(2))
    mask = torch.rand(batch, length, generator=generator) > 0.3
    whole = token_divergences(noisy, clean, mask, 3)
    parts = token_divergences(noisy, clean, mask, 3, data.draw(size), data.draw(size))
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            mean_over_sequences(parts[name], mask), mean_over_sequences(values, mask), rtol=1e-6, atol=0, equal_nan=True
        )


def test_sequences_without_attended_tokens_drop_out():
    values = torch.tensor([[1.0, 3.0], [torch.nan, 7.0], [5.0, torch.nan]])
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    assert mean_over_sequences(values, mask).item() == 3.5
    assert mean_over_sequences(values, torch.zeros_like(mask)).isnan()


@pytest.mark.parametrize("max_chunk_bytes", [None, 1, 100_000])
@pytest.mark.parametrize("top_k", [None, 5])
@torch.no_grad()
def test_from_hidden_states_as_from_logits(tokens, top_k, max_chunk_bytes):
    model, *_ = tiny_causal_lm("gemma2", final_logit_softcapping=0.1)
    clean_embeddings = model.get_input_embeddings()(tokens["input_ids"])
    noisy_embeddings = clean_embeddings + torch.randn(
        clean_embeddings.shape, generator=torch.Generator().manual_seed(0)
    )
    mask = tokens["attention_mask"].clone()
    mask[2] = 0
    sides = [
        {"inputs_embeds": embeddings, "attention_mask": tokens["attention_mask"]}
        for embeddings in (noisy_embeddings, clean_embeddings)
    ]
    arguments = {"input_ids": tokens["input_ids"], "top_k": top_k}
    expected = sequence_utility(*(model(**side).logits for side in sides), mask, **arguments)
    assert (expected["next_token_utility/total_variation"][:2] > 1e-3).all()
    hidden = [backbone_of(model)(**side).last_hidden_state for side in sides]
    head = language_model_head(model)
    values = sequence_utility_from_hidden(*hidden, head, mask, max_chunk_bytes=max_chunk_bytes, **arguments)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-9, equal_nan=True)
    nothing = sequence_utility_from_hidden(*hidden, head, torch.zeros_like(mask), **arguments)
    assert nothing.keys() == values.keys()
    assert nothing["noisy_cross_entropy"].isnan().all()


@pytest.mark.parametrize("megabytes", [2, 8])
@torch.no_grad()
def test_logits_of_hidden_states_stay_within_the_budget(megabytes):
    width, size, length = 8, 4000, 700
    generator = torch.Generator().manual_seed(0)
    noisy, clean = (torch.randn(1, length, width, generator=generator) for _ in range(2))
    weight = torch.randn(size, width, generator=generator)
    mask = torch.ones(1, length, dtype=torch.bool)

    def head(hidden):
        return torch.tanh(hidden @ weight.T / 30) * 30

    with LiveBytes() as memory:
        values = sequence_utility_from_hidden(noisy, clean, head, mask, max_chunk_bytes=megabytes * 2**20)
    # The logits take 21 MiB. Of the budget a third is for the logits, a third for the divergences, which keep to it.
    assert 0.1 * megabytes * 2**20 < memory.peak < 2 * megabytes * 2**20 / 3
    expected = sequence_utility(head(noisy), head(clean), mask)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-9)


def test_top_k_support_mask():
    noisy = torch.tensor([[0.0, 5.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    clean = torch.tensor([[9.0, 0.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    mask = get_top_k_support_mask(noisy, clean, 2)
    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]
    for k in (0, 5):
        with pytest.raises(ValueError, match="must be between 1 and the vocabulary's size, 4"):
            get_top_k_support_mask(noisy, clean, k)
    with pytest.raises(ValueError, match="one shape"):
        get_top_k_support_mask(noisy, clean[:1], 2)


def test_errors(make_noisy_model):
    noisy_model = make_noisy_model()
    for arguments, message in (((0,), "num_logits"), ((None, 0), "max_batch_size"), ((None, None, 0), "max_seq")):
        with pytest.raises(ValueError, match=message):
            get_utility_metrics_factory(noisy_model, *arguments)
