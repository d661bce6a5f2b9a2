"""A tiny model on the disk, a text and a transform for the commands."""

import random
import sys
from typing import Any

import pytest

from sgfast.cli.main import main
from tests.tiny_evaluation import save_transform
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return tiny_causal_lm("llama", vocab_size=len(tiny_tokenizer()), max_position_embeddings=512)[0]


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("tiny model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_transform(tmp_path_factory, tiny_model):
    return save_transform(tiny_model, tmp_path_factory.mktemp("tiny transform") / "transform.safetensors")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny text") / "texts.txt"
    words, generator = ["the", "keyword", "of", "function", "class", "module"], random.Random(0)
    path.write_text("\n".join(" ".join(generator.choices(words, k=60)) for _ in range(24)))
    return path


@pytest.fixture
def command(monkeypatch, capsys, tiny_model_folder, tiny_transform, tiny_text):
    """Run a command at its smallest over the tiny files; return its exit code and what it printed to stderr."""
    training = {"model": tiny_model_folder, "data": tiny_text, "steps": 2}
    defaults: dict[str, dict[str, Any]] = {
        "train": training | {"batch-size": 2, "max-length": 32, "set": "loss.distillation_layer_index=1"},
        "evaluate": {"model": tiny_model_folder, "data": tiny_text, "transform": tiny_transform, "attacks": "nearest"},
        "demo": training | {"layer": 1},
        "bench divergences": {"vocab": 64, "tokens": 2, "top-k": 1, "seconds": 0, "device": "cpu"},
        "transform prompt": {"prompt": "the class"},
        "transform data": {"data": tiny_text},
    }

    def run(name: str, *arguments: Any, **options: Any) -> tuple[int, str]:
        settings = defaults[name] | {key.replace("_", "-"): value for key, value in options.items()}
        words = ["transform", tiny_transform] if name.startswith("transform") else name.split()
        flags = [part for key, value in settings.items() if value is not None for part in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", list(map(str, ["sgfast", *words, *flags, *arguments])))
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        return code, capsys.readouterr().err

    return run
