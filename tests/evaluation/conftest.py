"""A tiny model on the disk with transforms made for it, and a file of short chats and texts."""

import json
import random

import pytest

from sgfast.huggingface import TokenizerWrapper
from sgfast.training.building import models_over
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

WORDS = ["the", "keyword", "of", "function", "class", "module", "in", "a"]


def save_transform(base_model, path, **options):
    """An untrained transform."""
    wrapper = TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM")
    models_over(base_model, wrapper, {"rhos_init": 0.0, **options}).client.save_pretrained(path)
    return path


def records(count, seed=0):
    """Texts and chats of different lengths."""
    generator = random.Random(seed)
    lines = []
    for number in range(count):
        text = " ".join(generator.choices(WORDS, k=generator.randint(2, 12)))
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "the module"}]
        lines.append({"messages": chat, "id": f"chat {number}"} if number % 3 == 0 else {"text": text})
    return lines


@pytest.fixture(scope="session")
def base_model():
    return tiny_causal_lm("llama", vocab_size=len(tiny_tokenizer()), max_position_embeddings=128)[0]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("model")
    base_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def transform_file(tmp_path_factory, base_model):
    return save_transform(base_model, tmp_path_factory.mktemp("transform") / "transform.safetensors")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records(13))) + "\n")
    return path
