"""Settings of a training run: what a YAML file and flags give, and the one line for what cannot be used."""

import inspect
from pathlib import Path

import pytest
import yaml

from sgfast.training import configuration as module
from sgfast.training.configuration import (
    ConfigurationError,
    configuration_from,
    loss_hints,
    noise_layer_hints,
    parse_override,
    read_yaml,
    settings_of,
    with_overrides,
)
from sgfast.training.objectives import DEFAULT_OPTIONS, FACTORIES


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "train.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_yaml_file_becomes_settings(write):
    path = write(
        """
        data: texts.jsonl   # a comment
        model:
        learning_rate: 1e-3
        steps: 7
        loss:
          name: cross_entropy_distillation
          distillation_cross_entropy_loss_weight: 2
        noise_layer: {scale: [1e-3, 1], value_range: [null, 3], percent_to_mask: 0.5}
        """
    )
    configuration = configuration_from(read_yaml(path))
    assert configuration.data == Path("texts.jsonl")
    assert (configuration.model, configuration.steps, configuration.batch_size) == (None, 7, 8)
    assert configuration.learning_rate == 1e-3  # YAML 1.1 reads it as a string
    assert configuration.loss_name == "cross_entropy_distillation"
    defaults = DEFAULT_OPTIONS["cross_entropy_distillation"]
    assert configuration.loss_options == defaults | {"distillation_cross_entropy_loss_weight": 2.0}
    assert configuration.noise_layer == {"scale": (1e-3, 1.0), "value_range": (None, 3.0), "percent_to_mask": 0.5}


@pytest.mark.parametrize("name", FACTORIES)
def test_every_loss_has_defaults_that_its_factory_takes(name):
    factory = FACTORIES[name]
    for spelled in (name, factory.__name__):
        configuration = configuration_from({"data": "x", "loss": spelled})
        assert configuration.loss_name == name
        assert configuration.loss_options == DEFAULT_OPTIONS[name]
    required = {
        key
        for key, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is inspect.Parameter.empty and key in loss_hints(factory)
    }
    assert required <= DEFAULT_OPTIONS[name].keys() <= loss_hints(factory).keys()
    assert (configuration.lora is not None) == (name == "jigsaw")


def test_flags_override_the_file():
    settings = {"steps": 10, "loss": "distillation", "noise_layer": {"rhos_init": -3.0}}
    overrides = [("steps", 20), *map(parse_override, ["loss.alpha=0.25", "noise_layer.shallow=2", "data=a=b.txt"])]
    configuration = configuration_from(with_overrides(settings, overrides))
    assert configuration.steps == 20
    assert configuration.loss["alpha"] == 0.25
    assert configuration.noise_layer == {"rhos_init": -3.0, "shallow": 2.0}
    assert configuration.data == Path("a=b.txt")
    assert settings == {"steps": 10, "loss": "distillation", "noise_layer": {"rhos_init": -3.0}}
    with pytest.raises(ConfigurationError, match=r"steps.twice cannot be set: steps holds 10, not settings"):
        with_overrides(settings, [("steps.twice", 1)])
    for text in ("alpha", "=3", "alpha=[1"):
        with pytest.raises(ConfigurationError, match="--set"):
            parse_override(text)


def test_the_older_name_of_the_cosine_weight():
    configuration = configuration_from({"data": "x", "loss": {"name": "distillation", module._OLDER_NAME: 3}})
    assert configuration.loss_options[module._CURRENT_NAME] == 3.0
    assert module._OLDER_NAME not in configuration.loss_options


def test_a_key_without_a_value_has_its_default_at_every_depth():
    expected = configuration_from({"data": "x", "loss": {"name": "jigsaw", "alpha": 0.25}})
    loss = {"name": "jigsaw", "alpha": 0.25, "std_log_ratio_loss_weight": None}
    nothing = {"steps": None, "noise_layer": {"scale": None, "value_range": None}, "lora": {"r": None}}
    given = configuration_from({"data": "x", "loss": loss, **nothing})
    assert (given.loss, given.lora, given.steps) == (expected.loss, expected.lora, expected.steps)
    assert given.noise_layer == {"value_range": None}
    assert configuration_from({"data": "x", "loss": {"alpha": 0.25, "name": None}}).loss == {
        "name": "distillation",
        **DEFAULT_OPTIONS["distillation"],
        "alpha": 0.25,
    }
    # Of a value that may be null, null is a value: the last layer.
    layer = configuration_from({"data": "x", "loss": {"distillation_layer_index": None}}).loss
    assert layer["distillation_layer_index"] is None


def test_yaml_merges(write):
    settings = read_yaml(write("a: &common {steps: 1, seed: 2}\nb:\n  <<: *common\n  steps: 3\n"))
    assert settings["b"] == {"steps": 3, "seed": 2}


def test_no_seed_is_recorded():
    configuration = configuration_from({"data": "x", "seed": 271828})
    assert configuration.seed == 271828
    assert "271828" not in str(settings_of(configuration))
    assert "seed" not in noise_layer_hints()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"give data, a text or JSONL file to train on \(--data FILE, or `data:` in the YAML\)"),
        ({"lerning_rate": 1}, "unknown key lerning_rate: the closest valid key is learning_rate"),
        ({"batchsize": 1}, "unknown key batchsize: the closest valid key is batch_size"),
        ({3: 1}, "unknown key 3: the closest valid key is "),
        ({"loss": {"name": "distillation", "alpa": 1}}, "unknown key loss.alpa of the loss distillation: the closest "),
        ({"loss": {"name": "destillation"}}, "loss.name must be one of distillation, .*; got 'destillation'"),
        ({"loss": 3}, r"loss must be settings \(`name: value`\); got 3"),
        ({"loss": {"name": "distillation", "alpha": "high"}}, "loss.alpha must be a finite number; got 'high'"),
        ({"loss": {"name": "distillation", "alpha": True}}, "loss.alpha must be a finite number; got True"),
        (
            {"loss": {"name": "distillation", "distillation_layer_index": 1.5}},
            "loss.distillation_layer_index must be an integer or null; got 1.5",
        ),
        ({"noise_layer": {"seed": 3}}, "unknown key noise_layer.seed: the closest valid key is seed"),
        ({"alpha": 0.3}, "unknown key alpha: the closest valid key is loss.alpha"),
        ({"alpa": 0.3}, "unknown key alpa: the closest valid key is loss.alpha"),
        ({"scale": [0, 1]}, "unknown key scale: the closest valid key is noise_layer.scale"),
        ({"loss": {"steps": 3}}, "unknown key loss.steps of the loss distillation: the closest valid key is steps"),
        ({"loss": "distilation"}, "got 'distilation'. Did you mean 'distillation'"),
        ({"text_unit": "lines"}, "text_unit must be one of line, paragraph; got 'lines'. Did you mean 'line'?"),
        ({"device": "gpu0"}, "device must be auto, cpu, cuda, cuda:N or mps; got 'gpu0'"),
        ({"noise_layer": {"scale": [1]}}, r"noise_layer.scale must be a list of 2 numbers; got \[1\]"),
        ({"noise_layer": {"scale": [2, 1]}}, r"noise_layer.scale must be \(min, max\) with 0 <= min < max"),
        ({"noise_layer": {"scale": ["a", 1]}}, "an entry of noise_layer.scale must be a finite number; got 'a'"),
        ({"noise_layer": {"value_range": [2, 1]}}, "noise_layer.value_range must have low <= high"),
        ({"lora": {"rank": 3}, "loss": "jigsaw"}, "unknown key lora.rank: the closest valid key is lora.r"),
        ({"lora": {"r": 0}, "loss": "jigsaw"}, "lora.r and lora.lora_alpha must be at least 1"),
        ({"lora": {"r": 3}}, "lora is for the jigsaw loss, which trains adapters; loss is distillation"),
        ({"steps": "3"}, "steps must be an integer; got '3'"),
        ({"steps": True}, "steps must be an integer; got True"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"learning_rate": 0}, "learning_rate must be positive; got 0.0"),
        ({"learning_rate": ".inf"}, "learning_rate must be a finite number; got '.inf'"),
        ({"weight_decay": -1}, "weight_decay must not be negative; got -1.0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*32\); got -1"),
        ({"precision": "fp8"}, "precision must be one of float32, bfloat16; got 'fp8'"),
        ({"text_as": []}, r"text_as must be one of message, plain; got \[\]"),
        ({"model": 4}, "model must be a string or null; got 4"),
        ({"out": ""}, "out must be a path; got ''"),
        (
            {"loss": "mutual_information_distillation", "batch_size": 3},
            "the loss mutual_information_distillation compares the halves of a batch: batch_size must be even; got 3",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(settings, message):
    with pytest.raises(ConfigurationError, match=message) as raised:
        configuration_from({"data": "x", **settings} if settings else {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nloss: {name: [}\n", "train.yaml, line 2: not YAML: "),
        ("steps: 3\nsteps: 4\n", "train.yaml, line 2: not YAML: the key 'steps' occurs twice"),
        ("loss:\n  alpha: 1\n  alpha: 2\n", "train.yaml, line 3: not YAML: the key 'alpha' occurs twice"),
        ("- steps\n", "train.yaml must hold settings, one `name: value` a line; got "),
        ("!!python/object/apply:os.getcwd []\n", "train.yaml, line 1: not YAML: could not determine a constructor"),
        ("steps: [1]\n? [1]\n: 2\n", "train.yaml, line 2: not YAML"),
        (b"steps: \xff\xff", "train.yaml: not YAML"),
        ("[" * 5000, "train.yaml.* not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_line(write, text, message):
    with pytest.raises(ConfigurationError, match=message):
        read_yaml(write(text))


def test_files_that_are_empty_or_absent(write, tmp_path):
    assert read_yaml(write("# nothing yet\n")) == {}
    with pytest.raises(ConfigurationError, match=r"absent.yaml cannot be read: No such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_the_example_in_the_documentation_is_valid():
    path = Path(__file__).parents[2] / "docs" / "train.yaml"
    configuration = configuration_from(read_yaml(path))
    shown = yaml.safe_load(path.read_text())
    assert shown.keys() <= inspect.signature(module.Configuration).parameters.keys()
    assert configuration.loss_name == shown["loss"]["name"]
