"""The attack against closed forms, against a plain loop, and against all possible texts."""

import itertools
import math

import pytest
import torch

from sgfast.metrics.privacy import known_transform_attack
from sgfast.noise_layer import CloakNoiseLayer, CloakNoiseLayer2, TransformerCloak
from tests.live_bytes import LiveBytes
from tests.metrics.known_transform.plain_attack import log_score, read_greedily
from tests.tiny_models import FAMILIES, tiny_causal_lm

V, D = 13, 16


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def transformer_layer(family="llama", *, spread=0.3, **arguments):
    """A layer whose shifts depend on a token and on those before it, and a model of the same family."""
    model, body, _ = tiny_causal_lm(family, vocab_size=V + 3)
    layer = TransformerCloak(model.config, body, scale=(0.05, 2.0), **arguments).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=spread, generator=generator(1))
    return layer, model


@torch.no_grad()
def transform(layer, table, input_ids, noise_mask, attention_mask=None, seed=3):
    arguments = {} if attention_mask is None else {"attention_mask": attention_mask}
    output = layer(table[input_ids], noise_mask, seed=seed, **arguments)
    layer.clear()
    return output


def case(layer, length=6, rows=2, seed=5, table=None):
    table = torch.randn(V, D, generator=generator(2)) if table is None else table
    input_ids = torch.randint(0, V, (rows, length), generator=generator(seed))
    noise_mask = torch.ones(rows, length, dtype=torch.bool)
    noise_mask[:, 0] = False
    noise_mask[0, 3] = False
    return transform(layer, table, input_ids, noise_mask), table, input_ids, noise_mask


class TestClosedForms:
    def test_independent_gaussians_are_read_by_the_largest_density(self):
        """Against torch.distributions, with a different shift and deviation at every place."""
        layer = CloakNoiseLayer(input_shape=(1, 40, D), scale=(0.5, 4.0)).eval()
        torch.nn.init.normal_(layer.locs, std=5.0, generator=generator(1))
        torch.nn.init.normal_(layer.rhos, generator=generator(2))
        table = torch.randn(V, D, generator=generator(3))
        input_ids = torch.randint(0, V, (3, 40), generator=generator(4))
        every = torch.ones(3, 40, dtype=torch.bool)
        transformed = transform(layer, table, input_ids, every)
        result = known_transform_attack(transformed, layer, table, every, input_ids=input_ids)
        gaussians = torch.distributions.Normal(
            (table[:, None] + layer.locs).double(), layer.parameterization(layer.rhos).double()
        )
        densities = gaussians.log_prob(transformed[:, None].double()).sum(-1)  # (3, V, 40)
        assert torch.equal(result.tokens, densities.argmax(1))
        assert 0.1 < result.failure_rate < 0.9
        torch.testing.assert_close(result.scores, densities.max(1).values.sum(-1), rtol=1e-6, atol=0)
        true = densities.gather(1, input_ids[:, None])
        assert torch.equal(result.ranks, (densities > true).sum(1))
        best = densities.topk(2, dim=1).values
        torch.testing.assert_close(result.leads, best[:, 0] - best[:, 1], rtol=1e-4, atol=1e-4)

    def test_the_error_of_two_tokens_is_that_of_bayes(self):
        """Two tokens at the distance d with the same sigma: P(error) = Φ(−d/2σ)."""
        length, sigma = 4000, 0.7
        layer = CloakNoiseLayer(input_shape=(1, length, 1), scale=(sigma, 1.0), rhos_init=-50.0).eval()
        table = torch.tensor([[0.0], [1.0]])
        input_ids = torch.randint(0, 2, (1, length), generator=generator())
        every = torch.ones(1, length, dtype=torch.bool)
        result = known_transform_attack(
            transform(layer, table, input_ids, every), layer, table, every, input_ids=input_ids
        )
        expected = 0.5 * math.erfc(0.5 / sigma / math.sqrt(2))
        assert abs(result.failure_rate.item() - expected) < 4 * math.sqrt(expected * (1 - expected) / length)

    def test_without_information_the_language_model_reads(self):
        """Noise far beyond the table leaves the prior alone: the model's own greedy continuation."""
        layer, model = transformer_layer(spread=0.0)
        layer.std_estimator.head.bias.data.fill_(50.0)
        table = 1e-4 * torch.randn(V, D, generator=generator(2))
        noise_mask = torch.ones(1, 8, dtype=torch.bool)
        noise_mask[0, 0] = False
        input_ids = torch.randint(0, V, (1, 8), generator=generator(3))
        transformed = transform(layer, table, input_ids, noise_mask)
        result = known_transform_attack(transformed, layer, table, noise_mask, language_model=model)
        expected = input_ids[:, :1]
        with torch.no_grad():
            for _ in range(7):
                logits = model(input_ids=expected).logits[:, -1, :V]
                expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(result.tokens, expected)

    def test_a_shift_alone_hides_nothing(self):
        layer, _ = transformer_layer(spread=0.0)
        layer.std_estimator.head.bias.data.fill_(-50.0)
        torch.nn.init.normal_(layer.mean_estimator.head.weight, std=10.0, generator=generator(1))
        transformed, table, input_ids, noise_mask = case(layer)
        result = known_transform_attack(transformed, layer, table, noise_mask, input_ids=input_ids)
        assert result.failure_rate == 0
        assert result.exact_sequence_rate == 1


class TestAgainstAPlainLoop:
    @pytest.mark.parametrize("prior", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_greedy(self, family, prior):
        layer, model = transformer_layer(family, spread=0.5)
        transformed, table, input_ids, noise_mask = case(layer)
        arguments = {"language_model": model, "prior_weight": 2.0} if prior else {}
        result = known_transform_attack(transformed, layer, table, noise_mask, input_ids=input_ids, **arguments)
        for row in range(2):
            arguments_of_row = (transformed[row], layer, table, noise_mask[row])
            expected = read_greedily(*arguments_of_row, input_ids[row], *arguments.values())
            assert torch.equal(result.tokens[row], expected)
            score = log_score(*arguments_of_row, expected, *arguments.values())
            assert result.scores[row].item() == pytest.approx(score, rel=1e-5, abs=1e-3)

    def test_suppressed_features(self):
        layer, _ = transformer_layer(spread=0.5, percent_to_mask=0.5)
        transformed, table, input_ids, noise_mask = case(layer)
        result = known_transform_attack(transformed, layer, table, noise_mask, input_ids=input_ids)
        for row in range(2):
            expected = read_greedily(transformed[row], layer, table, noise_mask[row], input_ids[row])
            assert torch.equal(result.tokens[row], expected)
        assert torch.equal(result.tokens, input_ids)  # an exact match of 8 features tells every token

    def test_a_beam_as_wide_as_all_texts_finds_the_likeliest(self):
        layer, model = transformer_layer(spread=0.5)
        layer.std_estimator.head.bias.data.fill_(3.0)
        table = torch.randn(3, D, generator=generator(2))
        every = torch.ones(1, 4, dtype=torch.bool)
        arguments = {"language_model": model, "prior_weight": 3.0}
        greedy_misses = 0
        for seed in range(6):
            input_ids = torch.randint(0, 3, (1, 4), generator=generator(seed))
            transformed = transform(layer, table, input_ids, every, seed=seed)

            def score(tokens, transformed=transformed):
                return log_score(transformed[0], layer, table, every[0], torch.tensor(tokens), model, 3.0)

            best = max(itertools.product(range(3), repeat=4), key=score)
            wide = known_transform_attack(transformed, layer, table, every, beam=27, **arguments)
            assert wide.tokens[0].tolist() == list(best)
            assert wide.scores.item() == pytest.approx(score(best), rel=1e-5)
            greedy = known_transform_attack(transformed, layer, table, every, **arguments)
            greedy_misses += greedy.scores.item() < wide.scores.item() - 1e-3
        assert greedy_misses  # so that the beam matters here


class TestProperties:
    def test_padding_and_batches_change_nothing(self):
        layer, model = transformer_layer(spread=0.5)
        table = torch.randn(V, D, generator=generator(2))
        input_ids = torch.randint(0, V, (2, 6), generator=generator(5))
        attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
        noise_mask = attention_mask.bool()
        transformed = transform(layer, table, input_ids, noise_mask, attention_mask)
        transformed[attention_mask == 0] = math.nan  # padding may hold anything
        together = known_transform_attack(
            transformed, layer, table, noise_mask, attention_mask=attention_mask, language_model=model, candidates=5
        )
        assert (together.tokens == -1).sum() == 3
        for row, used in enumerate(attention_mask.bool()):
            alone = known_transform_attack(
                transformed[row, used][None],
                layer,
                table,
                noise_mask[row, used][None],
                language_model=model,
                candidates=5,
            )
            assert torch.equal(alone.tokens[0], together.tokens[row, used])
            torch.testing.assert_close(alone.scores[0], together.scores[row])

    def test_a_clamp_is_part_of_the_likelihood(self):
        """Against the mixed density of a clamped Gaussian."""
        layer = CloakNoiseLayer(input_shape=(1, 30, D), scale=(1.0, 3.0), value_range=(-1.0, 1.5), rhos_init=1.0).eval()
        torch.nn.init.normal_(layer.locs, std=0.5, generator=generator(1))
        table = torch.randn(V, D, generator=generator(3))
        input_ids = torch.randint(0, V, (1, 30), generator=generator(4))
        every = torch.ones(1, 30, dtype=torch.bool)
        transformed = transform(layer, table, input_ids, every)
        result = known_transform_attack(transformed, layer, table, every, input_ids=input_ids)
        gaussians = torch.distributions.Normal((table[:, None] + layer.locs).double(), layer.stds.double())
        observed = transformed.double()
        inside = gaussians.log_prob(observed)
        densities = torch.where(observed >= 1.5, (1 - gaussians.cdf(torch.tensor(1.5))).log(), inside)
        densities = torch.where(observed <= -1.0, gaussians.cdf(torch.tensor(-1.0)).log(), densities).sum(-1)
        assert torch.equal(result.tokens[0], densities.argmax(0))
        assert 0 < result.failure_rate < 0.9

    def test_a_suppressed_constant_tells_nothing(self):
        """CloakNoiseLayer2 replaces the same features for every token: the others decide."""
        layer = CloakNoiseLayer2(input_shape=(1, 30, D), percent_to_mask=0.5, stds=torch.rand(30, D) + 0.5).eval()
        table = torch.randn(V, D, generator=generator(3))
        input_ids = torch.randint(0, V, (1, 30), generator=generator(4))
        every = torch.ones(1, 30, dtype=torch.bool)
        transformed = transform(layer, table, input_ids, every)
        gaussians = torch.distributions.Normal(table[:, None].double(), layer.stds.double())
        densities = gaussians.log_prob(transformed.double()).masked_fill(layer.suppressed, 0).sum(-1)
        result = known_transform_attack(transformed, layer, table, every)
        assert torch.equal(result.tokens[0], densities.argmax(0))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounded_embeddings_are_read(self, dtype):
        """Rounding far beyond sigma does not turn the true token away."""
        layer, _ = transformer_layer(spread=0.5)
        layer.std_estimator.head.weight.data.zero_()
        layer.std_estimator.head.bias.data.fill_(-50.0)  # sigma 0.05 among values of the size of 1
        layer.scale = (1e-6, 2.0)
        layer.parameterization.scale = (1e-6, 2.0)
        transformed, table, input_ids, noise_mask = case(layer)
        result = known_transform_attack(transformed.to(dtype), layer, table, noise_mask, input_ids=input_ids)
        assert result.failure_rate == 0

    def test_means_of_draws_have_less_noise(self):
        layer = CloakNoiseLayer(input_shape=(1, 60, D), scale=(3.0, 4.0), rhos_init=-50.0).eval()
        table = torch.randn(V, D, generator=generator(3))
        input_ids = torch.randint(0, V, (1, 60), generator=generator(4))
        every = torch.ones(1, 60, dtype=torch.bool)
        rates, scores = [], []
        for draws in (1, 16):
            mean = torch.stack([transform(layer, table, input_ids, every, seed=seed) for seed in range(draws)]).mean(0)
            result = known_transform_attack(mean, layer, table, every, input_ids=input_ids, draws=draws)
            rates.append(result.failure_rate.item())
            gaussians = torch.distributions.Normal(table[:, None].double(), torch.tensor(3.0 / draws**0.5).double())
            scores.append(gaussians.log_prob(mean.double()).sum(-1).max(0).values.sum().item())
            assert result.scores.item() == pytest.approx(scores[-1], rel=1e-5)
        assert rates[1] < 0.2 < 0.5 < rates[0]

    def test_memory_stays_within_the_bound(self):
        model, body, _ = tiny_causal_lm("llama", vocab_size=2000)
        layer = TransformerCloak(model.config, body).eval()
        table = torch.randn(2000, D, generator=generator(2))
        input_ids = torch.randint(0, 2000, (1, 5), generator=generator(5))
        every = torch.ones(1, 5, dtype=torch.bool)
        transformed = transform(layer, table, input_ids, every)
        for max_chunk_bytes in (2**18, 2**21):
            for candidates in (None, 20):
                with LiveBytes() as memory:
                    known_transform_attack(
                        transformed, layer, table, every, candidates=candidates, max_chunk_bytes=max_chunk_bytes
                    )
                # The scores of all candidates, and keys and values, come on top.
                assert memory.peak < max_chunk_bytes + 2**17

    def test_modes_and_gradients_are_left_as_they_were(self):
        layer, model = transformer_layer()
        transformed, table, _, noise_mask = case(layer)
        layer.train()
        model.train()
        known_transform_attack(transformed, layer, table.requires_grad_(), noise_mask, language_model=model)
        assert layer.training
        assert model.training
        assert all(parameter.grad is None for parameter in layer.parameters())


class TestShortlists:
    @pytest.mark.parametrize("suppression", [None, 0.25])
    def test_a_large_shift_loses_no_token(self, suppression):
        """Shifts that differ between tokens by far more than the embeddings, and depend on the context too."""
        layer, _ = transformer_layer(spread=0.3, percent_to_mask=suppression)
        torch.nn.init.normal_(layer.mean_estimator.head.weight, std=3.0, generator=generator(1))
        transformed, table, input_ids, noise_mask = case(layer, length=12, rows=6)
        arguments = (transformed, layer, table, noise_mask)
        every = known_transform_attack(*arguments, input_ids=input_ids)
        few = known_transform_attack(*arguments, input_ids=input_ids, candidates=4)
        assert every.failure_rate <= 0.05
        assert (few.ranks[noise_mask] == V).double().mean() <= 0.1
        assert few.failure_rate <= 0.15

    def test_independent_gaussians_lose_nothing(self):
        """One context is every context: a list of one is the reading itself."""
        layer = CloakNoiseLayer(input_shape=(1, 1, D), scale=(0.5, 4.0), rhos_init=0.5).eval()
        torch.nn.init.normal_(layer.locs, std=5.0, generator=generator(1))
        table = torch.randn(V, D, generator=generator(3))
        input_ids = torch.randint(0, V, (50, 1), generator=generator(4))
        every = torch.ones(50, 1, dtype=torch.bool)
        transformed = transform(layer, table, input_ids, every)
        whole = known_transform_attack(transformed, layer, table, every, input_ids=input_ids)
        one = known_transform_attack(transformed, layer, table, every, input_ids=input_ids, candidates=1)
        assert 0 < whole.failure_rate < 1
        assert torch.equal(one.tokens, whole.tokens)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"candidates": V + 1}, "candidates must be at most 13"),
            ({"candidates": 0}, "candidates must be at least 1"),
            ({"beam": 0}, "beam must be at least 1"),
            ({"draws": 0}, "draws must be at least 1"),
            ({"prior_weight": -1.0}, "prior_weight must be at least 0"),
            ({"canaries": torch.ones(2, 6)}, "canaries need input_ids"),
            ({"input_ids": torch.zeros(2, 5, dtype=torch.int64)}, "input_ids"),
            ({"attention_mask": torch.ones(2, 5)}, "attention_mask"),
            ({"max_chunk_bytes": 0}, "max_chunk_bytes"),
        ],
    )
    def test_one_line(self, arguments, message):
        layer, _ = transformer_layer()
        transformed, table, _, noise_mask = case(layer)
        with pytest.raises(ValueError, match=message) as error:
            known_transform_attack(transformed, layer, table, noise_mask, **arguments)
        assert "\n" not in str(error.value)

    def test_other_layers_and_models(self):
        layer, model = transformer_layer()
        transformed, table, _, noise_mask = case(layer)
        with pytest.raises(TypeError, match="noise_layer must be a noise layer of sgfast; got Linear"):
            known_transform_attack(transformed, torch.nn.Linear(2, 2), table, noise_mask)
        with pytest.raises(ValueError, match="a logit for each of the table's 40 rows; got 16"):
            known_transform_attack(transformed, layer, torch.randn(40, D), noise_mask, language_model=model)
        clamping = CloakNoiseLayer(input_shape=(1, 6, D), value_range=(0.0, 1.0))
        with pytest.raises(ValueError, match="draws must be 1"):
            known_transform_attack(transformed, clamping, table, noise_mask, draws=2)
