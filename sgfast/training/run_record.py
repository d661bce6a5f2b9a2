"""The record of a run, ``training.json`` (settings, versions, history), and the check that a run may continue.

The record holds no seed: with the seed of a run, anyone could draw again the noise that hid its texts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgfast._version import __version__
from sgfast.huggingface.trainer_checkpoint import checkpoints
from sgfast.training.configuration import Configuration, ConfigurationError, settings_of, short_name
from sgfast.utils.files import replacing

RECORD_FILE, CHECKPOINTS = "training.json", "checkpoints"
# A run may be continued elsewhere and for longer. The same data may lie in another place: its digest is compared.
_FREE_TO_CHANGE = ("out", "data", "steps", "save_steps", "device")
# Values that the trainer logs besides the loss and its components.
_BOOKKEEPING = ("step", "epoch", "grad_norm", "learning_rate")


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run's numbers depend on."""
    import torch
    import transformers

    return {"sgfast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def check_continues(configuration: Configuration, digest: str, resume: bool) -> None:
    """Check that a run may write to its folder: an unused folder or, to resume, the folder of a run like it.

    A run without a finished step does not count.

    Raises:
        ConfigurationError: the folder holds a run and ``resume`` is False, or the run had other settings or data.
    """
    path, saved = configuration.out / RECORD_FILE, checkpoints(configuration.out / CHECKPOINTS)
    record = _read_record(path)
    if record is None:
        if not saved:
            return
        raise ConfigurationError(f"{path} is not the record of a run: give another --out")
    has_steps = bool(record["history"] or saved)
    if not has_steps:
        return
    if not resume:
        raise ConfigurationError(f"{configuration.out} holds a run: continue it by --resume, or give another --out")
    if digest != record["data"]["sha256"]:
        raise ConfigurationError(
            f"--resume: {configuration.data} is not the data that {configuration.out} was begun with"
        )
    now = json.loads(json.dumps(settings_of(configuration)))
    for name, before in record["settings"].items():
        if name not in _FREE_TO_CHANGE and now.get(name) != before:
            raise ConfigurationError(
                f"--resume: {configuration.out} was begun with {_change(name, before, now.get(name))}"
            )


def with_settings_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which those that are not given come from the run in the folder ``out``, if there is one.

    Raises:
        ConfigurationError: the folder's record is damaged, or the run had another loss.
    """
    out = given.get("out") or Configuration.out
    record = _read_record(Path(out) / RECORD_FILE) if isinstance(out, str | Path) else None
    if record is None:
        return dict(given)
    settings: dict[str, Any] = record["settings"] | {"out": out}
    for name, value in given.items():
        if name == "loss" and isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping) and isinstance(settings.get(name), Mapping):
            value = settings[name] | dict(value)
        if value is not None:
            settings[name] = value
    loss, loss_before = (short_name(one.get("name")) for one in (settings["loss"], record["settings"]["loss"]))
    if loss != loss_before:  # the options of one loss are no options of the other
        raise ConfigurationError(f"--resume: {out} was begun with {_change('loss.name', loss_before, loss)}")
    return settings


def _read_record(path: Path) -> dict[str, Any] | None:
    """Read the record of a run; None if there is no file."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not the record of a run: give another --out") from error
    is_record = isinstance(record, dict) and all(isinstance(record.get(name), dict) for name in ("settings", "data"))
    if not is_record or "history" not in record or "sha256" not in record["data"]:
        raise ConfigurationError(f"{path} is not the record of a run: give another --out")
    if not isinstance(record["settings"].get("loss"), dict):
        raise ConfigurationError(f"{path} is not the record of a run: give another --out")
    return record


def _change(name: str, before: Any, now: Any) -> str:
    """Describe the innermost setting that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        inner = next(key for key in [*before, *now] if before.get(key) != now.get(key))
        return _change(f"{name}.{inner}", before.get(inner), now.get(inner))
    return f"{name} = {before}; now it is {now}"


def write_record(
    configuration: Configuration,
    data: Mapping[str, Any],
    scale: Sequence[float],
    history: Sequence[Mapping[str, float]] = (),
    *,
    finished: bool = False,
) -> None:
    """Write ``training.json``.

    Args:
        configuration: settings of the run.
        data: the number of records and the file's digest, as ``sha256``.
        scale: the noise layer's range of sigma.
        history: the values of every step.
        finished: True if all steps were taken.
    """
    content = {
        "settings": settings_of(configuration),
        "scale": list(scale),
        "data": dict(data),
        "versions": versions(),
        "finished": finished,
        # JSON has no NaN. The mean sigma is NaN if no token is transformed.
        "history": [
            {name: value if math.isfinite(value) else None for name, value in step.items()} for step in history
        ],
    }
    with replacing(configuration.out / RECORD_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def components_in(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the names of the values to show of a history: the loss, its components, the mean sigma."""
    names = sorted(set(history[0]) - {*_BOOKKEEPING, "loss", "mean_sigma"}) if history else []
    return ["loss", *names, "mean_sigma"] if history else []


def ends(history: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
    """Return a value's means over the first and over the last tenth of the steps."""
    count = math.ceil(len(history) / 10)
    first, last = ([step[name] for step in part] for part in (history[:count], history[-count:]))
    return math.fsum(first) / count, math.fsum(last) / count
