"""Settings that would take for ever, or all memory, or end in a traceback: each is one error, at once."""

import os
import time

import pytest

from sgfast.training.configuration import (
    ConfigurationError,
    configuration_from,
    parse_override,
    read_yaml,
    with_overrides,
)

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n  k{i}: 1\n" for i in range(1, 12)
)


def refuse(text, tmp_path, fault):
    path = tmp_path / "train.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    begun = time.process_time()
    with pytest.raises(ConfigurationError, match=fault) as caught:
        configuration_from({"data": tmp_path / "data.txt"} | read_yaml(path))
    assert time.process_time() - begun < 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LAUGHS, "train.yaml, line .*: not YAML: it holds more than 10000 values"),
        (MERGES, "train.yaml, line .*: not YAML: it holds more than 10000 values"),
        ("steps: &a [*a]", "train.yaml, line 1: not YAML: an alias stands inside what it stands for"),
        ("loss: &a {name: jigsaw, other: *a}", "an alias stands inside"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "{a: " * 2000, "nested too deeply"),
        ("- " * 3000 + "x", "nested too deeply"),
        ("a: '" + "x" * 2**16 + "'", "more than 65536 bytes"),
        ("\n".join(f"k{i}: 1" for i in range(6000)), "it holds more than 10000 values"),
        ("steps: 1\nsteps: 2", "line 2: not YAML: the key 'steps' occurs twice"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("steps: !!timestamp x", "not YAML: a value that its tag does not fit"),
        ("steps: !!bool x", "not YAML: a value that its tag does not fit"),
        ("steps: 2001-99-99", "not YAML: month must be in 1..12"),
        ("steps: 2001-01-01", "steps must be an integer; got datetime.date"),
        ("steps: " + "9" * 400, "steps must be an integer of at most 2147483647; got an integer of 1329 bits"),
        ("steps: -" + "9" * 400, "steps must be an integer of at most 2147483647; got an integer of 1329 bits"),
        ("steps: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("seed: " + "9" * 400, "seed must lie in"),
        ("steps: 0x" + "f" * 20_000, "got an integer of 80000 bits"),
        ("learning_rate: " + "9" * 400, "learning_rate must be a finite number; got an integer of 1329 bits"),
        ("learning_rate: .nan", "learning_rate must be a finite number; got nan"),
        ("learning_rate: -.inf", "learning_rate must be a finite number; got -inf"),
        ("weight_decay: .inf", "weight_decay must be a finite number; got inf"),
        ("batch_size: true", "batch_size must be an integer; got True"),
        ("steps: 1.0", "steps must be an integer; got 1.0"),
        ("save_steps: -1", "save_steps must be at least 1; got -1"),
        ("loss: {name: [a]}", "loss.name must be a string; got ['a']".replace("[", r"\[")),
        ("loss: {name: {a: b}}", "loss.name must be a string; got settings"),
        ("loss: {name: true}", "loss.name must be a string; got True"),
        ("loss: [a]", "loss must be settings"),
        ("loss: {1: 2}", "unknown key loss.1 of the loss distillation"),
        ("loss: {alpha: .nan}", "loss.alpha must be a finite number; got nan"),
        ("? [a]\n: 1", "unhashable key"),
        ("? {a: b}\n: 1", "unhashable key"),
        ("? '" + "k" * 60_000 + "'\n: 1", "unknown key k{100}: the closest"),
        (
            "noise_layer: {mean_num_hidden_layers: 100000000}",
            r"noise_layer.mean_num_hidden_layers must lie in \[1, 128\]",
        ),
        ("noise_layer: {std_num_hidden_layers: 0}", r"noise_layer.std_num_hidden_layers must lie in \[1, 128\]; got 0"),
        ("noise_layer: {scale: '12'}", "noise_layer.scale must be a list of 2 numbers"),
        ("noise_layer: {seed: 1}", "unknown key noise_layer.seed"),
        ("lora: {r: 100000000}\nloss: jigsaw", "lora.r at most 4096"),
        ("lora: {target_modules: '(a+)+b'}\nloss: jigsaw", "lora.target_modules repeats something"),
        ('out: "a\\0b"', r"out: 'a\\x00b' is no path: it holds a zero"),
        ('out: "\\ud800"', r"out: '\\ud800' is no path: surrogates not allowed"),
        ("model: !!binary aGk=", "model must be a string or null; got b'hi'"),
        ("a\x00b: 1", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"a: \xff", "not YAML"),
        ("just text", "must hold settings"),
    ],
)
def test_refused_in_one_line_at_once(text, fault, tmp_path):
    refuse(text, tmp_path, fault)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, fault in ((pipe, "is no regular file"), ("/dev/zero", "is no regular file"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigurationError, match=fault):
            read_yaml(type(tmp_path)(path))
    with pytest.raises(ConfigurationError, match="is no path: it holds a zero"):
        read_yaml(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps=" + "9" * 5000, "--set steps: not YAML: Exceeds the limit"),
        ("steps=" + "[" * 5000, "--set steps, line 1: not YAML: nested too deeply"),
        ("steps=!!python/object:os.system", "--set steps, line 1: not YAML: could not determine"),
        ("steps=2001-99-99", "--set steps: not YAML: month"),
        ("steps=&a [*a]", "--set steps, line 1: not YAML: an alias stands inside"),
        ("a." * 5000 + "b=1", "--set takes key=value, as in loss.alpha=0.3; got 'a.a"),
        ("x" * 10_000, "--set takes key=value, as in loss.alpha=0.3; got 'x{99}$"),
    ],
)
def test_overrides(text, fault):
    with pytest.raises(ConfigurationError, match=fault):
        parse_override(text)


def test_overrides_of_what_is_not_settings():
    with pytest.raises(ConfigurationError, match=r"loss.alpha cannot be set: loss holds \[\]"):
        with_overrides({"loss": []}, [("loss.alpha", 1)])


def test_aliases_that_stand_for_little_are_taken(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("base: &base {alpha: 0.3}\nloss:\n  <<: *base\n  name: distillation\n")
    settings = read_yaml(path)
    assert settings["loss"] == {"alpha": 0.3, "name": "distillation"}
