"""The Quickstart's code blocks for language models, run as a reader would.

Changed are the import name, where the model comes from (a small Mistral saved in a folder, and its width), and slips
of typing: a missing comma, a missing import, ``{instruction="..."}`` for a dictionary.
"""

import math
import os

import pytest
import torch
import transformers

from tests.loss.rewrites import Rewrite, relative_error
from tests.tiny_models import WIDTH, tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

ANSWERED = [
    {
        "instruction": "What is the capital of France?",
        "system_prompt": "You are a helpful chat bot who answer questions.",
        "context": "",
        "response": "Paris.",
    },
    {"instruction": "And of the country?", "system_prompt": "", "context": "It is Italy.", "response": "That is Rome."},
]
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


@pytest.fixture
def distillation(noisy_model):
    from sgfast import loss as sg_loss

    distillation_loss, get_losses, get_hyperparameters = sg_loss.distillation.distillation_loss_factory(
        noisy_model,
        distillation_layer_index=12,
        alpha=0.54,
        std_log_ratio_loss_weight=0.01,
        input_embedding_similarity_loss_weight=0.75,
        distillation_layer_distance_loss_weight=12.0,
    )
    return distillation_loss, get_losses, get_hyperparameters


def test_wrapped_model(noisy_model, base_model, instruction_wrapper):
    inputs = instruction_wrapper(ANSWERED)
    input, noise_mask = inputs["input_ids"], inputs["noise_mask"]
    noisy_model.eval()

    outputs = noisy_model(input, noise_mask=noise_mask)
    base_model_outputs = outputs.base_model_output

    # No attention mask was given: every token counts as real, as in a call of the base model.
    clean = base_model(input).logits
    torch.testing.assert_close(base_model_outputs.logits[:2], clean, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs.input, base_model.get_input_embeddings()(input))
    # sigma at the start: 1e-8 + (1 - 1e-8) sigmoid(2 rho), rho = -4
    torch.testing.assert_close(outputs.std, torch.full_like(outputs.std, 1 / (1 + math.exp(8))), rtol=1e-4, atol=0)
    assert torch.equal(outputs.transformed[~noise_mask], outputs.input[~noise_mask])
    assert (outputs.transformed != outputs.input).any(-1)[noise_mask].all()
    # The hook belongs to the noisy model's calls; with it off, both halves are clean.
    with noisy_model.noise_disabled():
        logits = noisy_model(input).base_model_output.logits
    assert torch.equal(logits[:2], logits[2:])


def test_distillation_loss(noisy_model, instruction_wrapper, distillation):
    distillation_loss, get_losses, get_hyperparameters = distillation
    with torch.no_grad():  # from noise that changes what the model says: sigma near 0.02 beside embeddings of 0.02
        noisy_model.noise_layer.std_estimator.head.bias.fill_(-2.0)
    inputs = instruction_wrapper(ANSWERED)
    loss_mask = inputs["loss_mask"]

    outputs = noisy_model(**inputs)
    loss_value = distillation_loss(loss_mask)
    loss_value.backward()

    rewrite = Rewrite(noisy_model, inputs, layer=12)
    expected = {
        "std_log_ratio": rewrite.std_log_ratio(max_scale=1.0),
        "input_embedding_similarity": rewrite.input_embedding_similarity(),
        "distillation_layer_cosine_distance": rewrite.distillation_layer_cosine_distance(),
    }
    weights = 0.54 * 0.01, 0.54 * 0.75, (1 - 0.54) * 12.0
    expected["total"] = sum(weight * value for weight, value in zip(weights, expected.values(), strict=True))
    losses = get_losses()
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value.detach(), rtol=1e-5, atol=0)
    assert loss_value.item() == losses["total"].item()
    gradients = {name: parameter.grad for name, parameter in noisy_model.noise_layer.named_parameters()}
    assert relative_error(gradients, rewrite.gradients(expected["total"])) < 1e-4
    assert get_hyperparameters() == {
        "distillation_layer_index": 12,
        "alpha": 0.54,
        "std_log_ratio_loss_weight": 0.01,
        "input_embedding_similarity_loss_weight": 0.75,
        "distillation_layer_cosine_distance_loss_weight": 12.0,
        "distillation_layer_l2_distance_loss_weight": 0.0,
        "inverse_l2_power_law_catalyst_loss_weight": 0.0,
        "inverse_l2_power_law_characteristic_length": 1.0,
        "inverse_l2_power_law_exponent_of_decay": 1.0,
        "known_transform_attack_loss_weight": 0.0,
    }
    assert all(parameter.grad is None for parameter in noisy_model.base_model.parameters())
    assert outputs.base_model_output.logits is None  # a loss that reads layer 12 asks for no more


def test_training(noisy_model, instruction_wrapper, distillation):
    distillation_loss, get_losses, _ = distillation
    optimizer = torch.optim.Adam(noisy_model.noise_layer.parameters(), lr=1e-2)
    base_state = {name: tensor.clone() for name, tensor in noisy_model.base_model.state_dict().items()}
    torch.manual_seed(0)
    history = []
    for _ in range(12):
        inputs = instruction_wrapper(ANSWERED)
        noisy_model(**inputs)
        loss = distillation_loss(inputs["loss_mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(get_losses())

    first, last = history[0], history[-1]
    assert last["total"] < 0.5 * first["total"]
    assert last["input_embedding_similarity"] < 0.5 * first["input_embedding_similarity"]
    assert last["std_log_ratio"] < first["std_log_ratio"] - 1  # sigma has grown to more than e times what it was
    for name, tensor in noisy_model.base_model.state_dict().items():
        assert torch.equal(tensor, base_state[name])


def test_metrics(noisy_model, base_model, instruction_wrapper):
    """What the metrics page documents, of the Quickstart's model."""
    from sgfast.metrics import get_noise_metrics_factory, get_utility_metrics_factory, percentage_changed_ids
    from sgfast.ops import nearest_embeddings

    get_noise_metrics = get_noise_metrics_factory(noisy_model.noise_layer)
    get_utility_metrics = get_utility_metrics_factory(noisy_model, max_batch_size=1, max_sequence_length=7)
    with torch.no_grad():
        noisy_model.noise_layer.std_estimator.head.bias.fill_(-1.0)
    inputs = instruction_wrapper(ANSWERED)
    attended = inputs["attention_mask"] != 0

    outputs = noisy_model(**inputs)

    # On the attended tokens of each sequence; the factory asks for the logits although the model is in training mode.
    clean, noisy = outputs.base_model_output.logits.double().log_softmax(-1).chunk(2)
    p, q = noisy.exp(), clean.exp()
    middle = (0.5 * (p + q)).log()
    expected = {
        "next_token_utility/jefferys": (q - p) * (clean - noisy),
        "next_token_utility/jensen_shannon": 0.5 * (q * (clean - middle) + p * (noisy - middle)),
        "next_token_utility/total_variation": 0.5 * (p - q).abs(),
        "next_token_utility/squared_hellinger_distance": 0.5 * (p.sqrt() - q.sqrt()) ** 2,
    }
    utility = get_utility_metrics()
    assert list(utility) == list(expected)
    for name, terms in expected.items():
        mean = torch.stack([row[seen].sum(-1).mean() for row, seen in zip(terms, attended, strict=True)]).mean()
        assert mean > 0
        torch.testing.assert_close(utility[name].double(), mean, rtol=1e-4, atol=0)
    selected = inputs["noise_mask"]
    noise = get_noise_metrics()
    embeddings, shifted = outputs.input[selected], (outputs.transformed - outputs.input)[selected]
    torch.testing.assert_close(noise["input_norm"], embeddings.norm(dim=-1))
    torch.testing.assert_close(noise["noise_domination_ratio"], shifted.norm(dim=-1) / embeddings.norm(dim=-1))
    torch.testing.assert_close(noise["noise_cosine_similarity"], torch.cosine_similarity(embeddings, shifted))
    # An attacker reads the nearest token: all of what was left as it was, some of what was not.
    table = base_model.get_input_embeddings().weight
    _, nearest = nearest_embeddings(outputs.transformed, table)
    assert (percentage_changed_ids(inputs["input_ids"], nearest[..., 0], ~selected) == 0).all()
    changed = (nearest[..., 0] != inputs["input_ids"]) & selected
    assert changed.any(-1).all()
    reported = percentage_changed_ids(inputs["input_ids"], nearest[..., 0], selected)
    torch.testing.assert_close(reported, changed.sum(-1) / selected.sum(-1))


def test_the_table_of_the_quickstart(source, noisy_model, base_model):
    from sgfast.huggingface.tokenization_utils import TokenizerWrapper

    base_tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer_wrapper = TokenizerWrapper(base_tokenizer, model_type=transformers.LlamaModel, include_labels=True)
    inputs = tokenizer_wrapper([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Paris."}])
    # Chats by default, and every token counts in the loss.
    assert inputs["loss_mask"].all()
    assert torch.equal(inputs["labels"], inputs["input_ids"])
    assert base_tokenizer.decode(inputs["input_ids"][0][inputs["noise_mask"][0]]) == QUESTION
    model, input = noisy_model, inputs["input_ids"]
    output = model(input).base_model_output
    torch.testing.assert_close(output.logits[:1], base_model(input).logits, rtol=1e-5, atol=1e-6)


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
