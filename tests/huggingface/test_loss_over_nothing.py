"""SgtTrainer says once in a run that its loss has nothing to learn from, and says nothing otherwise."""

import warnings
from typing import Any

import pytest
import torch

from sgfast.huggingface import NoiseMaskCollator, TokenizerWrapper
from sgfast.loss import distillation_loss_factory
from sgfast.model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import TransformerCloak
from tests.huggingface.sgt_training import case, examples, trainer
from tests.loss.factory_cases import CASES
from tests.tiny_models import WIDTH, tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer


def messages(training: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.train()
    found = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return [message for message in found if "over nothing" in message or "utility term" in message]


def rows_with(name: str, count: int = 8) -> list[dict[str, torch.Tensor]]:
    """The examples, of which the first ones have an empty mask."""
    rows = examples()
    for row in rows[:count]:
        row[name] = torch.zeros_like(row[name])
    return rows


NOTHING = {
    "loss_mask": "the utility terms of the loss are over nothing",
    "noise_mask": "the privacy terms of the loss are over nothing",
}


@pytest.mark.parametrize("name", ["loss_mask", "noise_mask"])
@pytest.mark.parametrize("logging_steps", [1, 2, 50])
def test_an_empty_mask_warns_once(name, logging_steps, tmp_path):
    noisy_model, loss, _ = case("cross entropy")
    training = trainer(noisy_model, loss, tmp_path, train_dataset=rows_with(name), max_steps=4, rate=0.0)
    training.args.logging_steps = training.state.logging_steps = logging_steps
    (message,) = messages(training)
    assert message.startswith(f"{NOTHING[name]}: no attended token has {name}=1 in the steps so far")
    assert not messages(training)


@pytest.mark.parametrize("name", CASES)
def test_a_loss_over_something_does_not_warn(name, tmp_path):
    noisy_model, loss, also = case(name)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2, "rate": 0.0}
    training = trainer(noisy_model, loss, tmp_path, train_dataset=rows_with("loss_mask", 5), **settings, **also)
    assert not messages(training)


PRIVACY_ALONE = {
    "distillation": {"alpha": 1.0},
    "mutual information": {"alpha": 1.0},
    "cross entropy": {"distillation_cross_entropy_loss_weight": 0.0},
    "jigsaw": {
        "distillation_layer_cosine_distance_loss_weight": 0.0,
        "distillation_layer_l2_distance_loss_weight": 0.0,
    },
}


@pytest.mark.parametrize("name", PRIVACY_ALONE)
def test_weights_that_leave_privacy_alone_warn_once(name, tmp_path):
    changed = PRIVACY_ALONE[name]
    noisy_model, loss, also = case(name, **changed)
    training = trainer(noisy_model, loss, tmp_path, max_steps=2, rate=0.0, **also)
    (message,) = messages(training)
    reason = "alpha is 1" if "alpha" in changed else "no weight of a utility component is positive"
    assert message.startswith(f"the loss has no utility term: {reason}")
    own = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert f"(computed: {', '.join(sorted(training.state.log_history[1].keys() - own))})" in message


def test_chats_without_an_assistant_turn_under_ignore_prompt_loss(tmp_path):
    """The whole way from the tokenizer, which then counts assistant turns alone."""
    base_model, body, target_layer = tiny_causal_lm("llama", vocab_size=300)
    settings = {"config_path": base_model.config, "transformer_type": body, "rhos_init": -1.0}
    noisy_model = NoiseMaskedNoisyTransformerModel(TransformerCloak, base_model, (-1, WIDTH), target_layer, **settings)
    loss = distillation_loss_factory(noisy_model, 2, 0.4, 0.1, 0.5, 2.0)
    wrapper = TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM", ignore_prompt_loss=True)
    question, answer = ({"role": role, "content": "the module"} for role in ("user", "assistant"))
    for chat, count in (([question], 1), ([question, answer], 0)):
        rows = [dict(wrapper(chat)) for _ in range(2)]
        collator = NoiseMaskCollator(wrapper.tokenizer)
        own = {"train_dataset": rows, "per_device_train_batch_size": 2, "remove_unused_columns": False}
        training = trainer(noisy_model, loss, tmp_path, **own)
        training.data_collator = collator
        assert len(messages(training)) == count
