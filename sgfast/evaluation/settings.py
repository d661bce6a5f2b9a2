"""The settings of one evaluation, read from the user's options."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from sgfast.ops.validation import did_you_mean
from sgfast.utils.records import TextAs, TextUnit

# Rank attacks run on every transformed token. The other attacks run on a sample of the tokens, after the file.
RANK_ATTACKS = ("nearest", "farthest", "transformation")
SAMPLE_ATTACKS = ("repeated", "learned", "known", "information")
ATTACKS = RANK_ATTACKS + SAMPLE_ATTACKS

Precision = Literal["float32", "bfloat16"]

_UNITS = {"": 0, "B": 0, "K": 10, "KIB": 10, "M": 20, "MIB": 20, "G": 30, "GIB": 30, "T": 40, "TIB": 40}
_DECIMAL_UNITS = {"KB": 3, "MB": 6, "GB": 9, "TB": 12}


class EvaluationError(ValueError):
    """An evaluation that cannot be run as asked; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """The settings of one evaluation: the files, the attacks, and the memory budget."""

    model: str | None
    transform: Path
    data: Path
    out: Path
    attacks: tuple[str, ...] = ATTACKS
    num_logits: int | None = None
    beta: int = 1
    attack_tokens: int = 4096
    known_tokens: int = 256
    canaries: Path | None = None
    memory_budget: int = 2 * 2**30
    seed: int = 0
    text_unit: TextUnit = "line"
    text_as: TextAs = "message"
    max_length: int | None = None
    precision: Precision = "float32"
    parquet: bool = False
    save_seconds: float = 10.0

    def compared(self) -> dict[str, Any]:
        """Return the settings that the results depend on, without the seed, which no file stores.

        An evaluation resumes only under equal settings.
        """
        return {
            "model": self.model,
            "attacks": list(self.attacks),
            "num_logits": self.num_logits,
            "beta": self.beta,
            "attack_tokens": self.attack_tokens,
            "known_tokens": self.known_tokens,
            "text_unit": self.text_unit,
            "text_as": self.text_as,
            "max_length": self.max_length,
            "precision": self.precision,
        }


def parse_bytes(text: str) -> int:
    """Parse a number of bytes with a unit.

    Raises:
        EvaluationError: not a positive number below 2^63 bytes, or an unknown unit.

    Example:
        >>> parse_bytes("2GiB"), parse_bytes("1.5 KiB"), parse_bytes("500MB")
        (2147483648, 1536, 500000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or not (unit in _UNITS or unit in _DECIMAL_UNITS):
        raise EvaluationError(f"--memory-budget must be a size such as 512MiB or 2GiB; got {text!r}")
    factor = 10 ** _DECIMAL_UNITS[unit] if unit in _DECIMAL_UNITS else 2 ** _UNITS[unit]
    if not 1 <= (size := int(Decimal(match[1]) * factor)) < 2**63:
        raise EvaluationError(f"--memory-budget must be positive and less than 2^63 bytes; got {text!r}")
    return size


def parse_attacks(text: str) -> tuple[str, ...]:
    """Parse a comma list of attacks, ``all`` or ``none``, into the order of `ATTACKS`.

    Raises:
        EvaluationError: an unknown name.

    Example:
        >>> parse_attacks("learned, nearest"), parse_attacks("none")
        (('nearest', 'learned'), ())
    """
    names = [name.strip() for name in text.split(",")]
    if names in (["all"], ["none"]):
        return ATTACKS if names == ["all"] else ()
    if unknown := [name for name in names if name not in ATTACKS]:
        suggestion = did_you_mean(unknown[0], ("all", "none", *ATTACKS))
        raise EvaluationError(
            f"--attacks must be all, none, or of {', '.join(ATTACKS)}; got {unknown[0]!r}{suggestion}"
        )
    return tuple(name for name in ATTACKS if name in names)


def result_folders(transforms: Sequence[Path], out: Path) -> list[Path]:
    """Return the folder for the results of each transform: ``out``, or for several a folder in it by the file's name.

    Raises:
        EvaluationError: two transforms have the same name.
    """
    if len(transforms) == 1:
        return [out]
    # Training gives every transform the same file name, each in its own folder.
    stems = [transform.stem for transform in transforms]
    names = stems if len(set(stems)) == len(stems) else [transform.absolute().parent.name for transform in transforms]
    if len(set(names)) != len(names):
        raise EvaluationError("transforms that are compared need different file names, or folders of different names")
    return [out / name for name in names]
