"""``sgfast demo`` and ``sgfast transform`` on a tiny saved model: results, wrong input, interruption."""

import json
import os
import random
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from sgfast.cli.main import main
from sgfast.client import StainedGlassTransformForText
from sgfast.training.data import TokenizedRecords
from tests.seed_search import SEED, assert_tells_no_seed
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

KEYS = {
    "strongest_attack_failure_rate",
    "known_transform_failure_rate",
    "next_token_utility/jefferys",
    "next_token_utility/jensen_shannon",
    "next_token_utility/total_variation",
    "next_token_utility/squared_hellinger_distance",
    "next_token_utility/jefferys_top_100",
    "nearest_neighbor_failure_rate",
    "next_token_agreement",
    "mean_sigma",
    "percentage_changed_ids",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    base_model, _, _ = tiny_causal_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "keyword", "of", "function", "class", "module", "and", "in"]
    path.write_text(" ".join(random.Random(0).choices(words, k=60 * 24)))
    return path


def sgfast(monkeypatch, *arguments) -> int:
    """Run the command line in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["sgfast", *map(str, arguments)])
    try:
        main()
    except SystemExit as error:
        return error.code or 0
    return 0


@pytest.fixture
def demo(monkeypatch, model_folder, text_file, tmp_path):
    def run(out="out", **options) -> int:
        settings = {"steps": 2, "out": tmp_path / out, "model": model_folder, "data": text_file, "layer": 1, **options}
        return sgfast(monkeypatch, "demo", *(part for key, value in settings.items() for part in (f"--{key}", value)))

    return run


def test_demo_writes_its_results(demo, tmp_path, capsys):
    assert demo() == 0
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == ["metrics.json", "training.json", "training.png", "transform.safetensors"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() == {"before", "after"}
    assert metrics["before"].keys() >= KEYS
    assert metrics["before"]["nearest_neighbor_failure_rate"] == metrics["before"]["percentage_changed_ids"]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    training_record = json.loads((out / "training.json").read_text())
    assert len(training_record["components"]) == 2
    assert training_record["hyperparameters"]["distillation_layer_index"] == 1
    StainedGlassTransformForText.from_pretrained(out / "transform.safetensors")
    printed = capsys.readouterr().out
    for figures in metrics.values():
        rates = [figures["known_transform_failure_rate"], figures["nearest_neighbor_failure_rate"]]
        assert figures["strongest_attack_failure_rate"] == min(*rates, figures["nearest_neighbor_failure_rate_cosine"])
    assert next(iter(metrics["after"])) == "strongest_attack_failure_rate"
    assert printed.index("strongest attack fails") < printed.index("next-token agreement")
    assert "Only the noise hides a token from such a server" in " ".join(printed.split())
    assert "an attacker reads, trained transform" in printed


def test_same_seed_same_numbers(demo, tmp_path):
    assert demo("one") == demo("two") == demo("three", seed=SEED) == 0
    one, two, three = ((tmp_path / name / "metrics.json").read_text() for name in ("one", "two", "three"))
    assert one == two
    assert one != three
    assert_tells_no_seed(tmp_path / "three", SEED)


def test_ctrl_c_keeps_what_was_trained(demo, tmp_path, monkeypatch, capsys):
    read, taken = TokenizedRecords.__getitem__, []

    def interrupting(self, index):
        taken.append(index)
        if len(taken) == 1:
            signal.raise_signal(signal.SIGINT)
        return read(self, index)

    monkeypatch.setattr(TokenizedRecords, "__getitem__", interrupting)
    assert demo(steps=5) == 130
    assert os.listdir(tmp_path / "out") == ["transform.safetensors"]
    StainedGlassTransformForText.from_pretrained(tmp_path / "out" / "transform.safetensors")
    assert "interrupted after 1 of 5 steps" in " ".join(capsys.readouterr().out.split())


def test_wrong_input_is_one_line_and_writes_nothing(demo, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for options, message in (
        ({"model": tmp_path / "absent"}, "cannot be loaded"),
        ({"data": empty}, "the text holds 0 words"),
        ({"data": tmp_path / "absent.txt"}, "cannot be read"),
        ({"layer": 4}, "the decoder layer index must lie in [-4, 3] for this model; got 4"),
        ({"alpha": 2}, "alpha must lie in [0, 1]; got 2.0"),
    ):
        assert demo(**options) == 2, options
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.strip().splitlines()) == 1, captured.err
        assert "Traceback" not in captured.err + captured.out
        assert not (tmp_path / "out").exists()


def test_usage_errors_exit_with_2(monkeypatch, capsys):
    for arguments in (["demo", "--steps", "0"], ["demo", "--unknown"], ["paint"]):
        assert sgfast(monkeypatch, *arguments) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_transform_command(demo, tmp_path, monkeypatch, capsys):
    assert demo() == 0
    file, sent = tmp_path / "out" / "transform.safetensors", tmp_path / "sent.safetensors"
    assert sgfast(monkeypatch, "transform", file, "--prompt", "the class", "--out", sent, "--seed", "3") == 0
    expected = StainedGlassTransformForText.from_pretrained(file)([{"role": "user", "content": "the class"}], seed=3)
    assert torch.equal(load_file(sent)["inputs_embeds"], expected)
    sent.unlink()
    file.write_bytes(file.read_bytes()[:1000])
    capsys.readouterr()
    assert sgfast(monkeypatch, "transform", file, "--prompt", "the class", "--out", sent) == 2
    error = capsys.readouterr().err
    assert str(file) in error.replace("\n", "")
    assert len(error.strip().splitlines()) == 1
    assert not sent.exists()
