"""The options of an evaluation in a file of its folder, from which ``--resume`` takes what is not given again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgfast.evaluation.progress import write_json
from sgfast.evaluation.settings import EvaluationError

OPTIONS_FILE = "options.json"
# No seed: with the seed of an evaluation, anyone could draw again the noise that hid its texts.
_TYPES: dict[str, tuple[type, ...]] = {
    "transform": (list,),
    "data": (str,),
    "model": (str, type(None)),
    "num_logits": (int, type(None)),
    "memory_budget": (str,),
    "attacks": (str, type(None)),
    "beta": (int,),
    "attack_tokens": (int,),
    "known_tokens": (int,),
    "canaries": (str, type(None)),
    "text_unit": (str,),
    "text_as": (str,),
    "max_length": (int, type(None)),
    "precision": (str,),
    "parquet": (bool,),
}


def write_options(out: Path, options: Mapping[str, Any]) -> None:
    """Write the options that a resumed evaluation needs. Other options are left out."""
    write_json(out / OPTIONS_FILE, {name: _as_json(options[name]) for name in _TYPES})


def with_options_of(out: Path, options: Mapping[str, Any], given: set[str]) -> dict[str, Any]:
    """Return options in which those that are not given come from the evaluation in a folder, if there is one.

    Args:
        out: folder of the evaluation.
        options: all options of the command.
        given: names of the options that the user gave.

    Raises:
        EvaluationError: the folder's file of options is damaged.
    """
    return {**options, **{name: value for name, value in _read_options(out).items() if name not in given}}


def _read_options(out: Path) -> dict[str, Any]:
    path = out / OPTIONS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} is damaged: remove the file, and give all options again") from error
    if not isinstance(content, dict) or not all(
        name in _TYPES and isinstance(value, _TYPES[name]) for name, value in content.items()
    ):
        raise EvaluationError(f"{path} is damaged: remove the file, and give all options again")
    paths = content.get("transform", [])
    if not all(isinstance(path, str) for path in paths):
        raise EvaluationError(f"{path} is damaged: remove the file, and give all options again")
    content |= {"transform": [Path(path) for path in paths]} if paths else {}
    return content | {name: Path(content[name]) for name in ("data", "canaries") if content.get(name) is not None}


def _as_json(value: Any) -> Any:
    if isinstance(value, list):
        return [str(one) for one in value]
    return str(value) if isinstance(value, Path) else value
