"""``sgfast transform``: what it writes for a prompt or a file of records is what a server generates from."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sgfast.cli.main import main
from sgfast.cli.transform import record_seed
from sgfast.client import StainedGlassTransformForText
from sgfast.huggingface import TokenizerWrapper
from sgfast.training.building import models_over
from tests.tiny_models import WIDTH, tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

CHATS = {
    "1": [{"role": "user", "content": "the class"}],
    "second": [{"role": "system", "content": "of"}, {"role": "user", "content": "a longer question of the keyword"}],
    "3": [{"role": "user", "content": "in"}, {"role": "assistant", "content": "the module"}],
}


@pytest.fixture(scope="module")
def base_model():
    return tiny_causal_lm("llama", vocab_size=len(tiny_tokenizer()))[0]


@pytest.fixture
def save_client(base_model, tmp_path):
    """Save an untrained transform whose sigma is near the upper end of the scale; its mean shift is 0."""

    def save(largest_sigma: float):
        options = {"scale": (largest_sigma / 2, largest_sigma), "rhos_init": 4.0}
        client = models_over(base_model, TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM"), options).client
        client.save_pretrained(tmp_path / "transform.safetensors")
        return tmp_path / "transform.safetensors"

    return save


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = [{"text": "the class"}, {"messages": CHATS["second"], "id": "second"}, {"messages": CHATS["3"]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture
def transform(monkeypatch, tmp_path):
    def run(file, *arguments, out="sent.safetensors") -> int:
        monkeypatch.setattr(
            sys, "argv", list(map(str, ["sgfast", "transform", file, "--out", tmp_path / out, *arguments]))
        )
        try:
            main()
        except SystemExit as error:
            return error.code or 0
        return 0

    return run


def tokens_of(chat, wrapper=None):
    wrapper = wrapper or TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM")
    return wrapper(chat, add_generation_prompt=chat[-1]["role"] == "user")


def test_a_server_generates_from_the_file(base_model, save_client, records, transform, tmp_path):
    """Under noise too weak to matter, what the server answers is the clean model's answer to each record."""
    assert transform(save_client(1e-7), "--data", records) == 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    sent = load_file(tmp_path / "sent.safetensors")
    assert len(sent) == 2 * len(CHATS)
    answers = []
    for key, chat in CHATS.items():
        tokens = tokens_of(chat)
        prompt = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        clean = base_model.generate(**prompt, **options)[:, tokens["input_ids"].shape[1] :]
        received = {name: sent[f"{key}.{name}"] for name in ("inputs_embeds", "attention_mask")}
        assert torch.equal(received["attention_mask"], tokens["attention_mask"])
        assert torch.equal(base_model.generate(**received, **options), clean)
        answers.append(clean)
    assert len({tuple(answer[0].tolist()) for answer in answers}) > 1  # the model does not say the same to everything


def test_the_documentations_server(base_model, save_client, records, transform, tmp_path, monkeypatch, capsys):
    """The code block of docs/training.md, run as it stands."""
    assert transform(save_client(1e-7), "--data", records, out="prompts.safetensors") == 0
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(block, {"model": base_model, "tokenizer": tiny_tokenizer()})
    answers = capsys.readouterr().out
    for key, chat in CHATS.items():
        tokens = tokens_of(chat)
        prompt = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        clean = base_model.generate(**prompt, max_new_tokens=64)[0, tokens["input_ids"].shape[1] :]
        assert f"{key} {tiny_tokenizer().decode(clean, skip_special_tokens=True)}" in answers


def test_content_is_transformed_and_nothing_else(base_model, save_client, records, transform, tmp_path):
    assert transform(save_client(2.0), "--data", records) == 0
    sent = load_file(tmp_path / "sent.safetensors")
    table = base_model.get_input_embeddings().weight.detach()
    differences = []
    for key, chat in CHATS.items():
        tokens = tokens_of(chat)
        selected = tokens["noise_mask"]
        difference = sent[f"{key}.inputs_embeds"] - table[tokens["input_ids"]]
        assert (difference[~selected] == 0).all()
        differences.append(difference[selected])
    noise = torch.cat(differences)
    assert noise.shape[1] == WIDTH
    assert noise.std().item() == pytest.approx(2.0, rel=0.15)  # over some 600 draws
    with safe_open(tmp_path / "sent.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["keys"]) == list(CHATS)


def test_a_seed_repeats_the_file_and_no_record_shares_another_ones_noise(save_client, transform, tmp_path):
    path = tmp_path / "same.txt"
    path.write_text("the class\nthe class\n")
    file = save_client(2.0)
    for out, seed in (("one", 3), ("two", 3), ("three", 4), ("four", None), ("five", None)):
        assert transform(file, "--data", path, *(() if seed is None else ("--seed", seed)), out=out) == 0
    outputs = {out: load_file(tmp_path / out) for out in ("one", "two", "three", "four", "five")}
    assert all(torch.equal(tensor, outputs["two"][name]) for name, tensor in outputs["one"].items())
    embeddings = [outputs[out][f"{key}.inputs_embeds"] for out in ("one", "three", "four", "five") for key in "12"]
    for index, one in enumerate(embeddings):
        assert not any(torch.equal(one, other) for other in embeddings[:index])
    client = StainedGlassTransformForText.from_pretrained(file)
    assert torch.equal(client(CHATS["1"], seed=record_seed(3, 1)), outputs["one"]["2.inputs_embeds"])


def test_paragraphs(save_client, transform, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the class\nof the module\n\nthe keyword")
    assert transform(save_client(1.0), "--data", path, "--text-unit", "paragraph") == 0
    with safe_open(tmp_path / "sent.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["keys"]) == ["1", "4"]


def test_wrong_input_is_one_line_and_writes_nothing(save_client, records, transform, tmp_path, capsys):
    file = save_client(1.0)
    twice, broken = tmp_path / "twice.jsonl", tmp_path / "broken.jsonl"
    twice.write_text('{"text": "x", "id": "a"}\n{"text": "y", "id": "a"}\n')
    broken.write_text('{"text": "x"}\n{"text": "y"\n')
    for arguments, message in (
        ((), "give exactly one of --prompt and --data"),
        (("--prompt", "x", "--data", records), "give exactly one of --prompt and --data"),
        (("--data", twice), f"{twice}, line 2: the \"id\" 'a' occurred before"),
        (("--data", broken), f"{broken}, line 2: not JSON"),
        (("--data", tmp_path / "absent"), "absent cannot be read"),
    ):
        assert transform(file, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
        assert not (tmp_path / "sent.safetensors").exists()
    assert transform(tmp_path / "none", "--data", records) == 2
    assert "there is no file" in capsys.readouterr().err


def test_what_is_read_is_not_overwritten(save_client, records, transform, tmp_path, capsys):
    file = save_client(1.0)
    for out in (file, records):
        before = out.read_bytes()
        assert transform(file, "--data", records, out=out) == 2
        assert "is an input file, which would be replaced" in capsys.readouterr().err
        assert out.read_bytes() == before
