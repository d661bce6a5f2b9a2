"""A tiny model on the disk with a transform made for it, and a file of short chats and texts."""

import json

import pytest

from tests.tiny_evaluation import records, save_transform
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer


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
