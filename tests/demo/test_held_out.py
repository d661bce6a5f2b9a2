"""The demo's figures against a plain recomputation."""

import pytest
import torch

from sgfast.demo.held_out import known_transform_failure_rate, known_transform_reading, measure
from sgfast.huggingface import TokenizerWrapper
from sgfast.model import NoiseMaskedNoisyTransformerModel
from sgfast.model.decoder import embedding_table_of
from sgfast.noise_layer import CloakStandardDeviationParameterization, TransformerCloak
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

SCALE = (1e-3, 1.0)
PASSAGES = ["the class and the function", "a keyword", "in the module the keyword of the class", "an end"]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_figures(family):
    tokenizer = tiny_tokenizer()
    base_model, body, target_layer = tiny_causal_lm(family, vocab_size=len(tokenizer))
    noisy_model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak,
        base_model,
        None,
        target_layer,
        config_path=base_model.config,
        transformer_type=body,
        scale=SCALE,
        # Noise of the table's own size, so that the attack fails for some tokens and not for others.
        rhos_init=CloakStandardDeviationParameterization(SCALE).inverse(embedding_table_of(base_model).std()).item(),
    ).train()
    wrapper = TokenizerWrapper(tokenizer, "LlamaForCausalLM")
    torch.manual_seed(8)
    expected_state = torch.random.get_rng_state()
    figures = measure(noisy_model, wrapper, PASSAGES, batch_size=2, max_length=40, seed=3)
    assert torch.equal(torch.random.get_rng_state(), expected_state)
    assert noisy_model.training

    noisy_model.eval()
    table = embedding_table_of(base_model)
    torch.manual_seed(3)
    same, failed, losses, sigmas = [], [], {"clean": [], "noisy": []}, []
    for start in (0, 2):
        inputs = wrapper([[{"role": "user", "content": text}] for text in PASSAGES[start : start + 2]])
        output = noisy_model(**inputs)
        clean, noisy = output.base_model_output.clean_logits, output.base_model_output.noisy_logits
        for row in range(2):
            for place in range(inputs["input_ids"].shape[1]):
                token = inputs["input_ids"][row, place]
                if not inputs["noise_mask"][row, place]:
                    continue
                sigmas.append(output.std[row, place].mean().item())
                same.append((clean[row, place].argmax() == noisy[row, place].argmax()).item())
                distances = (table - output.transformed[row, place]).double().norm(dim=-1)
                failed.append((distances.argmin() != token).item())
                for name, logits in (("clean", clean), ("noisy", noisy)):
                    losses[name].append(-logits[row, place - 1].double().log_softmax(-1)[token].item())

    def mean(values):
        return sum(values) / len(values)

    assert 0 < mean(failed) < 1
    assert figures["nearest_neighbor_failure_rate"] == pytest.approx(mean(failed))
    assert figures["percentage_changed_ids"] == pytest.approx(mean(failed))
    assert figures["next_token_agreement"] == pytest.approx(mean(same))
    assert figures["mean_sigma"] == pytest.approx(mean(sigmas), rel=1e-5)
    for name, values in losses.items():
        assert figures[f"{name}_perplexity"] == pytest.approx(torch.tensor(mean(values)).exp().item(), rel=1e-4)


def noisy_model_of(rhos_init, shift):
    """A model whose noise has the strength of ``rhos_init``, and whose mean shift depends on the token."""
    tokenizer = tiny_tokenizer()
    base_model, body, target_layer = tiny_causal_lm("llama", vocab_size=len(tokenizer), initializer_range=0.5)
    arguments = {"config_path": base_model.config, "transformer_type": body, "scale": SCALE, "rhos_init": rhos_init}
    noisy_model = NoiseMaskedNoisyTransformerModel(TransformerCloak, base_model, None, target_layer, **arguments)
    torch.nn.init.normal_(noisy_model.noise_layer.mean_estimator.head.weight, std=shift)
    return noisy_model, TokenizerWrapper(tokenizer, "LlamaForCausalLM")


def test_a_shift_hides_nothing_and_noise_does():
    shifted, wrapper = noisy_model_of(-20.0, 5.0)
    options = {"max_length": 40, "seed": 3}
    assert known_transform_failure_rate(shifted, wrapper, PASSAGES, **options) == 0
    assert measure(shifted, wrapper, PASSAGES, batch_size=2, **options)["nearest_neighbor_failure_rate"] > 0.5
    noised, wrapper = noisy_model_of(20.0, 0.0)
    assert known_transform_failure_rate(noised, wrapper, PASSAGES, **options) > 0.3


def test_the_reading_of_a_prompt():
    noisy_model, wrapper = noisy_model_of(-20.0, 5.0)
    tokens = wrapper([[{"role": "user", "content": PASSAGES[0]}]])
    masks = tokens["attention_mask"], tokens["noise_mask"]
    embeddings = noisy_model.transform(tokens["input_ids"], *masks, seed=1)
    reading = known_transform_reading(noisy_model, embeddings, *masks, wrapper.tokenizer)
    assert reading == wrapper.tokenizer.decode(tokens["input_ids"][tokens["noise_mask"]])
