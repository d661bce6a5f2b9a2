"""The client's file: round trip, contents, damage."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sgfast.client import StainedGlassTransformForText
from sgfast.huggingface import PromptType, TokenizerWrapper
from sgfast.model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import TransformerCloak
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is the keyword?"}]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def noisy_model():
    tokenizer = tiny_tokenizer()
    base_model, body, target_layer = tiny_causal_lm("llama", vocab_size=len(tokenizer))
    model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak,
        base_model,
        None,
        target_layer,
        config_path=base_model.config,
        transformer_type=body,
        rhos_init=-1.0,
        percent_to_mask=0.2,
        seed=424242,
    )
    torch.nn.init.normal_(model.noise_layer.mean_estimator.head.weight)
    return model


@pytest.fixture
def client(noisy_model):
    return StainedGlassTransformForText(
        noisy_model, TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM"), [EMBEDDING]
    )


@pytest.fixture
def saved(client, tmp_path):
    path = tmp_path / "transform.safetensors"
    client.save_pretrained(path)
    return path


def test_saved_loaded_and_applied_under_one_seed_is_bit_equal(client, saved, noisy_model):
    loaded = StainedGlassTransformForText.from_pretrained(saved)
    for examples in (CHAT, [CHAT, CHAT[1:]]):
        first, second = client.encode(examples, seed=5), loaded.encode(examples, seed=5)
        assert torch.equal(first["inputs_embeds"], second["inputs_embeds"])
        assert torch.equal(first["attention_mask"], second["attention_mask"])
    tokens = client.tokenizer_wrapper(CHAT, add_generation_prompt=True)
    noisy_model.eval()
    own = noisy_model.transform(tokens["input_ids"], tokens["attention_mask"], tokens["noise_mask"], seed=5)
    assert torch.equal(loaded(CHAT, seed=5), own)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_in_every_dtype_and_attention(dtype, attention, tmp_path):
    tokenizer = tiny_tokenizer()
    base_model, body, target_layer = tiny_causal_lm("llama", vocab_size=len(tokenizer))
    base_model.set_attn_implementation(attention)
    model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak, base_model, None, target_layer, config_path=base_model.config, transformer_type=body
    ).to(dtype)
    for estimator in (model.noise_layer.mean_estimator, model.noise_layer.std_estimator):
        torch.nn.init.normal_(estimator.head.weight)
    client = StainedGlassTransformForText(model, TokenizerWrapper(tokenizer, "LlamaForCausalLM"), [EMBEDDING])
    client.save_pretrained(tmp_path / "t")
    loaded = StainedGlassTransformForText.from_pretrained(tmp_path / "t")
    assert client(CHAT, seed=5).dtype == dtype
    assert torch.equal(loaded(CHAT, seed=5), client(CHAT, seed=5))


def test_a_disabled_layer_never_sends_clean_text(client, noisy_model):
    with noisy_model.noise_disabled(), pytest.raises(RuntimeError, match="the noise layer is disabled"):
        client(CHAT)


def test_dropout_is_for_training(noisy_model):
    base_model = noisy_model.base_model
    layer = TransformerCloak(base_model.config, type(base_model.model), mean_dropout=0.9, rhos_init=-9.0)
    torch.nn.init.normal_(layer.mean_estimator.head.weight)
    model = NoiseMaskedNoisyTransformerModel(None, base_model, noise_layer=layer).train()
    client = StainedGlassTransformForText(model, TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM"), [EMBEDDING])
    assert torch.equal(client(CHAT, seed=1), client(CHAT, seed=1))
    assert layer.training


def test_tied_parameters_can_be_saved(tmp_path):
    base_model, body, target_layer = tiny_causal_lm("llama", vocab_size=300, tie_word_embeddings=True)
    model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak, base_model, None, target_layer, config_path=base_model.config, transformer_type=body
    )
    wrapper = TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM")
    StainedGlassTransformForText(model, wrapper, [EMBEDDING, "lm_head.weight"]).save_pretrained(tmp_path / "t")
    loaded = StainedGlassTransformForText.from_pretrained(tmp_path / "t")
    assert torch.equal(loaded.parameters["lm_head.weight"], loaded.parameters[EMBEDDING])


def test_only_content_is_transformed_and_batches_pad_on_the_left(client, noisy_model):
    encoded = client.encode([CHAT, CHAT[1:]], seed=1)
    clean = noisy_model.base_model.get_input_embeddings()
    client.tokenizer_wrapper.tokenizer.padding_side = "left"
    tokens = client.tokenizer_wrapper([CHAT, CHAT[1:]], add_generation_prompt=True)
    assert torch.equal(encoded["attention_mask"], tokens["attention_mask"])
    changed = (encoded["inputs_embeds"] != clean(tokens["input_ids"])).any(-1)
    assert torch.equal(changed, tokens["noise_mask"])
    assert not encoded["attention_mask"][1, 0]


def test_noise_is_fresh_whatever_torch_is_seeded_with(client):
    torch.manual_seed(42)
    first = client(CHAT)
    torch.manual_seed(42)
    assert not torch.equal(client(CHAT), first)
    assert torch.equal(client(CHAT, seed=1), client(CHAT, seed=1))
    assert client.noise_layer.input is None  # the clean embeddings do not outlive the call


def test_the_file_holds_the_transform_and_nothing_else(saved, noisy_model):
    with safe_open(saved, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        embedding = file.get_tensor(f"base_model.{EMBEDDING}")
    expected = {f"noise_layer.{name}" for name, _ in noisy_model.noise_layer.named_parameters()}
    assert names == expected | {f"base_model.{EMBEDDING}"}
    assert torch.equal(embedding, noisy_model.base_model.get_input_embeddings().weight)
    content = json.loads(metadata["content"])
    assert "seed" not in json.dumps(content["noise_layer"])
    assert "424242" not in json.dumps(metadata)


def test_server_generates_from_what_the_client_sends(saved, noisy_model):
    encoded = StainedGlassTransformForText.from_pretrained(saved).encode([CHAT, CHAT[1:]])
    generated = noisy_model.base_model.generate(**encoded, max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert generated.shape == (2, 3)


def test_instruction_prompts_round_trip(noisy_model, tmp_path):
    wrapper = TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM", prompt_type=PromptType.INSTRUCTION)
    path = tmp_path / "transform.safetensors"
    StainedGlassTransformForText(noisy_model, wrapper, [EMBEDDING]).save_pretrained(path)
    example = {"instruction": "name the keyword", "system_prompt": "", "context": "a class", "response": ""}
    assert StainedGlassTransformForText.from_pretrained(path)(example).shape[0] == 1


def test_a_body_with_other_names_for_its_sizes(tmp_path):
    base_model, body, target_layer = tiny_causal_lm("gpt2", vocab_size=300)
    model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak, base_model, None, target_layer, config_path=base_model.config, transformer_type=body
    )
    wrapper = TokenizerWrapper(tiny_tokenizer(), "GPT2LMHeadModel")
    client = StainedGlassTransformForText(model, wrapper, [f"{target_layer}.weight"])
    client.save_pretrained(tmp_path / "t")
    assert torch.equal(StainedGlassTransformForText.from_pretrained(tmp_path / "t")(CHAT, seed=1), client(CHAT, seed=1))


def test_embeddings_scaled_inside_their_module(tmp_path):
    """Gemma 2 multiplies by √D in the embedding module of transformers 5; in 4 it does so later, for embeddings too."""
    base_model, body, target_layer = tiny_causal_lm("gemma2", vocab_size=300)
    model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak, base_model, None, target_layer, config_path=base_model.config, transformer_type=body
    ).eval()
    wrapper = TokenizerWrapper(tiny_tokenizer(), "Gemma2ForCausalLM")
    StainedGlassTransformForText(model, wrapper, [EMBEDDING]).save_pretrained(tmp_path / "t")
    tokens = wrapper(CHAT, add_generation_prompt=True)
    own = model.transform(tokens["input_ids"], tokens["attention_mask"], tokens["noise_mask"], seed=9)
    torch.testing.assert_close(StainedGlassTransformForText.from_pretrained(tmp_path / "t")(CHAT, seed=9), own)


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_flipped_byte_is_found(saved, place):
    data = bytearray(saved.read_bytes())
    data[{"start": 3, "middle": len(data) // 2, "end": -1}[place]] ^= 0x41
    saved.write_bytes(data)
    with pytest.raises(ValueError, match=str(saved)):
        StainedGlassTransformForText.from_pretrained(saved)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_files_are_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match=str(saved)):
        StainedGlassTransformForText.from_pretrained(saved)


def test_foreign_and_missing_files_are_refused(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(ValueError, match="is not a text transform"):
        StainedGlassTransformForText.from_pretrained(foreign)
    foreign.write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        StainedGlassTransformForText.from_pretrained(foreign)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        StainedGlassTransformForText.from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a folder"):
        StainedGlassTransformForText.from_pretrained(tmp_path)


def test_saving_into_a_folder_that_is_not_there_names_the_path(client, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent/t cannot be written: there is no folder"):
        client.save_pretrained(tmp_path / "absent" / "t")


def test_an_interrupted_save_leaves_the_old_file(client, saved, monkeypatch):
    before = saved.read_bytes()

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    monkeypatch.setattr("pathlib.Path.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        client.save_pretrained(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_errors(noisy_model):
    wrapper = TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"must include the embedding table, 'model\.embed_tokens\.weight'"):
        StainedGlassTransformForText(noisy_model, wrapper, ["lm_head.weight"])
    with pytest.raises(ValueError, match=r"no parameter 'model\.absent'"):
        StainedGlassTransformForText(noisy_model, wrapper, [EMBEDDING, "model.absent"])


def quiet_client(dtype=torch.float32):
    """A client whose noise is far below its mean shift, so that outputs show what the estimators saw."""
    tokenizer = tiny_tokenizer()
    base_model, body, target_layer = tiny_causal_lm("llama", vocab_size=len(tokenizer))
    model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak,
        base_model,
        None,
        target_layer,
        config_path=base_model.config,
        transformer_type=body,
        scale=(1e-9, 1.0),
        rhos_init=-30.0,
    ).to(dtype)
    torch.nn.init.normal_(model.noise_layer.mean_estimator.head.weight)
    return StainedGlassTransformForText(model, TokenizerWrapper(tokenizer, "LlamaForCausalLM"), [EMBEDDING])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_padding_and_neighbours_in_a_batch_change_nothing(dtype, tolerance):
    client = quiet_client(dtype)
    chats = [CHAT, CHAT[1:], [{"role": "user", "content": "é"}]]
    batch = client.encode(chats)
    for row, chat in enumerate(chats):
        alone = client.encode([chat])["inputs_embeds"][0]
        real = batch["attention_mask"][row].bool()
        assert real.tolist() == [False] * (len(real) - len(alone)) + [True] * len(alone)
        torch.testing.assert_close(batch["inputs_embeds"][row, real], alone, rtol=tolerance, atol=tolerance)


def test_padding_is_on_the_left_whatever_the_tokenizers_side(client):
    expected = client.encode([CHAT, CHAT[1:]], seed=3)
    for side in ("left", "right"):
        client.tokenizer_wrapper.tokenizer.padding_side = side
        encoded = client.encode([CHAT, CHAT[1:]], seed=3)
        assert torch.equal(encoded["inputs_embeds"], expected["inputs_embeds"])
        assert torch.equal(encoded["attention_mask"], expected["attention_mask"])
        assert client.tokenizer_wrapper.tokenizer.padding_side == side


def test_seeds_come_from_the_operating_system_and_leave_torchs_generator_alone(client, monkeypatch):
    drawn = []
    monkeypatch.setattr("secrets.randbits", lambda bits: drawn.append(bits) or 2**63 + 17)
    state = torch.get_rng_state()
    assert torch.equal(client(CHAT), client(CHAT, seed=2**63 + 17))
    assert drawn == [64]
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_a_batch_never_share_noise(client):
    encoded = client.encode([CHAT, CHAT], seed=1)["inputs_embeds"]
    noise = client.encode([CHAT], seed=1)["inputs_embeds"]
    assert torch.equal(encoded[0], noise[0])
    assert not torch.equal(encoded[0], encoded[1])


def test_a_table_that_lacks_tokens_is_refused_on_construction(noisy_model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(ValueError, match="the tokenizer has ids up to 295, the embedding table only 295 rows"):
        StainedGlassTransformForText(noisy_model, TokenizerWrapper(tokenizer, "LlamaForCausalLM"), [EMBEDDING])
