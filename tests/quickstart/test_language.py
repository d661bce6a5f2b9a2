"""The Quickstart's code blocks for language models, run as a reader would.

Changed are the import name, where the model comes from (a small Mistral saved in a folder, and its width), and slips
of typing: a missing comma, a missing import, ``{instruction="..."}`` for a dictionary.
"""

import os

import pytest
import torch
import transformers

from tests.tiny_models import WIDTH, tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

SYSTEM, QUESTION = "You are a helpful chat bot who answer questions.", "What is the capital of France?"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder in place of "mistralai/Mistral-7B-v0.2"; deeper than layer 12, which the Quickstart distills."""
    folder = tmp_path_factory.mktemp("mistral")
    tokenizer = tiny_tokenizer()
    model, _, _ = tiny_causal_lm("mistral", vocab_size=300, num_hidden_layers=14, max_position_embeddings=512)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base_model(source):
    return transformers.AutoModelForCausalLM.from_pretrained(source)


@pytest.fixture
def noisy_model(source, base_model):
    from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
    from sgfast.noise_layer import transformer_cloak

    return NoiseMaskedNoisyTransformerModel(
        noise_layer_class=transformer_cloak.TransformerCloak,
        base_model=base_model,
        input_shape=(-1, WIDTH),
        target_layer="model.embed_tokens",
        config_path=source,
        scale=(1e-8, 1.0),
        transformer_type=transformers.MistralModel,
    )


@pytest.fixture
def instruction_wrapper(source, base_model):
    from sgfast.huggingface import tokenization_utils as sg_tokenization_utils

    base_tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return sg_tokenization_utils.TokenizerWrapper(
        base_tokenizer,
        model_type=type(base_model),
        include_labels=True,
        ignore_prompt_loss=True,
        prompt_type=sg_tokenization_utils.PromptType.INSTRUCTION,
    )


def test_tokenizer_wrapper_of_chats(source, base_model, noisy_model):
    from sgfast.huggingface import tokenization_utils as sg_tokenization_utils

    base_tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer_wrapper = sg_tokenization_utils.TokenizerWrapper(
        base_tokenizer,
        model_type=type(base_model),
        include_labels=True,
        ignore_prompt_loss=True,
        prompt_type=sg_tokenization_utils.PromptType.CHAT,
    )

    inputs = tokenizer_wrapper(
        [
            {"role": "system", "content": "You are a helpful chat bot who answer questions."},
            {"role": "user", "content": "What is the capital of France?"},
        ]
    )

    ids = inputs["input_ids"][0]
    assert base_tokenizer.decode(ids) == f"<|start|>system\n{SYSTEM}<|end|>\n<|start|>user\n{QUESTION}<|end|>\n"
    assert base_tokenizer.decode(ids[inputs["noise_mask"][0]]) == SYSTEM + QUESTION
    # There is no response to count.
    assert not inputs["loss_mask"].any()
    assert (inputs["labels"] == -100).all()
    # What the wrapper returns is what the model takes: clean half, then noisy half, changed from the first content on.
    noisy_model.eval()
    logits = noisy_model(**inputs).base_model_output.logits
    first = inputs["noise_mask"][0].long().argmax()
    changed = (logits[0] != logits[1]).any(-1)
    assert not changed[:first].any()
    assert changed[first:].all()


def test_tokenizer_wrapper_of_instructions(instruction_wrapper):
    tokenizer_wrapper = instruction_wrapper

    inputs = tokenizer_wrapper(
        {
            "instruction": "What is the capital of France?",
            "system_prompt": "You are a helpful chat bot who answer questions.",
            "context": "",
            "response": "",
        }
    )

    ids = inputs["input_ids"][0]
    assert tokenizer_wrapper.tokenizer.decode(ids[inputs["noise_mask"][0]]) == SYSTEM + QUESTION
    assert (inputs["labels"] == -100).all()


def test_client(noisy_model, instruction_wrapper, tmp_path, monkeypatch):
    from sgfast.client import StainedGlassTransformForText

    monkeypatch.chdir(tmp_path)
    tokenizer_wrapper, embedding_parameters_names = instruction_wrapper, ["model.embed_tokens.weight"]

    # Create a Stained Glass Transform Text Client object, then save it.
    client = StainedGlassTransformForText(
        model=noisy_model,
        tokenizer_wrapper=tokenizer_wrapper,
        parameter_names=embedding_parameters_names,
    )

    # This file will be distributed to the client.
    client.save_pretrained("stainedglass_transform.pth")

    # Load the Stained Glass Transform from the file distributed by the model
    # provider. The client does not need to know the hyperparameters of the
    # transform in this case.
    sgt = StainedGlassTransformForText.from_pretrained("stainedglass_transform.pth")

    # Apply the Stained Glass Transform to the input data
    transformed_input_embeddings = sgt(
        {
            "instruction": "What is the capital of France?",
            "system_prompt": "",
            "context": "",
            "response": "",
        }
    )

    assert os.listdir() == ["stainedglass_transform.pth"]
    prompt = f"<|start|>user\n{QUESTION}<|end|>\n<|start|>assistant\n"
    ids = tokenizer_wrapper.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    clean = noisy_model.base_model.get_input_embeddings()(ids)
    changed = (transformed_input_embeddings != clean).any(-1)[0]
    assert tokenizer_wrapper.tokenizer.decode(ids[0][changed]) == QUESTION
    # The server goes on from embeddings, by an unchanged model: at this little noise it says what it says to the text.
    with noisy_model.noise_disabled():
        answers = [
            noisy_model.base_model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=2)
            for prompt in ({"inputs_embeds": transformed_input_embeddings}, {"inputs_embeds": clean})
        ]
    assert torch.equal(*answers)
