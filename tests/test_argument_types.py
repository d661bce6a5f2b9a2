"""A wrong argument is refused where it is given, by its name: what a new user gets wrong first."""

import pytest
import torch

from sgfast.client import StainedGlassTransformForText
from sgfast.huggingface import PromptType, TokenizerWrapper
from sgfast.loss import distillation_loss_factory
from sgfast.metrics import (
    LearnedInversionAttack,
    compute_percentile_voronoi_l2_distance,
    fano_error_bound,
    get_noise_metrics_factory,
    get_top_k_support_mask,
    get_utility_metrics_factory,
    information_bounds,
    pac_privacy_success_bound,
)
from tests.tiny_models import tiny_noisy_model
from tests.tiny_tokenizer import tiny_tokenizer

LOGITS, TABLE = torch.randn(2, 3, 7), torch.eye(5)


@pytest.fixture(scope="module")
def noisy_model():
    return tiny_noisy_model()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: get_utility_metrics_factory(m.base_model), TypeError, "noisy_model must be a NoiseMasked.*Llama"),
        (lambda m: get_utility_metrics_factory(m, max_batch_size=1.5), TypeError, "max_batch_size must be an int"),
        (lambda m: get_utility_metrics_factory(m, max_sequence_length="8"), TypeError, "max_sequence_length .* str"),
        (lambda m: get_noise_metrics_factory(m.noise_layer, dim=None), TypeError, "dim must be an int; got NoneType"),
        (lambda m: get_noise_metrics_factory(m.noise_layer, dim=-1.0), TypeError, "dim must be an int; got float"),
        (lambda m: get_top_k_support_mask(LOGITS, LOGITS, 8), ValueError, "num_logits must be between 1 and .* 7; got"),
        (lambda m: get_top_k_support_mask(LOGITS, LOGITS, 2.0), TypeError, "num_logits must be an int; got float"),
        (lambda m: get_top_k_support_mask(LOGITS.tolist(), LOGITS, 2), TypeError, "noisy_logits must be a torch.Ten"),
        (lambda m: information_bounds(TABLE, TABLE + 1, [1] * 5), TypeError, "mask must be a torch.Tensor or None"),
        (lambda m: information_bounds(TABLE, TABLE + 1, alpha="0.5"), TypeError, "alpha must be a number; got str"),
        (lambda m: fano_error_bound(1.0, None), TypeError, "num_classes must be a number; got NoneType"),
        (lambda m: pac_privacy_success_bound(1.0, "0.1"), TypeError, "prior must be a number; got str"),
        (lambda m: compute_percentile_voronoi_l2_distance(TABLE, "5"), TypeError, "percentile must be a number"),
        (lambda m: LearnedInversionAttack(TABLE, epochs=1.5), TypeError, "epochs must be an int; got float"),
        (lambda m: LearnedInversionAttack(TABLE, batch_size=None), TypeError, "batch_size must be an int; got None"),
        (lambda m: LearnedInversionAttack(TABLE, learning_rate="1e-3"), TypeError, "learning_rate must be a number"),
        (lambda m: m([[1, 2]]), TypeError, "input_ids must be a torch.Tensor; got list"),
        (lambda m: m(inputs_embeds=[[1.0]]), TypeError, "inputs_embeds must be a torch.Tensor; got list"),
        (lambda m: distillation_loss_factory(m, "2", 0.5, 0.1, 0.1, 1.0), TypeError, "layer index must be an int; got"),
    ],
)
def test_losses_and_metrics(noisy_model, call, error, message):
    with pytest.raises(error, match=message):
        call(noisy_model)


def test_tokenizer_wrapper():
    tokenizer = tiny_tokenizer()
    with pytest.raises(TypeError, match="include_labels must be a bool; got str"):
        TokenizerWrapper(tokenizer, "LlamaForCausalLM", include_labels="no")
    with pytest.raises(TypeError, match="ignore_prompt_loss must be a bool; got PromptType"):
        TokenizerWrapper(tokenizer, "LlamaForCausalLM", False, PromptType.CHAT)
    with pytest.raises(ValueError, match=r"one of PromptType\.CHAT, PromptType\.INSTRUCTION; got 'chats'"):
        TokenizerWrapper(tokenizer, "LlamaForCausalLM", prompt_type="chats")


def test_client(noisy_model):
    wrapper = TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM")
    name = "model.embed_tokens.weight"
    for arguments, message in [
        ((noisy_model.base_model, wrapper, [name]), "model must be a NoiseMasked.*; got LlamaForCausalLM"),
        ((noisy_model, wrapper.tokenizer, [name]), "tokenizer_wrapper must be a TokenizerWrapper; got"),
        ((noisy_model, wrapper, name), "parameter_names must be a list of names; got str"),
        ((noisy_model, wrapper, None), "parameter_names must be a list of names; got NoneType"),
    ]:
        with pytest.raises(TypeError, match=message):
            StainedGlassTransformForText(*arguments)
