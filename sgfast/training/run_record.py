"""The record of a run, ``training.json``: its settings, versions and history, and whether a run may be continued.

It holds no seed: under the seed of a run, the noise that hid its texts could be drawn again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sgfast._version import __version__
from sgfast.huggingface.trainer_checkpoint import checkpoints
from sgfast.training.configuration import Configuration, ConfigurationError, settings_of
from sgfast.utils.files import replacing

RECORD_FILE, CHECKPOINTS = "training.json", "checkpoints"
# A run may be continued elsewhere and for longer. The same data may lie in another place: its digest is compared.
_FREE_TO_CHANGE = ("out", "data", "steps", "save_steps")
# What the trainer logs besides the loss and its components.
_BOOKKEEPING = ("step", "epoch", "grad_norm", "learning_rate")


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    import torch
    import transformers

    return {"sgfast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def check_continues(configuration: Configuration, digest: str, resume: bool) -> None:
    """Check that a run may write to its folder: an unused one or, to resume, that of a run like it.

    A run that came to no step does not count.

    Raises:
        ConfigurationError: there is a run and ``resume`` is False, or it had other settings or other data.
    """
    path, saved = configuration.out / RECORD_FILE, checkpoints(configuration.out / CHECKPOINTS)
    if not path.exists() and not saved:
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before, digest_before = record["settings"], record["data"]["sha256"]
        has_steps = bool(record["history"] or saved)
        compared = [name for name in before if name not in _FREE_TO_CHANGE]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is not the record of a run: give another --out") from error
    if not has_steps:
        return
    if not resume:
        raise ConfigurationError(f"{configuration.out} holds a run: continue it by --resume, or give another --out")
    if digest != digest_before:
        raise ConfigurationError(
            f"--resume: {configuration.data} is not the data that {configuration.out} was begun with"
        )
    now = json.loads(json.dumps(settings_of(configuration)))
    for name in compared:
        if now.get(name) != before[name]:
            raise ConfigurationError(
                f"--resume: {configuration.out} was begun with {name} = {before[name]}; now it is {now.get(name)}"
            )


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
        configuration: of the run.
        data: the number of records and the file's digest, as ``sha256``.
        scale: the range of sigma that the noise layer has.
        history: of every step.
        finished: whether all steps were taken.
    """
    content = {
        "settings": settings_of(configuration),
        "scale": list(scale),
        "data": dict(data),
        "versions": versions(),
        "finished": finished,
        # JSON has no NaN, which the mean sigma of no token is.
        "history": [
            {name: value if math.isfinite(value) else None for name, value in step.items()} for step in history
        ],
    }
    with replacing(configuration.out / RECORD_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def components_in(history: Sequence[Mapping[str, float]]) -> list[str]:
    """What to show of a history: the loss, its components, sigma."""
    names = sorted(set(history[0]) - {*_BOOKKEEPING, "loss", "mean_sigma"}) if history else []
    return ["loss", *names, "mean_sigma"] if history else []


def ends(history: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
    """A value's means over the first and over the last tenth of the steps."""
    count = math.ceil(len(history) / 10)
    first, last = ([step[name] for step in part] for part in (history[:count], history[-count:]))
    return math.fsum(first) / count, math.fsum(last) / count
