"""Settings of a training run, read from a YAML file and overrides, and checked.

Every error is one line that names the source of a setting, the value that came, and the allowed values. The allowed
types are the type hints of `Configuration`, of `TransformerCloak` and of the loss factories.
"""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sgfast.noise_layer.arguments import check_scale, check_value_range
from sgfast.noise_layer.transformer_cloak import MOST_LAYERS, TransformerCloak
from sgfast.ops.validation import did_you_mean
from sgfast.training.objectives import DEFAULT_OPTIONS, FACTORIES, MODEL_ARGUMENTS
from sgfast.training.yaml_settings import parse_yaml, read_yaml_file
from sgfast.utils.bounded_pattern import check_pattern
from sgfast.utils.devices import check_device_name
from sgfast.utils.input_files import check_path
from sgfast.utils.records import TextAs, TextUnit

Precision = Literal["float32", "bfloat16"]

# Arguments that the model determines, and the seed, which no file may hold.
_NOT_SETTINGS_OF_THE_LAYER = ("config_path", "transformer_type", "seed")
_OLDER_NAME = "distillation_layer_distance_loss_weight"
_CURRENT_NAME = "distillation_layer_cosine_distance_loss_weight"
_DEFAULT_LOSS = "distillation"
_POSITIVE = ("learning_rate", "max_gradient_norm")
_AT_LEAST_ONE = ("steps", "batch_size", "accumulation", "max_length", "save_steps")
# No machine reaches this count. Without a bound, a run could count without end.
_LARGEST_COUNT = 2**31 - 1
_LARGEST_RANK = 2**12
# PEFT matches expressions with names of modules. Names are short, so three nested passes over the text are allowed.
_MOST_LOOPS = 3
_LONGEST_SHOWN = 100
# Most dots in a key of --set, such as loss.alpha.
_DEEPEST = 3


class ConfigurationError(ValueError):
    """Error of an invalid setting. The message names the setting."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of a jigsaw student's adapters. With ``target_modules=None``, PEFT chooses the modules for the model."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Settings of a run. ``docs/training.md`` explains each setting."""

    data: Path
    out: Path = Path("train-output")
    model: str | None = None
    text_unit: TextUnit = "line"
    text_as: TextAs = "message"
    ignore_prompt_loss: bool = False
    loss: dict[str, Any] = field(default_factory=lambda: {"name": _DEFAULT_LOSS})
    noise_layer: dict[str, Any] = field(default_factory=dict)
    lora: LoraOptions | None = None
    steps: int = 300
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    precision: Precision = "float32"
    save_steps: int = 100
    seed: int = 0
    device: str = "auto"

    @property
    def loss_name(self) -> str:
        """Name of the loss factory in `FACTORIES`."""
        return str(self.loss["name"])

    @property
    def loss_options(self) -> dict[str, Any]:
        """Arguments of the loss factory, without the models."""
        return {name: value for name, value in self.loss.items() if name != "name"}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. An empty file gives an empty mapping.

    Raises:
        ConfigurationError: `sgfast.training.yaml_settings` refuses the file, or the file does not hold a mapping.
    """
    try:
        content = read_yaml_file(path)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold settings, one `name: value` a line; got {_described(content)}")
    return content


def with_overrides(settings: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return settings with overrides. The key ``loss.alpha`` means ``alpha`` inside ``loss``.

    Raises:
        ConfigurationError: a key such as ``steps.alpha`` goes into a setting that is not a mapping.

    Example:
        >>> with_overrides({"steps": 10, "loss": {"name": "jigsaw"}}, [("loss.alpha", 0.3), ("steps", 20)])
        {'steps': 20, 'loss': {'name': 'jigsaw', 'alpha': 0.3}}
    """
    changed = dict(settings)
    for path, value in overrides:
        outer, *inner = path.split(".", 1)
        current = changed.get(outer)
        if outer == "loss" and isinstance(current, str):
            current = {"name": current}
        if not inner:
            changed[outer] = value
            continue
        if not isinstance(current, Mapping | None):
            raise ConfigurationError(f"{path} cannot be set: {outer} holds {_described(current)}, not settings")
        changed[outer] = with_overrides(current or {}, [(inner[0], value)])
    return changed


def parse_override(text: str) -> tuple[str, Any]:
    """Parse one ``key=value`` of the command line, with the value in YAML.

    Raises:
        ConfigurationError: the text has no ``key=value``, or the value is not YAML.

    Example:
        >>> parse_override("noise_layer.scale=[1e-3, 1.0]")
        ('noise_layer.scale', ['1e-3', 1.0])
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or name.count(".") > _DEEPEST:
        raise ConfigurationError(f"--set takes key=value, as in loss.alpha=0.3; got {_described(text)}")
    try:
        return name.strip(), parse_yaml(value, f"--set {name.strip()[:100]}")
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def configuration_from(settings: Mapping[str, Any]) -> Configuration:
    """Check settings and add the defaults, also those of the loss's weights. A key without a value gets its default.

    Raises:
        ConfigurationError: a key is unknown (the message names the closest valid key), a value has the wrong type or is
            out of range, or ``data`` is missing.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    if "data" not in settings:
        raise ConfigurationError("give data, a text or JSONL file to train on (--data FILE, or `data:` in the YAML)")
    values = _checked_values(settings, typing.get_type_hints(Configuration), "")
    values["loss"] = _checked_loss(values.get("loss", {}))
    values["noise_layer"] = _checked_noise_layer(values.get("noise_layer", {}))
    is_jigsaw = values["loss"]["name"] == "jigsaw"
    if values.get("lora") is not None and not is_jigsaw:
        raise ConfigurationError(
            f"lora is for the jigsaw loss, which trains adapters; loss is {values['loss']['name']}"
        )
    if is_jigsaw and values.get("lora") is None:
        values["lora"] = LoraOptions()
    configuration = Configuration(**values)
    _check_ranges(configuration)
    return configuration


def settings_of(configuration: Configuration) -> dict[str, Any]:
    """Return a configuration in JSON types for the record of a run, without the seed, which no file may hold."""
    values = dataclasses.asdict(configuration)
    del values["seed"]
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def noise_layer_hints() -> dict[str, Any]:
    """Return the type of each setting of the noise layer."""
    hints = typing.get_type_hints(TransformerCloak.__init__)
    names = list(inspect.signature(TransformerCloak).parameters)
    return {name: hints[name] for name in names if name not in _NOT_SETTINGS_OF_THE_LAYER}


def loss_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the type of each option of a loss factory."""
    hints = typing.get_type_hints(factory)
    return {name: hints[name] for name in inspect.signature(factory).parameters if name not in MODEL_ARGUMENTS}


def short_name(name: Any) -> Any:
    """Return the short name of a loss that is given by the name of its factory, and any other value as it is."""
    return next((short for short, factory in FACTORIES.items() if factory.__name__ == name), name)


def _checked_loss(given: Mapping[str, Any]) -> dict[str, Any]:
    name = _DEFAULT_LOSS if given.get("name") is None else given["name"]
    if not isinstance(name, str):
        raise ConfigurationError(f"loss.name must be a string; got {_described(name)}")
    name = short_name(name)
    if name not in FACTORIES:
        suggestion = did_you_mean(name, FACTORIES)
        raise ConfigurationError(f"loss.name must be one of {', '.join(FACTORIES)}; got {_described(name)}{suggestion}")
    factory = FACTORIES[name]
    options = {key: value for key, value in given.items() if key != "name"}
    checked = _checked_values(options, loss_hints(factory), "loss", f" of the loss {name}")
    if _OLDER_NAME in checked:
        checked[_CURRENT_NAME] = checked.pop(_OLDER_NAME)
    return {"name": name, **DEFAULT_OPTIONS[name], **checked}


def _checked_noise_layer(given: Mapping[str, Any]) -> dict[str, Any]:
    checked = _checked_values(given, noise_layer_hints(), "noise_layer")
    try:
        if "scale" in checked:
            checked["scale"] = check_scale(checked["scale"])
        check_value_range(checked.get("value_range"))
        for name in ("mean_num_hidden_layers", "std_num_hidden_layers"):
            if not 1 <= checked.get(name, 1) <= MOST_LAYERS:
                raise ValueError(f"{name} must lie in [1, {MOST_LAYERS}]; got {checked[name]}")
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"noise_layer.{error}") from error
    return checked


def _check_ranges(configuration: Configuration) -> None:
    for name in _AT_LEAST_ONE:
        if getattr(configuration, name) < 1:
            raise ConfigurationError(f"{name} must be at least 1; got {getattr(configuration, name)}")
    for name in _POSITIVE:
        if not getattr(configuration, name) > 0:
            raise ConfigurationError(f"{name} must be positive; got {getattr(configuration, name)}")
    for name in ("warmup_steps", "weight_decay"):
        if getattr(configuration, name) < 0:
            raise ConfigurationError(f"{name} must not be negative; got {getattr(configuration, name)}")
    try:
        check_device_name(configuration.device)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if not 0 <= configuration.seed < 2**32:  # the range of NumPy's generator
        raise ConfigurationError(f"seed must lie in [0, 2**32); got {_described(configuration.seed)}")
    if configuration.loss_name.startswith("mutual_information") and configuration.batch_size % 2:
        raise ConfigurationError(
            f"the loss {configuration.loss_name} compares the halves of a batch: batch_size must be even; "
            f"got {configuration.batch_size}"
        )
    if configuration.lora is not None:
        if not 1 <= configuration.lora.r <= _LARGEST_RANK or configuration.lora.lora_alpha < 1:
            raise ConfigurationError(f"lora.r and lora.lora_alpha must be at least 1, lora.r at most {_LARGEST_RANK}")
        if isinstance(configuration.lora.target_modules, str):
            _check_modules(configuration.lora.target_modules)
        if not 0 <= configuration.lora.lora_dropout < 1:
            raise ConfigurationError(f"lora.lora_dropout must lie in [0, 1); got {configuration.lora.lora_dropout}")


def _check_modules(pattern: str) -> None:
    try:
        check_pattern(pattern, "lora.target_modules", most_loops=_MOST_LOOPS)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _checked_values(
    given: Mapping[Any, Any], hints: Mapping[str, Any], where: str, of_what: str = ""
) -> dict[str, Any]:
    """Convert each value to the type of its hint. Null counts as a missing value, unless the hint allows None."""
    prefix = f"{where}." if where else ""
    for key in given:
        if key not in hints:
            shown = key[:_LONGEST_SHOWN] if isinstance(key, str) else _described(key)
            closest = _closest_key(shown, where, hints)
            raise ConfigurationError(f"unknown key {prefix}{shown}{of_what}: the closest valid key is {closest}")
    return {
        key: _brought_to(hints[key], value, prefix + key)
        for key, value in given.items()
        if value is not None or type(None) in typing.get_args(hints[key])
    }


def _closest_key(key: str, where: str, hints: Mapping[str, Any]) -> str:
    """Return the whole valid key closest to an unknown one: its name elsewhere, or else a similar name."""
    inner = {"loss": set().union(*map(loss_hints, FACTORIES.values())), "noise_layer": set(noise_layer_hints())}
    inner["lora"] = set(typing.get_type_hints(LoraOptions))
    names = {name: name for name in typing.get_type_hints(Configuration)}
    for outer in inner:
        names = {name: f"{outer}.{name}" for name in sorted(inner[outer])} | names
    if key in names and not names[key].startswith(f"{where}."):
        return names[key]
    if where:
        names = {name: f"{where}.{name}" for name in hints}
    return names[difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]]


def _brought_to(hint: Any, value: Any, name: str) -> Any:
    """Convert a value to the type of a hint, or raise ConfigurationError."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for choice in choices:
        matched, brought = _match(choice, value, name)
        if matched:
            return brought
    allowed = " or ".join(_allowed(choice) for choice in choices)
    names = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    raise ConfigurationError(f"{name} must be {allowed}; got {_described(value)}{did_you_mean(value, names)}")


def _match(hint: Any, value: Any, name: str) -> tuple[bool, Any]:
    """Return whether a value fits a type that is not a union, and the value in that type."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is float:
        number = _number(value)
        return number is not None, number
    if origin is Path:
        return _path(value, name)
    if origin is Literal:
        return value in arguments, value
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
        return True, origin(**_checked_values(value, typing.get_type_hints(origin), name))  # type: ignore[operator]
    if origin is dict:
        return (
            (True, {"name": value}) if name == "loss" and isinstance(value, str) else (isinstance(value, dict), value)
        )
    if origin is list:
        return isinstance(value, list) and all(isinstance(item, arguments[0]) for item in value), value
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            return False, None
        return True, tuple(_brought_to(*pair, f"an entry of {name}") for pair in zip(arguments, value, strict=True))
    if origin is int and isinstance(value, bool):
        return False, None
    if origin is int and isinstance(value, int) and abs(value) > _LARGEST_COUNT and name != "seed":
        raise ConfigurationError(f"{name} must be an integer of at most {_LARGEST_COUNT}; got {_described(value)}")
    return isinstance(value, origin), value


def _path(value: Any, name: str) -> tuple[bool, Path | None]:
    if not isinstance(value, str | Path) or str(value) == "":
        return False, None
    try:
        check_path(value)
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}") from error
    return True, Path(value)


def _number(value: Any) -> float | None:
    """Convert a value to a finite number, or return None. Strings are converted: YAML 1.1 reads 1e-3 as a string."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _allowed(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    names = {
        float: "a finite number",
        int: "an integer",
        bool: "true or false",
        str: "a string",
        Path: "a path",
        list: "a list of strings",
        type(None): "null",
    }
    return names.get(origin, "settings (`name: value`)")


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return "settings"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list) and len(value) > _LONGEST_SHOWN:
        return f"a list of {len(value)}"
    return "nothing" if value is None else repr(value)[:_LONGEST_SHOWN]
