"""``sgfast train`` on a tiny saved model: results, flags over YAML, interruption and resumption, wrong input."""

import dataclasses
import json
import os
import random
import re
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import typer
from safetensors.torch import load_file

from sgfast.cli.app import app
from sgfast.cli.main import main
from sgfast.client import StainedGlassTransformForText
from sgfast.huggingface import trainer_checkpoint
from sgfast.training.configuration import Configuration
from sgfast.training.data import TokenizedRecords
from sgfast.training.objectives import FACTORIES
from tests.processes import in_processes
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

WRITTEN = ["checkpoints", "training.json", "training.png", "transform.safetensors"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    base_model, _, _ = tiny_causal_lm("llama", vocab_size=len(tokenizer))
    base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.txt"
    words, generator = ["the", "keyword", "of", "function", "class", "module"], random.Random(0)
    path.write_text("\n".join(" ".join(generator.choices(words, k=generator.randint(2, 9))) for _ in range(14)))
    return path


@pytest.fixture
def train(monkeypatch, model_folder, text_file, tmp_path):
    """Run the command in this process with small defaults; return its exit code."""

    def run(out="out", *arguments, **options) -> int:
        settings = {"model": model_folder, "data": text_file, "out": tmp_path / out, "steps": 4} | options
        settings = {"batch-size": 2, "max-length": 32, "loss": "distillation", "learning-rate": "1e-2"} | settings
        if settings["loss"] in ("distillation", "mutual_information_distillation", "jigsaw"):
            arguments = ("--set", "loss.distillation_layer_index=1", *arguments)
        flags = [part for name, value in settings.items() if value is not None for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["sgfast", "train", *map(str, [*flags, *arguments])])
        try:
            main()
        except SystemExit as error:
            return error.code or 0
        return 0

    return run


def record_of(out) -> dict:
    return json.loads((out / "training.json").read_text())


@pytest.mark.parametrize("name", FACTORIES)
def test_every_loss_trains_a_transform(train, tmp_path, capsys, name):
    assert train(loss=name) == 0
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == (["adapter"] if name == "jigsaw" else []) + WRITTEN
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    record = record_of(out)
    assert record["finished"] is True
    assert record["data"]["records"] == 14
    assert [step["step"] for step in record["history"]] == [1, 2, 3, 4]
    untrained, *_, last = record["history"]
    weights = record["settings"]["loss"]
    interpolation = weights.get("alpha")
    total = 0.0
    for component, value in last.items():
        weight = next((weights[key] for key in weights if key.startswith(component) and key.endswith("weight")), 0.0)
        if interpolation is not None:
            weight *= 1 - interpolation if component.startswith("distillation") else interpolation
        total += weight * value
    assert last["loss"] == pytest.approx(total, rel=1e-4)
    assert record["scale"][0] < last["mean_sigma"] < record["scale"][1]
    assert last["mean_sigma"] != untrained["mean_sigma"]
    client = StainedGlassTransformForText.from_pretrained(out / "transform.safetensors")
    head = dict(client.noise_layer.named_parameters())["mean_estimator.head.weight"]
    assert head.abs().sum() > 0  # it starts at 0
    if name == "jigsaw":
        adapter = load_file(out / "adapter" / "adapter_model.safetensors")
        assert any(tensor.abs().sum() > 0 for key, tensor in adapter.items() if "lora_B" in key)  # they start at 0
    captured = capsys.readouterr()
    assert "means over the first and over the last tenth of the steps" in " ".join(captured.out.split())
    assert "4/4" in captured.err


def test_flags_override_the_yaml_file(train, tmp_path, text_file):
    config = tmp_path / "train.yaml"
    config.write_text(
        f"data: {text_file}\nsteps: 50\naccumulation: 2\nseed: 271828\nprecision: bfloat16\n"
        "noise_layer: {scale: [1e-3, 0.5], rhos_init: -1, percent_to_mask: 0.25}\n"
        "loss: {name: cross_entropy_distillation, distillation_cross_entropy_loss_weight: 3}\n"
    )
    overrides = ("--set", "loss.median_norm_penalty_weight=0.0")
    assert train("out", config, *overrides, loss=None, data=None, steps=2) == 0
    settings = record_of(tmp_path / "out")["settings"]
    assert settings["steps"] == 2
    assert settings["accumulation"] == 2
    assert settings["precision"] == "bfloat16"
    assert settings["loss"] == {
        "name": "cross_entropy_distillation",
        "distillation_cross_entropy_loss_weight": 3.0,
        "absolute_cosine_similarity_penalty_weight": 1.0,
        "median_norm_penalty_weight": 0.0,
    }
    client = StainedGlassTransformForText.from_pretrained(tmp_path / "out" / "transform.safetensors")
    saved = client.noise_layer.settings()
    assert (saved["scale"], saved["rhos_init"], saved["percent_to_mask"]) == ([1e-3, 0.5], -1.0, 0.25)
    for name in ("training.json", "transform.safetensors"):
        assert b"271828" not in (tmp_path / "out" / name).read_bytes()


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(train, tmp_path, monkeypatch, capsys):
    assert train("whole", steps=6) == 0
    with monkeypatch.context() as patch:
        read, taken = TokenizedRecords.__getitem__, []

        def interrupting(self, index):
            taken.append(index)
            if len(taken) == 1 + 2 * 3:  # one record is tried before the training; then 2 a step
                signal.raise_signal(signal.SIGINT)
            return read(self, index)

        patch.setattr(TokenizedRecords, "__getitem__", interrupting)
        handler = signal.getsignal(signal.SIGINT)
        assert train("parts", steps=6) == 130
        assert signal.getsignal(signal.SIGINT) is handler
    record = record_of(tmp_path / "parts")
    steps = len(record["history"])
    assert 2 <= steps <= 4
    assert record["finished"] is False
    assert sorted(os.listdir(tmp_path / "parts")) == WRITTEN
    StainedGlassTransformForText.from_pretrained(tmp_path / "parts" / "transform.safetensors")
    assert f"interrupted after {steps} of 6 steps" in " ".join(capsys.readouterr().err.split())

    assert train("parts", steps=6) == 2
    assert "holds a run: continue it by --resume" in capsys.readouterr().err
    assert train("parts", "--resume", steps=6) == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert record_of(parts)["finished"] is True
    for straight, resumed in zip(record_of(whole)["history"], record_of(parts)["history"], strict=True):
        assert resumed == pytest.approx(straight, rel=1e-6)
    one, other = (load_file(out / "transform.safetensors") for out in (whole, parts))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-8)


def test_a_killed_run_goes_on_from_its_last_checkpoint(train, tmp_path, monkeypatch, capsys):
    saved_often = ("--set", "save_steps=2")
    with monkeypatch.context() as patch:
        read, taken = TokenizedRecords.__getitem__, []

        def dying(self, index):
            taken.append(index)
            if len(taken) > 1 + 2 * 5:
                raise SystemError("killed")
            return read(self, index)

        patch.setattr(TokenizedRecords, "__getitem__", dying)
        with pytest.raises(SystemError):
            train("out", *saved_often, steps=6)
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoints", "training.json"]
    assert train("out", *saved_often, steps=6) == 2
    assert "holds a run: continue it by --resume" in capsys.readouterr().err
    for _ in range(2):  # the second time, all steps are taken already
        assert train("out", *saved_often, "--resume", steps=6) == 0
        record = record_of(tmp_path / "out")
        assert record["finished"] is True
        assert [step["step"] for step in record["history"]] == [1, 2, 3, 4, 5, 6]
    assert train("straight", *saved_often, steps=6) == 0
    last, expected = (record_of(tmp_path / out)["history"][-1] for out in ("out", "straight"))
    assert last == pytest.approx(expected, rel=1e-6)


def _in_two(rank, directory, *options):
    with open(f"{directory}/{rank}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        codes = []
        for arguments in (["--steps", "2"], ["--steps", "3", "--resume"], ["--steps", "3", "--batch-size", "8"]):
            try:
                main(["train", *options, *arguments])
            except SystemExit as error:
                codes.append(error.code)
    assert codes == [0, 0, 2]  # 14 records are no batch of 2 times 8


def test_two_processes_write_and_report_once(tmp_path, model_folder, text_file):
    options = ["--set", "loss.distillation_layer_index=1", "--max-length", "32", "--batch-size", "2"]
    options += ["--data", str(text_file), "--model", str(model_folder), "--out", str(tmp_path / "out")]
    in_processes(2, _in_two, str(tmp_path), *options)
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert logs[0].count("means over the first") == 2
    assert "2/2" in logs[0]
    assert "loading" not in logs[1]
    assert "2/2" not in logs[1]
    assert "means" not in logs[1]
    assert all("holds 14 records, fewer than a batch of 16" in log for log in logs)
    assert sorted(os.listdir(tmp_path / "out")) == WRITTEN
    record = record_of(tmp_path / "out")
    assert [step["step"] for step in record["history"]] == [1, 2, 3]
    assert record["history"][0]["epoch"] == pytest.approx(1 / 3)  # 7 batches of 2: 3 steps of both, one is left out


def test_a_file_for_a_folder_is_refused_at_once(train, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert train("out") == 2
    error = capsys.readouterr().err
    assert "must be a folder" in error
    assert "loading" not in error


def test_resume_needs_the_run_that_was_begun(train, tmp_path, text_file, capsys):
    assert train("out", "--resume", steps=2) == 0  # with nothing there it starts afresh
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + "\nmore")
    moved = tmp_path / "moved.txt"
    moved.write_text(text_file.read_text())
    for options, message in (
        ({"data": other}, f"{other} is not the data that {tmp_path / 'out'} was begun with"),
        ({"learning-rate": 3}, "was begun with learning_rate = 0.01; now it is 3.0"),
        ({"loss": "cross_entropy_distillation"}, "was begun with loss.name = distillation; now it is cross_entropy_d"),
        ({"set": "loss.alpha=0.3"}, "was begun with loss.alpha = 0.5; now it is 0.3"),
        ({"set": "noise_layer.rhos_init=-1"}, "was begun with noise_layer.rhos_init = None; now it is -1"),
        ({"set": "lora.r=4"}, "lora is for the jigsaw loss"),
    ):
        capsys.readouterr()
        assert train("out", "--resume", **options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert train("out", "--resume", data=moved, steps=3) == 0
    assert [step["step"] for step in record_of(tmp_path / "out")["history"]] == [1, 2, 3]
    (tmp_path / "out" / "training.json").write_text("{}")
    assert train("out", "--resume") == 2
    assert "is not the record of a run" in capsys.readouterr().err
    (tmp_path / "out" / "training.json").unlink()
    assert train("out") == 2  # the checkpoints of a run that nothing is known of
    assert "is not the record of a run" in capsys.readouterr().err


def test_resume_reads_the_settings_of_the_folder(train, tmp_path, monkeypatch, capsys):
    """A run whose settings differ from every default goes on from its folder alone, in another working folder."""
    settings = ("--set", "loss.alpha=0.3", "--set", "noise_layer.scale=[1e-3, 0.5]", "--set", "save_steps=1")
    assert train("straight", *settings, steps=3, accumulation=2) == 0
    assert train("out", *settings, steps=2, accumulation=2) == 0
    before = record_of(tmp_path / "out")["settings"]

    def resume(*arguments):
        monkeypatch.setattr(sys, "argv", ["sgfast", "train", "--out", str(tmp_path / "out"), "--resume", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    monkeypatch.chdir(tmp_path)
    assert resume("--steps", "3") == 0
    after = record_of(tmp_path / "out")
    assert after["settings"] == before | {"steps": 3}
    assert before["accumulation"] == 2
    assert before["loss"]["alpha"] == 0.3
    assert [step["step"] for step in after["history"]] == [1, 2, 3]
    # Another number of steps changes the learning rate of the steps before it; nothing else differs.
    assert after["history"][0]["loss"] == pytest.approx(
        record_of(tmp_path / "straight")["history"][0]["loss"], rel=1e-6
    )
    # What is given again must agree.
    assert resume("--accumulation", "2", "--loss", "distillation_loss_factory", "--set", "loss.alpha=3e-1") == 0
    capsys.readouterr()
    for arguments, message in (
        (["--batch-size", "3"], "was begun with batch_size = 2; now it is 3"),
        (["--model", "other/model"], "; now it is other/model"),
        (["--loss", "jigsaw"], "was begun with loss.name = distillation; now it is jigsaw"),
    ):
        assert resume(*arguments) == 2
        assert message in capsys.readouterr().err
    for damaged in (
        "[]",
        '{"settings": {}, "data": {"sha256": ""}, "history": []}',
        '{"settings": {"loss": [1]}}',
        "{",
    ):
        (tmp_path / "out" / "training.json").write_text(damaged)
        assert resume() == 2
        assert "is not the record of a run" in capsys.readouterr().err


def test_resume_without_a_seed_says_what_that_means(train, tmp_path, capsys):
    """One line, where a run goes on and no seed was given in any of the three ways."""
    config = tmp_path / "seed.yaml"
    config.write_text("seed: 0\n")
    note = (
        "no seed was given: the run goes on with seed 0; if it was begun with another seed, noise and order of the data"
    )
    for arguments, options, notes in (
        ((), {}, 0),  # there is nothing to go on with
        ((), {}, 1),
        ((), {"seed": 0}, 0),
        (("--set", "seed=0"), {}, 0),
        ((config,), {}, 0),
    ):
        capsys.readouterr()
        assert train("out", "--resume", *arguments, steps=1, **options) == 0
        assert sum(line.startswith(note) for line in capsys.readouterr().err.splitlines()) == notes


def test_sizes_are_checked_before_the_weights_are_loaded(train, tmp_path, monkeypatch, capsys):
    def load(*_):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("sgfast.training.building.load_causal_lm", load)
    for arguments, options, message in (
        ((), {"max-length": 65}, "max_length is 65, the model has 64 positions"),
        (("--set", "loss.distillation_layer_index=-5"), {}, "loss distillation: the decoder layer index must lie in"),
        (("--set", "loss.distillation_layer_index=4"), {"loss": "jigsaw"}, "loss jigsaw: the decoder layer index must"),
        (
            ("--set", "loss.distillation_layer_index=30"),
            {"model": None},
            "must lie in [-30, 29] for this model; got 30",
        ),
        ((), {"model": None, "max-length": 8193}, "max_length is 8193, the model has 8192 positions"),
    ):
        assert train("out", *arguments, **options) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(AssertionError, match="the weights are loaded"):
        train("out", "--set", "loss.distillation_layer_index=-4", **{"max-length": 64})


def test_the_device_is_no_setting_that_a_run_depends_on(train, tmp_path, capsys):
    assert train("out", "--device", "cpu", steps=1) == 0
    assert record_of(tmp_path / "out")["settings"]["device"] == "cpu"
    assert train("out", "--resume", "--device", "auto", steps=2) == 0
    assert record_of(tmp_path / "out")["settings"]["device"] == "auto"


def test_wrong_input_is_one_line_and_writes_nothing(train, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"txt": "x"}\n')
    config = tmp_path / "train.yaml"
    config.write_text("lerning_rate: 1\n")
    for arguments, options, message in (
        ((config,), {}, f"{config}: unknown key lerning_rate: the closest valid key is learning_rate"),
        ((tmp_path / "absent.yaml",), {}, "absent.yaml cannot be read"),
        ((), {"data": None}, "give data, a text or JSONL file to train on"),
        ((), {"data": broken}, f"{broken}, line 2: must have one of the keys"),
        ((), {"data": tmp_path / "absent.txt"}, "absent.txt cannot be read"),
        ((), {"batch-size": 15}, "holds 14 records, fewer than a batch of 15"),
        ((), {"model": tmp_path / "absent"}, "cannot be loaded"),
        ((), {"max-length": 65}, "max_length is 65, the model has 64 positions"),
        (("--set", "loss.alpha=2"), {}, "loss distillation: alpha must lie in [0, 1]; got 2.0"),
        (("--set", "loss.distillation_layer_index=4"), {}, "the decoder layer index must lie in [-4, 3]"),
        (("--set", "noise_layer.mean_num_attention_heads=3"), {}, "noise_layer: mean_num_attention_heads"),
        (("--set", "lora.target_modules=[nothing]"), {"loss": "jigsaw"}, "lora: Target modules {'nothing'} not found"),
        (("--set", "steps"), {}, "--set takes key=value"),
    ):
        assert train("out", *arguments, **options) == 2, message
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("sgfast:")]
        assert len(lines) == 1, captured.err
        assert message in lines[0], captured.err
        assert "Traceback" not in captured.err + captured.out
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "name", "full"), [(torch, "save", RuntimeError), (trainer_checkpoint, "write_tensors", OSError)]
)
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(train, tmp_path, monkeypatch, capsys, module, name, full):
    """torch reports it by an error of its own."""
    write = getattr(module, name)

    def fill(*arguments, **options):
        if any("checkpoint-2" in str(argument) for argument in arguments):
            raise full("no room\n  on the disk")
        return write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fill)
        assert train("out", "--set", "save_steps=1") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sgfast:")]
    assert len(errors) == 1
    assert "the checkpoint of step 2 cannot be written to" in errors[0]
    assert "no room on the disk" in errors[0]
    assert train("out", "--set", "save_steps=1", "--resume") == 0
    assert [step["step"] for step in record_of(tmp_path / "out")["history"]] == [1, 2, 3, 4]


def test_a_loss_that_explodes_ends_the_run(train, tmp_path, capsys):
    assert train("out", **{"learning-rate": 1e30}) == 2
    assert "try a lower learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "out" / "transform.safetensors").exists()


def test_the_help_names_the_default_of_each_flag():
    texts = {option.name: option.help for option in typer.main.get_command(app).commands["train"].params}
    named = {name: match[1] for name, text in texts.items() if (match := re.search(r"default: (\S+)\.$", text or ""))}
    defaults = {field.name: field.default for field in dataclasses.fields(Configuration)}
    assert named.pop("loss") == "distillation"
    assert named == {name: str(defaults[name]) for name in named}
    assert len(named) == 9
