"""Hostile files and options of every command: one line and exit code 2, at once, and before a model is loaded."""

import io
import os
import sys
import time

import pytest
import torch

from sgfast.cli import app as application
from sgfast.cli.main import main
from tests.client.forged_client import write_good_file


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = tmp_path_factory.mktemp("client") / "transform.safetensors"
    write_good_file(path)
    return path


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    for module in ("sgfast.training.building", "sgfast.evaluation.subject", "sgfast.cli.demo", "sgfast.cli.voronoi"):
        __import__(module)
        monkeypatch.setattr(sys.modules[module], "load_causal_lm", load)


@pytest.fixture
def refused(capsys):
    def run(arguments, fault):
        begun = time.process_time()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert time.process_time() - begun < 2
        shown = capsys.readouterr().err
        assert stopped.value.code == 2
        assert fault in " ".join(shown.replace("│", " ").split())
        assert "Traceback" not in shown
        assert len(shown) < 3000
        if "Usage" not in shown:
            assert len(shown.splitlines()) == 1

    return run


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe.txt"
    os.mkfifo(path)
    return path


def readers(client, path):
    """Each command that reads a file of text."""
    return {
        "train": ["train", "--data", path],
        "evaluate": ["evaluate", "--transform", client, "--data", path],
        "transform": ["transform", client, "--data", path, "--out", path.parent / "out"],
        "demo": ["demo", "--data", path],
    }


@pytest.mark.parametrize("command", ["train", "evaluate", "transform", "demo"])
class TestData:
    def test_a_pipe_or_a_device(self, refused, client, pipe, command):
        refused(readers(client, pipe)[command], f"{pipe} is no regular file")
        for device in ("/dev/zero", "/dev/null"):
            arguments = [device if argument is pipe else argument for argument in readers(client, pipe)[command]]
            refused(arguments, f"{device} is no regular file")

    def test_nothing_in_it(self, refused, client, tmp_path, command):
        path = tmp_path / "empty.txt"
        path.write_text("\n \n")
        refused(readers(client, path)[command], "words; at least" if command == "demo" else f"{path} holds no records")

    def test_a_line_of_the_whole_file(self, refused, client, tmp_path, command):
        path = tmp_path / "long.jsonl"
        path.touch()
        os.truncate(path, 2**34)
        refused(
            readers(client, path)[command], "bytes: the demo" if command == "demo" else "line 1: the line is longer"
        )

    def test_a_loop_of_links(self, refused, client, tmp_path, command):
        path = tmp_path / "loop"
        path.symlink_to(path)
        refused(readers(client, path)[command], f"{path} cannot be read")

    def test_not_unicode(self, refused, client, tmp_path, command):
        path = tmp_path / "binary.txt"
        path.write_bytes(b"\xff\xfe\0a")
        refused(readers(client, path)[command], "UTF-8 text")

    def test_a_zero_in_its_name(self, refused, client, tmp_path, command):
        refused(readers(client, tmp_path / "a\0b")[command], "an argument holds a zero byte")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "a", "text": "b"}', "line 1: not JSON: the key 'text' occurs twice"),
        ('{"text": "\\ud800"}', 'line 1: "text" is not Unicode text'),
        ("[" * 100_000, "line 1: not JSON: the JSON is nested too deeply"),
        ("{" + ",".join(f'"{i}":0' for i in range(10**6)) + "}", "line 1: not JSON: "),
        ('{"text": "a", "id": ' + "9" * 5000 + "}", "line 1: not JSON: Exceeds the limit"),
        ('{"text": "a", "x": ' + "[[]," * 500_000 + "0]}", "line 1: not JSON: "),
    ],
    ids=["twice", "surrogate", "deep", "keys", "digits", "lists"],
)
def test_records(refused, client, tmp_path, line, fault):
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    for command in ("train", "evaluate", "transform"):
        refused(readers(client, path)[command], f"{path}, {fault}")


def test_a_faulty_line_deep_in_the_file(refused, client, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' * 500 + '{"txt": "a"}\n')
    for command in ("train", "evaluate", "transform"):
        refused(readers(client, path)[command], f"{path}, line 501: must have one of the keys")


class TestDevices:
    @pytest.mark.parametrize("command", ["train", "evaluate", "transform", "demo", "voronoi", "bench"])
    def test_of_no_machine(self, refused, client, tmp_path, command):
        data = tmp_path / "data.txt"
        data.write_text("the keyword\n" * 16)
        arguments = readers(client, data) | {"voronoi": ["voronoi"], "bench": ["bench", "noise"]}
        for name, fault in (
            ("cuda:99", "device cuda:99: PyTorch finds "),
            ("tpu", "device must be auto, cpu, cuda, cuda:N or mps; got 'tpu'"),
            ("cuda:" + "9" * 400, "device must be auto, cpu, cuda, cuda:N or mps"),
        ):
            refused([*arguments[command], "--device", name], fault)


class TestModels:
    """A model that is not there is no missing network, and shows before anything is loaded or asked for."""

    @pytest.mark.parametrize("command", ["train", "evaluate", "demo", "voronoi"])
    def test_paths_of_none(self, refused, client, tmp_path, command):
        data = tmp_path / "data.txt"
        data.write_text("the keyword\n" * 16)
        (tmp_path / "empty").mkdir()
        arguments = (readers(client, data) | {"voronoi": ["voronoi"]})[command]
        for model, fault in (
            (tmp_path / "absent", "there is no such folder"),
            ("./absent", "there is no such folder"),
            ("~/absent", "there is no such folder"),
            ("models/of/mine", "there is no such folder"),
            (tmp_path / "empty", "the folder has no config.json"),
            (data, "it is a file; give the folder of a model, or a hub id"),
        ):
            refused([*arguments, "--model", model], f"the model '{model}' cannot be loaded: {fault}"[:80])

    def test_a_hub_that_is_not_reached(self, monkeypatch):
        import huggingface_hub

        from sgfast.huggingface.assets import load_causal_lm

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            ValueError, match=r"'nobody/nothing' cannot be loaded: there is no folder .* the hub cannot"
        ):
            load_causal_lm("nobody/nothing")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["evaluate", "--text-as", "mesage"], "Did you mean 'message'?"),
        (["evaluate", "--text-unit", "lines"], "Did you mean 'line'?"),
        (["evaluate", "--precision", "bf16"], "it must be one of float32, bfloat16; got 'bf16'"),
        (["train", "--data", "x", "--precision", "bfloat"], "got 'bfloat'. Did you mean 'bfloat16'"),
        (["train", "--data", "x", "--set", "alpha=.3"], "unknown key alpha: the closest valid key is loss.alpha"),
        (["train", "--data", "x", "--loss", "jigsa"], "Did you mean 'jigsaw'?"),
        (["evaluate", "--transform", "x", "--data", "x", "--attacks", "learnd"], "Did you mean 'learned'?"),
        (["evaluate", "--data", "x"], "give --transform"),
        (["evaluate", "--transform", "x"], "give --data"),
        (["train", "--resume"], "give data"),
    ],
)  # fmt: skip
def test_suggestions(refused, tmp_path, monkeypatch, arguments, fault):
    monkeypatch.chdir(tmp_path)
    refused(arguments, fault)


def test_json_that_python_writes_is_still_read(tmp_path):
    from sgfast.utils.records import read_records

    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "score": NaN}\r\n{"text": "b", "score": -Infinity}')
    assert [record.text for record in read_records(path)] == ["a", "b"]


def test_transforms_that_are_no_files(refused, client, pipe, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("the keyword\n")
    for path in (pipe, "/dev/zero"):
        refused(["evaluate", "--transform", path, "--data", data], f"{path} is no regular file")
        refused(["transform", path, "--prompt", "hi", "--out", tmp_path / "out"], f"{path} is no regular file")
        refused(["train", path], f"{path} is no regular file")
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 2**36)
    refused(["evaluate", "--transform", large, "--data", data], f"{large} is damaged or not a safetensors file")
    refused(["transform", large, "--prompt", "hi", "--out", tmp_path / "out"], f"{large} is damaged or not a")


@pytest.mark.parametrize("prompt", ["", " \n", "a\ud800", "\udce9"])
def test_prompts(refused, client, tmp_path, prompt):
    fault = "it is not Unicode text" if prompt.strip() else "it is empty"
    refused(["transform", client, "--prompt", prompt, "--out", tmp_path / "out"], fault)
    refused(["demo", "--prompt", prompt], fault)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["voronoi", "--percentile", "nan"], "Invalid value for '--percentile'"),
        (["demo", "--alpha", "inf"], "Invalid value for '--alpha'"),
        (["demo", "--steps", "9" * 400], "Invalid value for '--steps'"),
        (["demo", "--layer", "-" + "9" * 400], "Invalid value for '--layer'"),
        (["bench", "noise", "--seconds", "nan"], "Invalid value for '--seconds'"),
        (["bench", "noise", "--tokens", "9" * 400], "--tokens must be whole numbers from 1 on"),
        (["bench", "noise", "--tokens", "2000000000"], "numbers take more than this machine's"),
        (["train", "--data", "x", "--steps", "9" * 400], "steps must be an integer of at most 2147483647"),
        (["train", "--data", "x", "--learning-rate", "nan"], "learning_rate must be a finite number; got nan"),
        (["train", "--data", "x", "--set", "loss.name=[a]"], "loss.name must be a string; got ['a']"),
        (["train", "--data", "x", "--set", "a=" + "[" * 9999], "nested too deeply"),
        (["evaluate", "--transform", "x", "--data", "x", "--save-seconds", "nan"], "Invalid value"),
        (["evaluate", "--transform", "x", "--data", "x", "--memory-budget", "9" * 400 + "GiB"], "less than 2^63 bytes"),
    ],
)  # fmt: skip
def test_numbers(refused, arguments, fault):
    refused(arguments, fault)


class TestDoor:
    """What becomes one line, and what keeps its traceback."""

    @pytest.fixture
    def failing(self, monkeypatch):
        def set_error(error):
            def fail(_):
                raise error

            monkeypatch.setattr(application, "app", fail)

        return set_error

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (MemoryError(), "sgfast: there is not enough memory for this: MemoryError\n"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
            (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory for this: CUDA out of memory."),
            (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "surrogates not allowed"),
            (OSError(28, "No space left on device"), "sgfast: [Errno 28] No space left on device\n"),
            (ValueError("two\nlines"), "sgfast: two lines\n"),
            (ValueError("x" * 10**6), "x" * 992),
            (ValueError(), "sgfast: ValueError\n"),
        ],
    )
    def test_inputs_and_machines(self, failing, capsys, error, line):
        failing(error)
        with pytest.raises(SystemExit) as stopped:
            main([])
        assert stopped.value.code == 2
        shown = capsys.readouterr().err
        assert line in shown
        assert len(shown.splitlines()) == 1

    @pytest.mark.parametrize(
        "error", [RuntimeError("shapes"), KeyError("a"), AttributeError("b"), TypeError("c"), RecursionError("d")]
    )
    def test_faults_of_ours(self, failing, error):
        failing(error)
        with pytest.raises(type(error)):
            main([])

    def test_a_name_that_is_not_utf8_can_be_printed(self, monkeypatch):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", errors="strict"))
        monkeypatch.setattr(application, "app", lambda _: print("wrote caf\udce9"))
        main([])
        sys.stdout.flush()
        assert written.getvalue() == b"wrote caf\\udce9\n"
